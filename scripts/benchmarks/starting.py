"""Whole processes: importing, and one token from a standing start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.checkpoints import small_checkpoint
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.machine import has_mlx_lm
from benchmarks.processes import Run, python, timed
from benchmarks.settings import Settings

__all__ = ["cold_start", "imports"]

PROMPT = "How many r's in strawberry?"
_TURNS = 15


def imports(settings: Settings) -> Iterator[Comparison]:
    """`import mlxqwen` beside `import mlx_lm` and `import mlx.core`."""
    names = ("mlxqwen", "mlx_lm", "mlx.core") if has_mlx_lm() else ("mlxqwen", "mlx.core")
    runs = _runs({f"import {name}": python("-c", f"import {name}") for name in names}, settings)
    times = {name: [run.time(settings) for run in side] for name, side in runs.items()}
    yield from compared("import, whole process", "s", times)


def cold_start(settings: Settings) -> Iterator[Comparison]:
    """One token of a small model with the real tokenizer, from the command line, with the card's profile."""
    folder = small_checkpoint(settings)
    commands = {"mlxqwen": ours_command(folder)}
    if has_mlx_lm():
        commands["mlx_lm.generate"] = theirs_command(folder)
    runs = _runs(commands, settings)
    what = "cold start, one token, 2 layers, real tokenizer"
    yield from compared(what, "s", {name: [run.time(settings) for run in side] for name, side in runs.items()})
    peaks = {name: [run.peak_bytes / 2**20 for run in side] for name, side in runs.items()}
    yield from compared(f"{what}: memory", "MiB", peaks)


def ours_command(folder: Path) -> list[str]:
    """`mlxqwen generate`."""
    return python("-m", "mlxqwen", "generate", PROMPT, "--model", folder, "--max-tokens", "1")


def theirs_command(folder: Path) -> list[str]:
    """`mlx_lm.generate` with the card's profile for thinking, which mlxqwen takes by itself."""
    options = ["--max-tokens", "1", "--temp", "0.6", "--top-p", "0.95", "--top-k", "20"]
    return python("-m", "mlx_lm", "generate", "--model", folder, "--prompt", PROMPT, *options)


def _runs(commands: Mapping[str, list[str]], settings: Settings) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {side: [] for side in commands}

    def seconds(side: str) -> float:
        run = timed(commands[side])
        runs[side].append(run)
        return run.time(settings)

    turns = settings.turns(_TURNS)
    take_turns([partial(seconds, side) for side in commands], turns)
    return {side: some[-turns:] for side, some in runs.items()}
