"""The last line of a terminal, on which what goes on is shown and overwritten."""

from __future__ import annotations

import os
from typing import ClassVar, TextIO

__all__ = ["StatusLine", "bar", "terminal_size", "time_left"]


def terminal_size(stream: TextIO) -> os.terminal_size:
    """Columns and lines of the terminal of `stream` now; 80 by 24 if it does not tell."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        columns, lines = 0, 0
    return os.terminal_size((columns or 80, lines or 24))


class StatusLine:
    """A last line on a terminal that is overwritten and wiped; nothing is written elsewhere."""

    is_silenced: ClassVar[bool] = False
    _shown: ClassVar[StatusLine | None] = None

    def __init__(self, stream: TextIO | None) -> None:
        self.shows = stream is not None and stream.isatty() and not StatusLine.is_silenced
        self._stream = stream
        self._erases = os.environ.get("TERM") != "dumb"
        self._length = 0

    @property
    def columns(self) -> int:
        """Columns of the terminal."""
        return 80 if self._stream is None else terminal_size(self._stream).columns

    def draw(self, *versions: str) -> None:
        """Show the first of `versions` that the terminal is wide enough for, or the beginning of the last."""
        if not self.shows:
            return
        if StatusLine._shown not in (None, self):
            StatusLine.wipe_shown()
        room = self.columns - 1  # some terminals wrap after the last column
        line = next((version for version in versions if len(version) <= room), versions[-1][:room])
        self._write(f"\r{line}{self._blank(self._length - len(line))}")
        self._length, StatusLine._shown = len(line), self

    def wipe(self) -> None:
        """Leave an empty line to whatever is written next."""
        if self._length:
            blank = self._blank(min(self._length, self.columns - 1))
            self._write(f"\r{blank}" if self._erases else f"\r{blank}\r")
            self._length, StatusLine._shown = 0, None

    @classmethod
    def wipe_shown(cls) -> None:
        """Wipe whichever line is shown, for a message to take its place."""
        if cls._shown is not None:
            cls._shown.wipe()

    def _blank(self, length: int) -> str:
        return "" if length <= 0 else "\x1b[K" if self._erases else " " * length

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def bar(width: int, done: int, total: int) -> str:
    """For example `  |####    |`, `width` characters within."""
    filled = width * done // total
    return f"  |{'#' * filled}{' ' * (width - filled)}|"


def time_left(seconds: int) -> str:
    """For example `1:05 left`, and `2:00:00 left`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"
