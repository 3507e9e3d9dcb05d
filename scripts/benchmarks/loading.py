"""Weights from a folder into memory, ready to compute with; files in the page cache, imports not counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from benchmarks.checkpoints import bits_name, checkpoint
from benchmarks.comparison import Comparison, take_turns
from benchmarks.settings import Settings
from benchmarks.sides import MLX_LM, Ours, Theirs

__all__ = ["load"]


def load(settings: Settings) -> list[Comparison]:
    """Seconds to load."""
    rows = []
    for bits in (4, 8, None):
        folder = checkpoint(settings, bits)
        sides = [partial(_seconds, partial(side.load, folder)) for side in (Ours, Theirs)]
        what = f"load, {settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}"
        settings.tell(what)
        rows.append(Comparison(what, MLX_LM, "s", *take_turns(sides, settings.turns(9))))
    return rows


def _seconds(load: Callable[[], object]) -> float:
    gc.collect()
    mx.clear_cache()
    started = time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - started
    del loaded
    return seconds
