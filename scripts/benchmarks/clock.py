"""The clock that everything is timed with: the wall's, or, on a busy machine, this process's own processor time."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["now", "use_processor_time"]

_clock: list[Callable[[], float]] = [time.perf_counter]


def use_processor_time() -> None:
    """From now on, count the seconds that this process computes, on all cores together."""
    _clock[0] = time.process_time


def now() -> float:
    """Seconds, of which only differences mean something."""
    return _clock[0]()
