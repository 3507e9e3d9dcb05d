"""Counts held to those of a committed file: more is a failure, less is told."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BASELINE", "Baseline", "Change", "changes", "report", "tolerance"]

BASELINE = Path(__file__).resolve().parents[1] / "bench_counts.json"

# What libraries and Python import changes with their versions, what MLX makes of an operation with its own.
_LIBRARIES = 0.10
_STANDARD_LIBRARY = 0.15
_OTHER_MLX = 0.05


@dataclass(frozen=True)
class Baseline:
    """Counts by name, and the versions that they were counted with."""

    counts: Mapping[str, int]
    mlx: str
    python: str

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Baseline:
        """Of this interpreter and its MLX."""
        return cls(counts, importlib.metadata.version("mlx"), platform.python_version())

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """A committed one."""
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["counts"], found["mlx"], found["python"])

    def write(self, path: Path) -> None:
        """As `read` reads it."""
        text = json.dumps({"mlx": self.mlx, "python": self.python, "counts": dict(self.counts)}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Change:
    """A count that is not what the baseline says; None for one that is only on one side."""

    name: str
    expected: int | None
    found: int | None

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.expected is None:
            return "new"
        if self.found is None:
            return "gone"
        return "worse" if self.found > self.expected else "better"

    @property
    def fails(self) -> bool:
        """Whether the baseline or the code has to change."""
        return self.verdict != "better"


def tolerance(name: str, *, same_mlx: bool) -> float:
    """The part of a count by which it may differ for reasons outside this repository."""
    if name.endswith(": libraries"):
        return _LIBRARIES
    if name.endswith(": standard library"):
        return _STANDARD_LIBRARY
    if name.startswith(("primitives ", "bytes written ")) and not same_mlx:
        return _OTHER_MLX
    return 0.0


def changes(baseline: Baseline, found: Baseline) -> list[Change]:
    """What differs by more than it may, in the baseline's order."""
    changed = []
    for name in [*baseline.counts, *(name for name in found.counts if name not in baseline.counts)]:
        change = Change(name, baseline.counts.get(name), found.counts.get(name))
        if change.expected is not None and change.found is not None:
            room = math.floor(change.expected * tolerance(name, same_mlx=baseline.mlx == found.mlx))
            if abs(change.found - change.expected) <= room:
                continue
        changed.append(change)
    return changed


def report(changed: list[Change], total: int, name: str) -> str:
    """What to tell of so many counts beside the baseline of that name, as a table if there is something."""
    if not changed:
        return f"{total} counts are as in {name}"
    lines = ["| count | baseline | now | |", "| --- | ---: | ---: | --- |"]
    for change in changed:
        numbers = ["" if number is None else f"{number:,}" for number in (change.expected, change.found)]
        lines.append(f"| {change.name} | {' | '.join(numbers)} | {change.verdict} |")
    if any(change.verdict == "worse" for change in changed):
        lines.append("\nMore work than before: mend it, or, if it is meant, scripts/bench --update-baseline")
    else:
        lines.append("\nUpdate the baseline: scripts/bench --update-baseline")
    return "\n".join(lines)
