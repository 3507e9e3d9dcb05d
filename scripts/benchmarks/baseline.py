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

__all__ = ["BASELINE", "Baseline", "Change", "allowance", "changes", "report"]

BASELINE = Path(__file__).with_name("counts.json")

# What libraries and Python import changes with their versions, what MLX makes of an operation with its own.
_LIBRARIES = 0.10
_STANDARD_LIBRARY = 0.15
_STANDARD_LIBRARY_MODULES = 5  # at least: a share of one or two modules is none
_OTHER_MLX = 0.05
# Metal rounds what it allocates up to pages.
_OTHER_ALLOCATOR_BYTES = 64 << 10


@dataclass(frozen=True)
class Baseline:
    """Counts by name, the versions that they were counted with, and whose memory MLX allocated: CPU, Metal or CUDA."""

    counts: Mapping[str, int]
    mlx: str
    python: str
    allocator: str = "CPU"

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Baseline:
        """Of this interpreter and its MLX."""
        import mlx.core as mx

        allocator = "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else "CPU"
        return cls(counts, importlib.metadata.version("mlx"), platform.python_version(), allocator)

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """A committed one."""
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["counts"], found["mlx"], found["python"], found["allocator"])

    def write(self, path: Path) -> None:
        """As `read` reads it."""
        facts = {"mlx": self.mlx, "python": self.python, "allocator": self.allocator, "counts": dict(self.counts)}
        text = json.dumps(facts, indent=2)
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


def allowance(name: str, expected: int, *, same_mlx: bool, same_allocator: bool) -> int:
    """By how much a count may differ for reasons outside this repository."""
    if name.endswith(": libraries"):
        return math.floor(expected * _LIBRARIES)
    if name.endswith(": standard library"):
        return max(_STANDARD_LIBRARY_MODULES, math.floor(expected * _STANDARD_LIBRARY))
    if name.startswith(("primitives ", "bytes written ")) and not same_mlx:
        return math.floor(expected * _OTHER_MLX)
    if name.startswith("bytes held ") and not same_allocator:
        return _OTHER_ALLOCATOR_BYTES
    return 0


def changes(baseline: Baseline, found: Baseline) -> list[Change]:
    """What differs by more than it may, in the baseline's order."""
    changed = []
    for name in [*baseline.counts, *(name for name in found.counts if name not in baseline.counts)]:
        change = Change(name, baseline.counts.get(name), found.counts.get(name))
        if not _is_allowed(change, baseline, found):
            changed.append(change)
    return changed


def _is_allowed(change: Change, baseline: Baseline, found: Baseline) -> bool:
    if change.expected is None or change.found is None:
        return False
    same = {"same_mlx": baseline.mlx == found.mlx, "same_allocator": baseline.allocator == found.allocator}
    return abs(change.found - change.expected) <= allowance(change.name, change.expected, **same)


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
