"""Decoding behind long contexts, which are not read: a cache is filled with zeros, whose attention costs as much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.batches import few_layers
from benchmarks.comparison import Comparison, Point, compared
from benchmarks.machine import has_mlx_lm
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Theirs, on_cpu
from benchmarks.steps import seconds_per_step
from mlxqwen.cache import make_cache

__all__ = ["context", "milliseconds_behind"]

_CONTEXTS = (256, 4096, 16384)
_BEYOND_THE_RING = (2048, 16384)
_WINDOW = 1024
_SPARE = 64  # slots for what is decoded


def context(settings: Settings) -> Iterator[Comparison]:
    """Milliseconds a token behind 256 to 16,384 tokens, and in a ring of 1,024."""
    name, _, folder = few_layers(settings, None)
    yield from milliseconds_behind(settings, name, folder, _CONTEXTS)
    yield from milliseconds_behind(settings, name, folder, _BEYOND_THE_RING, _WINDOW)


def milliseconds_behind(
    settings: Settings, name: str, folder: Path, contexts: Sequence[int], window: int | None = None
) -> Iterator[Comparison]:
    """Lines for a token behind so many tokens, of one model, which `name` names; in a ring if a window is given."""
    ours, theirs = Ours.load(folder).model, dict[str, Any]()
    if has_mlx_lm():
        theirs[MLX_LM] = Theirs.load(folder).model
        if on_cpu():
            theirs[FLOAT32] = Theirs.load(folder, mx.float32).model
    for tokens in contexts:
        what = f"decode behind {tokens:,} tokens{f', ring of {window:,}' if window else ''}, {name}"
        settings.tell(what)
        sides = {"mlxqwen": _our_steps(ours, tokens, window)}
        sides |= {
            side: _their_steps(model, tokens, window, mx.float32 if side == FLOAT32 else mx.bfloat16)
            for side, model in theirs.items()
        }
        times = seconds_per_step([*sides.values()], settings.turns(15))
        milliseconds = {side: [1e3 * seconds for seconds in some] for side, some in zip(sides, times, strict=True)}
        point = None if window else Point("context", name, tokens)
        yield from compared(what, "ms", milliseconds, point=point)


def _our_steps(model: Any, context: int, window: int | None) -> Iterator[None]:
    cache = make_cache(model, max_kv_size=window)
    cache.reserve(min(context, window or context) + _SPARE)
    mx.eval(model.model(mx.array([[1]]), cache), cache.state)
    cache.placement.offsets = [context]
    return _steps(lambda token: model.logits(model.model(token, cache)))


def _their_steps(model: Any, context: int, window: int | None, dtype: mx.Dtype) -> Iterator[None]:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model, max_kv_size=window)
    shape = (1, model.args.num_key_value_heads, min(context, window or context), model.args.head_dim)
    for layer in cache:
        layer.update_and_fetch(mx.zeros(shape, dtype=dtype), mx.zeros(shape, dtype=dtype))
    return _steps(lambda token: model(token, cache))


def _steps(logits: Callable[[mx.array], mx.array]) -> Iterator[None]:
    token = mx.array([[1]])
    while True:
        token = mx.argmax(logits(token)[:, -1], axis=-1, keepdims=True)
        mx.eval(token)
        yield
