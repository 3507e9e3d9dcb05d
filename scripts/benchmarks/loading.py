"""Weights from a folder into memory, ready to compute with; files in the page cache, imports not counted.

Each load is the first large one of a process. Later ones are given memory of earlier ones, as much as the allocator has
kept, which says more about it than about loading.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

import mlxqwen
from benchmarks.checkpoints import bits_name, checkpoint
from benchmarks.clock import now, use_processor_time
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.machine import has_mlx_lm
from benchmarks.processes import output_of, python
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Theirs, on_cpu
from mlxqwen.files.hub import DEMO_FOLDER

__all__ = ["load"]

_WHOLE = "mlx_lm.load"


def load(settings: Settings) -> Iterator[Comparison]:
    """Seconds to load weights alone, and with all that `load` prepares beside them."""
    for bits in (4, 8, None):
        folder = checkpoint(settings, bits)
        what = f"load, {settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}"
        settings.tell(what)
        for end, names in (("weights alone", _alone()), ("tokenizer included", _whole())):
            sides = [partial(_seconds, settings, name, end, folder) for name in names]
            numbers = take_turns(sides, settings.turns(7))
            yield from compared(f"{what}, {end}", "s", dict(zip(names, numbers, strict=True)))


def _alone() -> list[str]:
    return ["mlxqwen", *([MLX_LM] if has_mlx_lm() else []), *([FLOAT32] if has_mlx_lm() and on_cpu() else [])]


def _whole() -> list[str]:
    return ["mlxqwen", *([_WHOLE] if has_mlx_lm() else [])]


def _loader(name: str, end: str) -> Callable[[Path], object]:
    if name == "mlxqwen":
        return Ours.load if end == "weights alone" else lambda folder: mlxqwen.load(str(folder))
    if name == _WHOLE:
        import mlx_lm

        return lambda folder: mlx_lm.load(str(folder))
    return partial(Theirs.load, dtype=mx.float32) if name == FLOAT32 else Theirs.load


def _seconds(settings: Settings, name: str, end: str, folder: Path) -> float:
    """In a process of its own."""
    counted = ["--processor-time"] if settings.processor_time else []
    return float(output_of(python("-m", "benchmarks.loading", name, end, folder, *counted)))


def _load_once() -> None:
    """Load a folder and print the seconds. The demo model is loaded before, by all that has to be imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("end")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    loader = _loader(options.name, options.end)
    loader(DEMO_FOLDER)
    if options.processor_time:
        use_processor_time()
    started = now()
    loaded = loader(options.folder)
    print(now() - started)
    del loaded


if __name__ == "__main__":
    _load_once()
