"""The standard streams: there even if the caller has closed them, named in errors, silent once nobody can read them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["name_streams", "open_missing_streams", "silence_streams"]

_TITLES = {"stdin": "standard input", "stdout": "standard output", "stderr": "standard error"}


class _NamedFile(io.FileIO):
    """A descriptor whose errors say `title` where those of files say their path."""

    def __init__(self, descriptor: int, mode: str, title: str) -> None:
        super().__init__(descriptor, mode, closefd=False)
        self._title = title

    def readinto(self, buffer: Any, /) -> int | None:
        with self._named_errors():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._named_errors():
            return super().readall()

    def write(self, data: Any, /) -> int:
        with self._named_errors():
            return super().write(data)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self._title
            raise


def name_streams() -> None:
    """Let an `OSError` of a standard stream have its title as `filename`: by itself it does not tell which it was."""
    for name, title in _TITLES.items():
        stream = getattr(sys, name)
        try:
            descriptor = -1 if stream is None else stream.fileno()
        except (OSError, ValueError):  # something in memory, in a test
            continue
        if descriptor < 0:
            continue
        mode = "r" if name == "stdin" else "w"
        buffer: Any = _NamedFile(descriptor, mode, title)
        if mode == "r":
            buffer = io.BufferedReader(buffer)
        elif not isinstance(stream.buffer, io.RawIOBase):  # as it is with PYTHONUNBUFFERED
            buffer = io.BufferedWriter(buffer)
        named = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, named)


def open_missing_streams() -> None:
    """Let standard streams that whoever called us has closed read and write nothing."""
    for name in _TITLES:
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            descriptor = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def silence_streams() -> None:
    """Send what is still to be written nowhere, for nobody can read it: not even Python's last flush may fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
