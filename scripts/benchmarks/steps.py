"""Sides that decode without end, one step at a time, measured in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.clock import now
from benchmarks.comparison import take_turns

__all__ = ["seconds_per_step"]


_LEAST_OF_A_TURN = 0.05  # seconds


def seconds_per_step(sides: Sequence[Iterator[None]], turns: int, most: int = 1) -> list[list[float]]:
    """Each side's seconds for a step, a few of them a turn. The first step reads prompts: it does not count.

    A side has waited for all that it has queued when it yields, or the next one would pay for it. A short step right
    behind another side's finds cold caches and threads that sleep: so a turn is as many steps as take 50 ms.

    Args:
        sides: each `next` is a step.
        turns: that count; the first turn warms.
        most: steps of a turn.
    """
    for side in sides:
        next(side)
    shortest = min(_seconds(side, 1) for side in sides)
    steps = max(1, min(most, math.ceil(_LEAST_OF_A_TURN / shortest)))
    return take_turns([partial(_seconds, side, steps) for side in sides], turns)


def _seconds(side: Iterator[None], steps: int) -> float:
    started = now()
    for _ in range(steps):
        next(side)
    return (now() - started) / steps
