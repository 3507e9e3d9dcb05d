"""Pairs of measurements, one of mlxqwen and one of something else a turn, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["FLOAT32", "HEAD", "Comparison", "Point", "Table", "compared", "quartiles", "take_turns"]

HEAD = """\
| what | beside | mlxqwen | the other | ratio | quartiles | turns |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""


FLOAT32 = "mlx-lm set to float32"
"""The side that computes the same numbers as mlxqwen on a CPU."""


@dataclass(frozen=True)
class Point:
    """Where a line of the table stands in the plot: the panel's axis ("rows" or "context"), the model, the place."""

    axis: str
    model: str
    at: int


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Args:
        what: what was measured.
        beside: what it was measured beside; empty for a line of mlxqwen alone.
        unit: of the numbers: "s", "ms", "ns", "MiB", "tokens/s"; none for counts.
        ours, theirs: one number a turn, in turn; no numbers of theirs where mlxqwen stands alone.
        more_is_better: for rates; ratios above one are always in our favour.
        point: where the plot has it, if it has.
    """

    what: str
    beside: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    more_is_better: bool = field(default=False, kw_only=True)
    point: Point | None = field(default=None, kw_only=True)

    @property
    def is_alone(self) -> bool:
        """Whether there is nothing beside mlxqwen."""
        return not self.theirs

    @property
    def ratios(self) -> list[float]:
        """How many times better mlxqwen is, turn by turn: what slows a turn slows both. None where it stands alone."""
        if self.is_alone:
            return []
        pairs = zip(self.ours, self.theirs, strict=True)
        return [_over(ours, theirs) if self.more_is_better else _over(theirs, ours) for ours, theirs in pairs]

    @property
    def ratio(self) -> float:
        """The median of the ratios, of which there must be one."""
        return statistics.median(self.ratios)

    def markdown(self) -> str:
        """The line."""
        if self.is_alone:
            cells = (self.what, "", self._median(self.ours), "", "", "", str(len(self.ours)))
            return f"| {' | '.join(cells)} |"
        low, high = quartiles(self.ratios)
        spread = "" if len(self.ratios) == 1 else f"{low:.2f}–{high:.2f}"
        cells = (
            self.what,
            self.beside,
            self._median(self.ours),
            self._median(self.theirs),
            f"{self.ratio:.2f} ×",
            spread,
            str(len(self.ratios)),
        )
        return f"| {' | '.join(cells)} |"

    def _median(self, side: Sequence[float]) -> str:
        return f"{_short(statistics.median(side))} {self.unit}".rstrip()


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


def compared(
    what: str,
    unit: str,
    sides: Mapping[str, Sequence[float]],
    *,
    more_is_better: bool = False,
    point: Point | None = None,
) -> Iterator[Comparison]:
    """The first of the sides, mlxqwen, beside each of the others, or alone where there are none.

    The one that computes the same numbers leads: what another dtype costs on a CPU is no merit of ours.
    """
    (_, ours), *others = sides.items()
    others.sort(key=lambda side: side[0] != FLOAT32)
    for beside, theirs in others or [("", ())]:
        yield Comparison(what, beside, unit, ours, theirs, more_is_better=more_is_better, point=point)


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one number, that number."""
    if len(numbers) == 1:
        return numbers[0], numbers[0]
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


def take_turns(
    sides: Sequence[Callable[[], float]],
    turns: int,
    told: Callable[[int], None] | None = None,
    *,
    is_warm: bool = False,
) -> list[list[float]]:
    """Measure each of `sides` `turns` times → its numbers, one a turn.

    A first round warms disk and caches and does not count, unless earlier turns have done so. Every other turn goes the
    other way round, so that a machine that slows down favours nobody. `told` hears how many turns are done.
    """
    numbers: list[list[float]] = [[] for _ in sides]
    for turn in range(int(is_warm), turns + 1):
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
    if number == 0 or math.isinf(number):
        return f"{number:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}"
