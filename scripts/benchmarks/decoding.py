"""Reading a prompt and decoding behind it, in one process, on the same folder of weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx

from benchmarks.checkpoints import bits_name, checkpoint, layers_of, small_checkpoint
from benchmarks.comparison import Comparison, take_turns
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Side, Theirs, prompt_ids, seconds_per_token, seconds_to_first_token

__all__ = ["decode", "first_token", "prefill"]

_BITS = (4, 8, None)
_PREFILL_LAYERS = 4  # mlx-lm takes seconds for each token of 28 quantized layers on a CPU
_NARROW_LAYERS = 6  # of the last one, some work on a prompt is left out: it must not be half of all


def decode(settings: Settings) -> list[Comparison]:
    """Seconds a token behind a short prompt."""
    count = 4 if settings.quick else 8
    measure = partial(seconds_per_token, prompt=prompt_ids(4), count=count)
    rows = []
    for bits in _BITS:
        folder = checkpoint(settings, bits)
        rows += _beside_mlx_lm(f"decode, {_name(settings, bits, folder)}, a token", folder, measure, settings, 5)
    return rows


def prefill(settings: Settings) -> list[Comparison]:
    """Seconds for a prompt, its first token included."""
    length = 16 if settings.quick else 32
    measure = partial(seconds_to_first_token, prompt=prompt_ids(length))
    rows = []
    for bits in _BITS:
        folder = checkpoint(settings, bits, layers=settings.layers or _PREFILL_LAYERS)
        what = f"prefill, {_name(settings, bits, folder)}, {length} tokens"
        rows += _beside_mlx_lm(what, folder, measure, settings, 5)
    return rows


def first_token(settings: Settings) -> list[Comparison]:
    """Seconds from 4,096 ids to the first token: of a small model, unless shape or layers are given."""
    length = 1024 if settings.quick else 4096
    measure = partial(seconds_to_first_token, prompt=prompt_ids(length))
    if settings.shapes or settings.layers:
        folder = checkpoint(settings, None)
        name = _name(settings, None, folder)
    else:
        folder, name = small_checkpoint(settings, _NARROW_LAYERS), f"{_NARROW_LAYERS} narrow layers, BF16"
    return _beside_mlx_lm(f"time to first token, {name}, {length:,} tokens", folder, measure, settings, 3)


def _name(settings: Settings, bits: int | None, folder: Path) -> str:
    return f"{settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}, {layers_of(folder)} layers"


def _beside_mlx_lm(
    what: str, folder: Path, measure: Callable[[Side], float], settings: Settings, turns: int
) -> list[Comparison]:
    """mlxqwen beside mlx-lm as it is, and, on a CPU, beside mlx-lm set to compute in what mlxqwen computes in."""
    sides: dict[str, Side] = {"mlxqwen": Ours.load(folder), MLX_LM: Theirs.load(folder)}
    if mx.default_device().type == mx.DeviceType.cpu:
        sides[FLOAT32] = Theirs.load(folder, mx.float32)
    turns = settings.turns(turns)
    told = partial(_tell, settings, what, turns)
    numbers = take_turns([partial(measure, side) for side in sides.values()], turns, told)
    rows = [
        Comparison(what, beside, "s", numbers[0], theirs)
        for beside, theirs in zip([*sides][1:], numbers[1:], strict=True)
    ]
    sides.clear()
    gc.collect()
    mx.clear_cache()
    return rows


def _tell(settings: Settings, what: str, turns: int, turn: int) -> None:
    settings.tell(f"{what}: turn {turn} of {turns}" if turn else f"{what}: warm")
