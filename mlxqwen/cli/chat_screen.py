"""Lines at the end of a terminal that may still change."""

from __future__ import annotations

import re
from typing import TextIO

from rich.cells import cell_len

from mlxqwen.status_line import terminal_size

__all__ = ["LiveLines", "terminal_size"]

_STYLES = re.compile(r"\x1b\[[\d;]*m")


class LiveLines:
    """Shows lines and brings them up to date, writing no more than what has changed.

    Lines that have scrolled off the screen stay as they were. Narrower windows are taken to wrap what they show.

    Args:
        stream: a terminal, at the beginning of a line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown: list[str] = []
        self._columns = 0

    def update(self, lines: list[str]) -> None:
        """Show `lines`, which may have styles but no other control characters."""
        columns, rows = terminal_size(self._stream)
        if columns != self._columns and self._shown:
            self._begin_again(lines, columns, rows)
        else:
            self._replace(lines, rows)
        self._columns = columns

    def close(self) -> None:
        """Leave the lines as they are and go to the next line."""
        if self._shown:
            self._write("\n")
        self._shown = []

    def _replace(self, lines: list[str], rows: int) -> None:
        shown, last = self._shown, len(self._shown) - 1
        top = max(0, len(shown) - rows)
        first = top
        while first < min(len(shown), len(lines)) and shown[first] == lines[first]:
            first += 1
        if first == len(shown) == len(lines):
            return
        self._shown = list(lines)
        if first > last:
            self._write("\n".join(([""] if shown else []) + lines[first:]))
        elif first == last < len(lines) and lines[first].startswith(shown[first]):
            self._write("\n".join([lines[first][len(shown[first]) :], *lines[first + 1 :]]))
        else:
            first = max(top, min(first, len(lines) - 1))  # the cursor is to end behind the last line, which may stay
            self._write(f"{_up(last - first)}\r\x1b[J" + "\n".join(lines[first:]))

    def _begin_again(self, lines: list[str], columns: int, rows: int) -> None:
        """After a change of width: wipe what the screen still shows, and draw as many of the new lines as fit."""
        shown = sum(max(1, -(-cell_len(_STYLES.sub("", line)) // columns)) for line in self._shown)
        self._write(f"{_up(min(shown, rows) - 1)}\r\x1b[J" + "\n".join(lines[-rows:] if shown >= rows else lines))
        self._shown = list(lines)

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _up(lines: int) -> str:
    return f"\x1b[{lines}A" if lines > 0 else ""
