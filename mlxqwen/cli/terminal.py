"""Writing to terminals, pipes and files."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from mlxqwen.errors import one_line

__all__ = [
    "Output",
    "PrefillProgress",
    "open_missing_streams",
    "print_error",
    "print_notes",
    "silence_streams",
]

# A model's words must not steer the terminal: every control character but line breaks and tabs is spelled out.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"


class Output:
    """A stream that text is written to as it comes; on a terminal control characters are spelled out.

    Args:
        stream: standard output or standard error.
        dim: write dimly on a terminal, unless NO_COLOR is set or the terminal is dumb.
    """

    def __init__(self, stream: TextIO, *, dim: bool = False) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.line_is_open = False
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._styled = dim and self.is_terminal and not plain

    @property
    def is_unicode(self) -> bool:
        """Whether any character can be written."""
        return (self.stream.encoding or "utf-8").lower().replace("-", "") == "utf8"

    def write(self, text: str) -> None:
        """Write `text` now."""
        if not text:
            return
        self.line_is_open = not text.endswith("\n")
        encoding = self.stream.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self.is_terminal:
            text = text.translate(_CONTROLS)
        self.stream.write(f"{_DIM}{text}{_NORMAL}" if self._styled else text)
        self.stream.flush()

    def end_line(self) -> None:
        """Finish the line if one was begun."""
        if self.line_is_open:
            self.line_is_open = False
            self.stream.write("\n")
            self.stream.flush()


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
