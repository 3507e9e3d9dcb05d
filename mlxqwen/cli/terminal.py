"""Writing to terminals, pipes and files."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TextIO

from mlxqwen.errors import one_line

__all__ = [
    "ConversionProgress",
    "PrefillProgress",
    "open_missing_streams",
    "print_error",
    "print_notes",
    "progress_line",
    "silence_streams",
]


class PrefillProgress:
    """One line on a terminal while a long prompt is read; wiped when it is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shows = stream.isatty()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if done >= total:
            self.wipe()
        elif self._shows and done:
            self._stream.write(f"\rReading the prompt: {done:,} of {total:,} tokens")
            self._stream.flush()
            self._shown = True

    def wipe(self) -> None:
        """Leave an empty line to whatever is written next."""
        if self._shown:
            self._shown = False
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class ConversionProgress:
    """One line on a terminal: what is done, how far it is, how fast, and how long it will take; nothing elsewhere."""

    _INTERVAL = 0.1

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shows = stream.isatty()
        self._stage = ""
        self._began = self._drawn = 0.0
        self._first = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._shows:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done
        elif now - self._drawn < self._INTERVAL and done < total:
            return
        self._drawn = now
        self._stream.write(f"\r\x1b[K{progress_line(stage, done, total, done - self._first, now - self._began)}")
        self._stream.flush()

    def close(self) -> None:
        """Wipe the line."""
        if self._shows and self._stage:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._stage = ""


def progress_line(stage: str, done: int, total: int, recent: int, seconds: float) -> str:
    """For example `converting  42 %  |########            |  310 M weights/s  0:12 left`.

    Args:
        stage: what goes on.
        done, total: weights.
        recent: weights done in the last `seconds`.
    """
    filled = 20 * done // total
    line = f"{stage:<10} {100 * done // total:3d} %  |{'#' * filled}{' ' * (20 - filled)}|"
    if seconds < 0.2 or not recent:
        return line
    rate = recent / seconds
    left = round((total - done) / rate)
    return f"{line}  {rate / 1e6:.0f} M weights/s  {left // 60}:{left % 60:02d} left"


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"note: {one_line(record.getMessage())}\n")


def print_notes() -> None:
    """Print what the library has to say on standard error, a line each."""
    logger = logging.getLogger("mlxqwen")
    logger.propagate = False
    logger.handlers = [_Notes()]


def print_error(problem: str, hint: str = "") -> None:
    """One line, or two, on standard error."""
    sys.stderr.write(f"error: {one_line(problem)}\n" + (f"       {one_line(hint)}\n" if hint else ""))


def open_missing_streams() -> None:
    """Let standard streams that whoever called us has closed read and write nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def silence_streams() -> None:
    """Send what is still to be written nowhere, for nobody can read it: not even Python's last flush may fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
