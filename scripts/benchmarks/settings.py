"""What the user asked for, as every part is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings"]

DEFAULT_SHAPE = "Qwen3-0.6B"


@dataclass(frozen=True)
class Settings:
    """Passed to each part's process.

    Args:
        work: an existing folder for checkpoints, removed at the end.
        runs: turns; None for each part's own number.
        quick: fewer turns and less work in each.
        layers: of the models whose layers a part may choose; None for each part's own.
        shapes: names of releases; empty for each part's own.
        processor_time: count the seconds that processes compute, instead of the wall clock's.
    """

    work: Path
    runs: int | None = None
    quick: bool = False
    layers: int | None = None
    shapes: tuple[str, ...] = ()
    processor_time: bool = False

    def turns(self, usual: int, quick: int = 3) -> int:
        """How many turns to take where a part takes `usual` ones, or `quick` if in a hurry."""
        if self.runs is not None:
            return self.runs
        return min(usual, quick) if self.quick else usual

    def all_shapes(self) -> tuple[str, ...]:
        """The releases asked for."""
        return self.shapes or (DEFAULT_SHAPE,)

    @property
    def shape(self) -> str:
        """The release of parts that take one: the first asked for."""
        return self.all_shapes()[0]

    def tell(self, text: str) -> None:
        """Progress, to stderr."""
        print(f"bench: {text}", file=sys.stderr, flush=True)
