"""Sides that decode without end, one step at a time, measured in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.clock import now
from benchmarks.comparison import take_turns

__all__ = ["seconds_per_step"]


def seconds_per_step(sides: Sequence[Iterator[None]], turns: int) -> list[list[float]]:
    """Each side's seconds for a step, one a turn. The first step reads prompts, the second warms: both do not count.

    A side has waited for all that it has queued when it yields, or the next one would pay for it.
    """
    for side in sides:
        next(side)
    return take_turns([partial(_seconds, side) for side in sides], turns)


def _seconds(side: Iterator[None]) -> float:
    started = now()
    next(side)
    return now() - started
