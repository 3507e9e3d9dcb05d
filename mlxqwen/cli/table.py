"""Tables that fit the terminal: complete in pipes and files, else without the least important columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from mlxqwen.status_line import terminal_size

__all__ = ["Column", "columns_of", "table"]

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Args:
        head: its title.
        right: whether its cells end at its right edge.
        left_out: where there is too little room, the column of the highest number goes first; 0 stays.
        least: characters that long cells may be cut down to, from their beginning; None keeps them whole.
    """

    head: str
    right: bool = False
    left_out: int = 0
    least: int | None = None


def columns_of(stream: TextIO) -> int | None:
    """How wide a table may be: as the terminal, or without limit if there is none."""
    return terminal_size(stream).columns if stream.isatty() else None


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Lines of `rows` below the heads, no longer than `width` as far as columns can be left out and cells cut."""
    cells = [[column.head, *(row[place] for row in rows)] for place, column in enumerate(columns)]
    kept = list(range(len(columns)))
    widths = [max(map(len, column)) for column in cells]
    if width is not None:
        least = [own if c.least is None else min(own, c.least) for c, own in zip(columns, widths, strict=True)]
        while _total(kept, least) > width and any(columns[place].left_out for place in kept):
            kept.remove(max(kept, key=lambda place: columns[place].left_out))
        for place in kept:
            excess = _total(kept, widths) - width
            widths[place] = max(least[place], widths[place] - max(0, excess))
    text = ""
    for line in range(len(rows) + 1):
        shown = [_fitted(cells[place][line], widths[place], columns[place]) for place in kept]
        text += _GAP.join(shown).rstrip() + "\n"
    return text


def _total(kept: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[place] for place in kept) + len(_GAP) * (len(kept) - 1)


def _fitted(cell: str, width: int, column: Column) -> str:
    if len(cell) > width:
        cell = "…" + cell[len(cell) - width + 1 :]
    return cell.rjust(width) if column.right else cell.ljust(width)
