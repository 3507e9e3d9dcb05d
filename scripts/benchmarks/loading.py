"""Weights from a folder into memory, ready to compute with; files in the page cache, imports not counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

import mlxqwen
from benchmarks.checkpoints import bits_name, checkpoint
from benchmarks.clock import now
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.machine import has_mlx_lm
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Theirs, on_cpu

__all__ = ["load"]

_Loaders = dict[str, Callable[[Path], object]]


def load(settings: Settings) -> Iterator[Comparison]:
    """Seconds to load weights alone, and with all that `load` prepares beside them."""
    alone, whole = _loaders()
    for bits in (4, 8, None):
        folder = checkpoint(settings, bits)
        what = f"load, {settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}"
        settings.tell(what)
        for end, loaders in (("weights alone", alone), ("tokenizer included", whole)):
            sides = [partial(_seconds, partial(load, folder)) for load in loaders.values()]
            numbers = take_turns(sides, settings.turns(9))
            yield from compared(f"{what}, {end}", "s", dict(zip(loaders, numbers, strict=True)))


def _loaders() -> tuple[_Loaders, _Loaders]:
    """What loads weights alone, and what loads all."""
    alone: _Loaders = {"mlxqwen": Ours.load}
    whole: _Loaders = {"mlxqwen": lambda folder: mlxqwen.load(str(folder))}
    if has_mlx_lm():
        import mlx_lm

        alone[MLX_LM] = Theirs.load
        if on_cpu():
            alone[FLOAT32] = partial(Theirs.load, dtype=mx.float32)
        whole["mlx_lm.load"] = lambda folder: mlx_lm.load(str(folder))
    return alone, whole


def _seconds(load: Callable[[], object]) -> float:
    gc.collect()
    mx.clear_cache()
    started = now()
    loaded = load()
    seconds = now() - started
    del loaded
    return seconds
