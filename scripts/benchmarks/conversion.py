"""BF16 → 4-bit with and without reading everything back, each beside mlx_lm.convert, in whole processes."""

from __future__ import annotations

import shutil
from functools import partial

from benchmarks.checkpoints import checkpoint
from benchmarks.comparison import Comparison, take_turns
from benchmarks.processes import Run, python, timed
from benchmarks.settings import Settings

__all__ = ["convert"]

_NAMES = ("verified", "--no-verify", "mlx_lm.convert")


def convert(settings: Settings) -> list[Comparison]:
    """Seconds, and the most memory that a process held."""
    return [row for shape in settings.all_shapes() for row in _rows(settings, shape)]


def _rows(settings: Settings, shape: str) -> list[Comparison]:
    source, output = checkpoint(settings, None, shape=shape), settings.work / "converted"
    ours = python("-m", "mlxqwen", "convert", source, output, "--bits", "4")
    theirs = python("-m", "mlx_lm", "convert", "--hf-path", source, "--mlx-path", output, "-q")
    runs: list[list[Run]] = [[], [], []]

    def seconds(side: int, command: list[str]) -> float:
        run = timed(command)
        shutil.rmtree(output)
        runs[side].append(run)
        return run.time(settings)

    turns = settings.turns(3)
    name = f"convert, {source.name.removeprefix('Qwen3-')}, BF16 → 4-bit"
    commands = enumerate((ours, [*ours, "--no-verify"], theirs))
    numbers = take_turns(
        [partial(seconds, side, command) for side, command in commands],
        turns,
        lambda turn: settings.tell(f"{name}: turn {turn} of {turns}" if turn else f"{name}: warm"),
    )
    peaks = [[run.peak_bytes / 2**20 for run in side[-turns:]] for side in runs]
    return [
        Comparison(f"{name}, {_NAMES[side]}{end}", _NAMES[2], unit, table[side], table[2])
        for side in (0, 1)
        for end, unit, table in (("", "s", numbers), (": memory", "MiB", peaks))
    ]
