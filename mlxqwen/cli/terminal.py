"""Writing to terminals, pipes and files."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TextIO

from mlxqwen.errors import one_line

__all__ = [
    "INTERRUPTED",
    "ConversionProgress",
    "Output",
    "PrefillProgress",
    "print_error",
    "print_notes",
    "progress_line",
]

INTERRUPTED = 130  # 128 + SIGINT, as shells count

# A model's words must not steer the terminal: every control character but line breaks and tabs is spelled out.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"


class Output:
    """A stream that text is written to as it comes; on a terminal control characters are spelled out.

    Args:
        stream: standard output or standard error.
        dim: write dimly on a terminal, unless NO_COLOR is set.
    """

    def __init__(self, stream: TextIO, *, dim: bool = False) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._styled = dim and self.is_terminal and "NO_COLOR" not in os.environ
        self._line_is_open = False

    def write(self, text: str) -> None:
        """Write `text` now."""
        if not text:
            return
        self._line_is_open = not text.endswith("\n")
        encoding = self.stream.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self.is_terminal:
            text = text.translate(_CONTROLS)
        self.stream.write(f"{_DIM}{text}{_NORMAL}" if self._styled else text)
        self.stream.flush()

    def end_line(self) -> None:
        """Finish the line if one was begun."""
        if self._line_is_open:
            self.write("\n")


class PrefillProgress:
    """One line on a terminal while a long prompt is read; wiped when it is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shows = stream.isatty()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if not self._shows:
            return
        if done < total:
            if done:
                self._stream.write(f"\rReading the prompt: {done:,} of {total:,} tokens")
                self._shown = True
        elif self._shown:
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
    sys.stderr.write(f"error: {problem}\n" + (f"       {hint}\n" if hint else ""))
