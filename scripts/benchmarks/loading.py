"""Weights from a folder into memory, ready to compute with; files in the page cache, imports not counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_lm

import mlxqwen
from benchmarks.checkpoints import bits_name, checkpoint
from benchmarks.clock import now
from benchmarks.comparison import Comparison, take_turns
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Theirs

__all__ = ["load"]

_WHOLE: tuple[Callable[[str], object], ...] = (mlxqwen.load, mlx_lm.load)


def load(settings: Settings) -> list[Comparison]:
    """Seconds to load weights alone, and with all that `load` prepares beside them."""
    loaders: dict[str, Callable[[Path], object]] = {"mlxqwen": Ours.load, MLX_LM: Theirs.load}
    if mx.default_device().type == mx.DeviceType.cpu:
        loaders[FLOAT32] = partial(Theirs.load, dtype=mx.float32)
    rows = []
    for bits in (4, 8, None):
        folder = checkpoint(settings, bits)
        sides = [partial(_seconds, partial(load, folder)) for load in loaders.values()]
        what = f"load, {settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}"
        settings.tell(what)
        numbers = take_turns(sides, settings.turns(9))
        for beside, theirs in zip([*loaders][1:], numbers[1:], strict=True):
            rows.append(Comparison(f"{what}, weights alone", beside, "s", numbers[0], theirs))
        wholes = [partial(_seconds, partial(load, str(folder))) for load in _WHOLE]
        whole = take_turns(wholes, settings.turns(9))
        rows.append(Comparison(f"{what}, tokenizer included", "mlx_lm.load", "s", *whole))
    return rows


def _seconds(load: Callable[[], object]) -> float:
    gc.collect()
    mx.clear_cache()
    started = now()
    loaded = load()
    seconds = now() - started
    del loaded
    return seconds
