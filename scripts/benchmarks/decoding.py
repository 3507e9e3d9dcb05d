"""Reading a prompt and decoding behind it, in one process, on the same folder of weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

from benchmarks.checkpoints import bits_name, checkpoint, layers_of, small_checkpoint
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.settings import Settings
from benchmarks.sides import MLX_LM, Side, all_sides, on_cpu, prompt_ids, seconds_per_token, seconds_to_first_token

__all__ = ["decode", "first_token", "prefill"]

_BITS = (4, 8, None)
_PREFILL_LAYERS = 4  # mlx-lm takes seconds for each token of 28 quantized layers on a CPU
_NARROW_LAYERS = 6  # of the last one, some work on a prompt is left out: it must not be half of all


def decode(settings: Settings) -> Iterator[Comparison]:
    """Seconds a token behind a short prompt."""
    count = 4 if settings.quick else 8
    measure = partial(seconds_per_token, prompt=prompt_ids(4), count=count)
    for bits in _BITS:
        folder = checkpoint(settings, bits)
        yield from _beside_mlx_lm(f"decode, {_name(settings, bits, folder)}, a token", folder, measure, settings, 5)


def prefill(settings: Settings) -> Iterator[Comparison]:
    """Seconds for a prompt, its first token included."""
    length = 16 if settings.quick else 32
    measure = partial(seconds_to_first_token, prompt=prompt_ids(length))
    for bits in _BITS:
        folder = checkpoint(settings, bits, layers=settings.layers or _PREFILL_LAYERS)
        what = f"prefill, {_name(settings, bits, folder)}, {length} tokens"
        yield from _beside_mlx_lm(what, folder, measure, settings, 5)


def first_token(settings: Settings) -> Iterator[Comparison]:
    """Seconds from 4,096 ids to the first token: of a small model, or of the shape and layers that are given.

    Of quantized ones plain mlx-lm is left out on a CPU, where it takes seconds for each token of a whole model.
    """
    length = 1024 if settings.quick else 4096
    measure = partial(seconds_to_first_token, prompt=prompt_ids(length))
    if settings.shapes or settings.layers:
        folders = {bits: checkpoint(settings, bits) for bits in (4, None)}
        named = [(folder, _name(settings, bits, folder), bits) for bits, folder in folders.items()]
    else:
        named = [(small_checkpoint(settings, _NARROW_LAYERS), f"{_NARROW_LAYERS} narrow layers, BF16", None)]
    for folder, name, bits in named:
        what = f"time to first token, {name}, {length:,} tokens"
        left_out = {MLX_LM} if bits is not None and on_cpu() else set()
        yield from _beside_mlx_lm(what, folder, measure, settings, 3, left_out)


def _name(settings: Settings, bits: int | None, folder: Path) -> str:
    return f"{settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}, {layers_of(folder)} layers"


def _beside_mlx_lm(
    what: str,
    folder: Path,
    measure: Callable[[Side], float],
    settings: Settings,
    turns: int,
    left_out: Collection[str] = (),
) -> list[Comparison]:
    sides = all_sides(folder, left_out)
    turns = settings.turns(turns)
    told = partial(_tell, settings, what, turns)
    numbers = take_turns([partial(measure, side) for side in sides.values()], turns, told)
    rows = [*compared(what, "s", dict(zip(sides, numbers, strict=True)))]
    sides.clear()
    gc.collect()
    mx.clear_cache()
    return rows


def _tell(settings: Settings, what: str, turns: int, turn: int) -> None:
    settings.tell(f"{what}: turn {turn} of {turns}" if turn else f"{what}: warm")
