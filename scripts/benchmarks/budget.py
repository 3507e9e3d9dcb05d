"""A bound on the time of a whole run: each part may take its share of what is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.parts import PARTS

__all__ = ["Budget"]

_LEAST = 5.0  # seconds in which a part could measure something


@dataclass(frozen=True)
class Budget:
    """So many minutes from now on; None for as long as it takes."""

    minutes: float | None
    began: float = field(default_factory=time.monotonic)

    def share(self, names: Sequence[str]) -> float | None:
        """The seconds that the first of the parts that are left may take, by what they usually take; 0 if too few.

        What a part does not use is left to the others.
        """
        if self.minutes is None:
            return None
        left = 60 * self.minutes - (time.monotonic() - self.began)
        share = left * PARTS[names[0]].minutes / sum(PARTS[name].minutes for name in names)
        return share if share >= _LEAST else 0.0

    @staticmethod
    def is_short(name: str, share: float | None) -> bool:
        """Whether a part is to take fewer turns in that time."""
        return share is not None and share < 60 * PARTS[name].minutes
