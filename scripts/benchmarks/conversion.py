"""BF16 → 4-bit with and without reading everything back, each beside mlx_lm.convert, in whole processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial

from benchmarks.checkpoints import checkpoint
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.machine import has_mlx_lm
from benchmarks.processes import Run, python, timed
from benchmarks.settings import Settings

__all__ = ["convert"]

_PEER = "mlx_lm.convert"


def convert(settings: Settings) -> Iterator[Comparison]:
    """Seconds, and the most memory that a process held."""
    for shape in settings.all_shapes():
        yield from _rows(settings, shape)


def _rows(settings: Settings, shape: str) -> Iterator[Comparison]:
    source, output = checkpoint(settings, None, shape=shape), settings.work / "converted"
    ours = python("-m", "mlxqwen", "convert", source, output, "--bits", "4")
    theirs = python("-m", "mlx_lm", "convert", "--hf-path", source, "--mlx-path", output, "-q")
    commands = {"verified": ours, "--no-verify": [*ours, "--no-verify"]}
    if has_mlx_lm():
        commands[_PEER] = theirs
    runs: dict[str, list[Run]] = {side: [] for side in commands}

    def seconds(side: str, command: list[str]) -> float:
        run = timed(command)
        shutil.rmtree(output)
        runs[side].append(run)
        return run.time(settings)

    turns = settings.turns(3)
    name = f"convert, {source.name.removeprefix('Qwen3-')}, BF16 → 4-bit"
    numbers = take_turns(
        [partial(seconds, side, command) for side, command in commands.items()],
        turns,
        lambda turn: settings.tell(f"{name}: turn {turn} of {turns}" if turn else f"{name}: warm"),
    )
    times = dict(zip(commands, numbers, strict=True))
    peaks = {side: [run.peak_bytes / 2**20 for run in some[-turns:]] for side, some in runs.items()}
    for way in ("verified", "--no-verify"):
        for end, unit, table in (("", "s", times), (": memory", "MiB", peaks)):
            yield from compared(f"{name}, {way}{end}", unit, {s: table[s] for s in (way, _PEER) if s in table})
