"""Writing to terminals, pipes and files."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from mlxqwen.errors import one_line

__all__ = [
    "PrefillProgress",
    "open_missing_streams",
    "print_error",
    "print_notes",
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
