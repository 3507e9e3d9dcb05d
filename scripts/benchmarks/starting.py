"""Whole processes: importing, and one token from a standing start."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.checkpoints import small_checkpoint
from benchmarks.comparison import Comparison, take_turns
from benchmarks.processes import Run, python, timed
from benchmarks.settings import Settings

__all__ = ["cold_start", "imports"]

PROMPT = "How many r's in strawberry?"
_TURNS = 15


def imports(settings: Settings) -> list[Comparison]:
    """`import mlxqwen` beside `import mlx_lm` and `import mlx.core`."""
    commands = [python("-c", f"import {name}") for name in ("mlxqwen", "mlx_lm", "mlx.core")]
    runs = _runs(commands, settings)
    ours, *others = [[run.time(settings) for run in side] for side in runs]
    names = ("import mlx_lm", "import mlx.core")
    return [
        Comparison("import, whole process", name, "s", ours, theirs) for name, theirs in zip(names, others, strict=True)
    ]


def cold_start(settings: Settings) -> list[Comparison]:
    """One token of a small model with the real tokenizer, from the command line, with the card's profile."""
    folder = small_checkpoint(settings)
    runs = _runs([ours_command(folder), theirs_command(folder)], settings)
    what, beside = "cold start, one token, 2 layers, real tokenizer", "mlx_lm.generate"
    return [
        Comparison(what, beside, "s", *([run.time(settings) for run in side] for side in runs)),
        Comparison(f"{what}: memory", beside, "MiB", *([run.peak_bytes / 2**20 for run in side] for side in runs)),
    ]


def ours_command(folder: Path) -> list[str]:
    """`mlxqwen generate`."""
    return python("-m", "mlxqwen", "generate", PROMPT, "--model", folder, "--max-tokens", "1")


def theirs_command(folder: Path) -> list[str]:
    """`mlx_lm.generate` with the card's profile for thinking, which mlxqwen takes by itself."""
    options = ["--max-tokens", "1", "--temp", "0.6", "--top-p", "0.95", "--top-k", "20"]
    return python("-m", "mlx_lm", "generate", "--model", folder, "--prompt", PROMPT, *options)


def _runs(commands: list[list[str]], settings: Settings) -> list[list[Run]]:
    runs: list[list[Run]] = [[] for _ in commands]

    def seconds(side: int) -> float:
        run = timed(commands[side])
        runs[side].append(run)
        return run.time(settings)

    turns = settings.turns(_TURNS)
    take_turns([partial(seconds, side) for side in range(len(commands))], turns)
    return [side[-turns:] for side in runs]
