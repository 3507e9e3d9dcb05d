"""Pairs of measurements, one of mlxqwen and one of something else a turn, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["HEAD", "Comparison", "Table", "quartiles", "take_turns"]

HEAD = """\
| what | beside | mlxqwen | the other | ratio | quartiles | turns |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Args:
        what: what was measured.
        beside: what it was measured beside.
        unit: of the numbers: "s", "ms", "MiB", "tokens/s"; none for counts.
        ours, theirs: one number a turn, in turn.
        more_is_better: for rates; ratios above one are always in our favour.
    """

    what: str
    beside: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    more_is_better: bool = field(default=False, kw_only=True)

    @property
    def ratios(self) -> list[float]:
        """How many times better mlxqwen is, turn by turn: what slows a turn slows both."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return [_over(ours, theirs) if self.more_is_better else _over(theirs, ours) for ours, theirs in pairs]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    def markdown(self) -> str:
        """The line."""
        low, high = quartiles(self.ratios)
        spread = "" if len(self.ratios) == 1 else f"{low:.2f}–{high:.2f}"
        numbers = [f"{_short(statistics.median(side))} {self.unit}".rstrip() for side in (self.ours, self.theirs)]
        cells = (self.what, self.beside, *numbers, f"{self.ratio:.2f} ×", spread, str(len(self.ratios)))
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Table:
    """A part's figures as a table of its own; the first `texts` columns are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1

    def markdown(self) -> str:
        """Title, head and lines, behind an empty line."""
        rule = ["---"] * self.texts + ["---:"] * (len(self.columns) - self.texts)
        lines = (f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows))
        return "\n".join(("", f"{self.title}:", "", *lines))


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one number, that number."""
    if len(numbers) == 1:
        return numbers[0], numbers[0]
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


def take_turns(
    sides: Sequence[Callable[[], float]], turns: int, told: Callable[[int], None] | None = None
) -> list[list[float]]:
    """Measure each of `sides` `turns` times → its numbers, one a turn.

    A first round warms disk and caches and does not count. Every other turn goes the other way round, so that a machine
    that slows down favours nobody. `told` hears how many turns are done.
    """
    numbers: list[list[float]] = [[] for _ in sides]
    for turn in range(turns + 1):
        order = range(len(sides)) if turn % 2 else reversed(range(len(sides)))
        for side in order:
            measured = sides[side]()
            if turn:
                numbers[side].append(measured)
        if told:
            told(turn)
    return numbers


def _over(upper: float, lower: float) -> float:
    """A ratio; of nothing over nothing 1, of something over nothing without end."""
    if lower == 0:
        return 1.0 if upper == 0 else math.inf
    return upper / lower


def _short(number: float) -> str:
    """Three digits that count, no exponent."""
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}"
