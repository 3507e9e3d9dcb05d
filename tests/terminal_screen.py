"""What a terminal shows of what was written to it: a small one of our own, for tests."""

from __future__ import annotations

import re

from rich.cells import cell_len

_STYLE = re.compile(r"\x1b\[[\d;]*m")
_TOKEN = re.compile(r"\x1b\[(\d*)([A-Z])|(.)", re.DOTALL)


class Screen:
    """Understands text, line breaks, carriage returns, styles, cursor up and erase below; anything else is an error.

    Args:
        columns, rows: its size.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""]  # all that was ever shown, in plain text
        self._row = self._column = 0

    def write(self, text: str) -> None:
        """Show `text`."""
        for count, command, character in _TOKEN.findall(_STYLE.sub("", text).replace("\r\n", "\n")):
            if command == "A":
                self._row = max(self._row - int(count or 1), len(self.lines) - self.rows, 0)
            elif command == "J":
                del self.lines[self._row + 1 :]
                self.lines[self._row] = self.lines[self._row][: self._column]
            elif character == "\n":
                self._next_line()
            elif character == "\r":
                self._column = 0
            else:
                assert character.isprintable(), repr(text)
                self._put(character)

    def _put(self, character: str) -> None:
        if cell_len(self.lines[self._row][: self._column] + character) > self.columns:
            self._next_line()
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
        self._column += 1

    def _next_line(self) -> None:
        self._row += 1
        self._column = 0
        if self._row == len(self.lines):
            self.lines.append("")


def shown(text: str, columns: int = 80, rows: int = 24) -> list[str]:
    """The lines that a terminal shows of `text`, without blanks at their ends."""
    screen = Screen(columns, rows)
    screen.write(text)
    return [line.rstrip() for line in screen.lines]
