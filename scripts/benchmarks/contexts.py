"""Decoding behind long contexts, which are not read: a cache is filled with zeros, whose attention costs as much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.checkpoints import checkpoint, layers_of
from benchmarks.comparison import Comparison
from benchmarks.settings import Settings
from benchmarks.sides import MLX_LM, Ours, Theirs
from benchmarks.steps import seconds_per_step
from mlxqwen.cache import make_cache

__all__ = ["context"]

_LAYERS = 2
_WINDOW = 1024
_SPARE = 64  # slots for what is decoded


def context(settings: Settings) -> list[Comparison]:
    """Milliseconds a token behind 256 to 16,384 tokens, and in a ring of 1,024."""
    folder = checkpoint(settings, None, layers=settings.layers or _LAYERS)
    name = f"{settings.shape.removeprefix('Qwen3-')} BF16, {layers_of(folder)} layers"
    ours, theirs = Ours.load(folder).model, Theirs.load(folder).model
    rows = []
    for cache, contexts, window in (("", (256, 4096, 16384), None), (", ring of 1,024", (2048, 16384), _WINDOW)):
        for tokens in contexts:
            what = f"decode behind {tokens:,} tokens{cache}, {name}"
            settings.tell(what)
            sides = [_our_steps(ours, tokens, window), _their_steps(theirs, tokens, window)]
            times = seconds_per_step(sides, settings.turns(15))
            rows.append(Comparison(what, MLX_LM, "ms", *([seconds * 1e3 for seconds in side] for side in times)))
    return rows


def _our_steps(model: Any, context: int, window: int | None) -> Iterator[None]:
    cache = make_cache(model, max_kv_size=window)
    cache.reserve(min(context, window or context) + _SPARE)
    mx.eval(model.model(mx.array([[1]]), cache), cache.state)
    cache.placement.offsets = [context]
    return _steps(lambda token: model.logits(model.model(token, cache)))


def _their_steps(model: Any, context: int, window: int | None) -> Iterator[None]:
    cache = make_prompt_cache(model, max_kv_size=window)
    shape = (1, model.args.num_key_value_heads, min(context, window or context), model.args.head_dim)
    for layer in cache:
        layer.update_and_fetch(mx.zeros(shape, dtype=mx.bfloat16), mx.zeros(shape, dtype=mx.bfloat16))
    return _steps(lambda token: model(token, cache))


def _steps(logits: Callable[[mx.array], mx.array]) -> Iterator[None]:
    token = mx.array([[1]])
    while True:
        token = mx.argmax(logits(token)[:, -1], axis=-1, keepdims=True)
        mx.eval(token)
        yield
