"""Writing to terminals, pipes and files."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
import threading
import time
from typing import TextIO

from mlxqwen.errors import one_line
from mlxqwen.status_line import StatusLine, bar, terminal_size, time_left

__all__ = [
    "ConversionProgress",
    "LoadingLine",
    "PrefillProgress",
    "be_quiet",
    "count_of",
    "prefill_lines",
    "print_error",
    "print_notes",
    "progress_lines",
]

_COMMAND = re.compile(r"(?<=: )(\S*/)?(mlxqwen|pip|pipx|python[\d.]*|uvx?|hf) .*")  # a hint's, which ends it


def count_of(number: int) -> str:
    """A large number in a short form, for people."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


class DelayedLine:
    """One line on a terminal once something takes long; wiped at the end, or when something else shows.

    Args:
        stream: where it stands.
        seconds: before it is shown.
        versions: of the line, the longest first.
    """

    def __init__(self, stream: TextIO, seconds: float, *versions: str) -> None:
        self._line = StatusLine(stream)
        self._versions = versions
        self._lock = threading.Lock()
        self._is_over = False
        self._timer = threading.Timer(seconds, self._draw)
        self._timer.daemon = True

    def __enter__(self) -> DelayedLine:
        if self._line.shows:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Wipe the line, and show none from now on."""
        with self._lock:
            if not self._is_over:
                self._timer.cancel()
                self._line.wipe()
            self._is_over = True

    def _draw(self) -> None:
        with self._lock:
            if not self._is_over:
                self._line.draw(*self._versions)


class LoadingLine(DelayedLine):
    """One line on a terminal while a model is loaded, once that takes half a second.

    Args:
        stream: where it stands.
        name: the model's.
    """

    _SECONDS = 0.5

    def __init__(self, stream: TextIO, name: str) -> None:
        super().__init__(stream, self._SECONDS, f"Loading {one_line(name)}", "Loading")


class PrefillProgress:
    """One line on a terminal while a long prompt is read, from before its first chunk on; wiped when it is done."""

    _LONG = 512  # tokens; fewer are read before a line could be
    _SECONDS = 1.0  # until a text that is still turned into tokens has a line

    def __init__(self, stream: TextIO) -> None:
        self._line = StatusLine(stream)
        self._tokenizing = DelayedLine(stream, self._SECONDS, "Reading the prompt")
        self._began: float | None = None
        self._first = 0

    def begin(self) -> None:
        """Call before the prompt is turned into tokens, which takes seconds for millions of them."""
        self._tokenizing.__enter__()

    def __call__(self, done: int, total: int) -> None:
        self._tokenizing.end()
        if done >= total:
            self.wipe()
            return
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, done
            if total - done <= self._LONG:
                return
        self._line.draw(*prefill_lines(done, total, done - self._first, now - self._began))

    def wipe(self) -> None:
        """Leave an empty line to whatever is written next."""
        self._tokenizing.end()
        self._line.wipe()
        self._began = None


def prefill_lines(done: int, total: int, recent: int, seconds: float) -> list[str]:
    """For example `Reading the prompt: 512 of 2,048 tokens  310 tokens/s  0:05 left`, and shorter versions.

    Args:
        done, total: tokens.
        recent: tokens read in the last `seconds`.
    """
    line = f"Reading the prompt: {done:,} of {total:,} tokens"
    rate = left = ""
    if recent and seconds >= 0.2:
        seconds_left = round((total - done) * seconds / recent)
        rate = f"  {recent / seconds:.0f} tokens/s"
        left = f"  {time_left(seconds_left)}"
    return [line + rate + left, line + left, line, f"Prompt: {100 * done // total} %"]


class ConversionProgress:
    """One line on a terminal: what is done, how far it is, how fast, and how long it will take; nothing elsewhere."""

    _INTERVAL = 0.1

    def __init__(self, stream: TextIO) -> None:
        self._line = StatusLine(stream)
        self._stage = ""
        self._began = self._drawn = 0.0
        self._first = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._line.shows:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done
        elif now - self._drawn < self._INTERVAL and done < total:
            return
        self._drawn = now
        self._line.draw(*progress_lines(stage, done, total, done - self._first, now - self._began))

    def close(self) -> None:
        """Wipe the line."""
        self._line.wipe()
        self._stage = ""


def progress_lines(stage: str, done: int, total: int, recent: int, seconds: float) -> list[str]:
    """For example `converting  42 %  |########            |  310 M weights/s  0:12 left`, and shorter versions.

    Args:
        stage: what goes on.
        done, total: weights.
        recent: weights done in the last `seconds`.
    """
    percent = f"{stage:<10} {100 * done // total:3d} %"
    rate = left = ""
    if seconds >= 0.2 and recent:
        speed = recent / seconds
        seconds_left = round((total - done) / speed)
        rate = f"  {speed / 1e6:.0f} M weights/s"
        left = f"  {time_left(seconds_left)}"
    long, middle, short = (bar(width, done, total) for width in (20, 10, 6))
    bars = [long + rate + left, middle + rate + left, middle + left, short + left, left, ""]
    return [percent + bar for bar in bars]


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        StatusLine.wipe_shown()
        line = f"note: {one_line(record.getMessage())}"
        sys.stderr.write("".join(f"{one}\n" for one in _between_words(line, 6)))


def print_notes() -> None:
    """Print the library's log messages on standard error, a line each."""
    logger = logging.getLogger("mlxqwen")
    logger.propagate = False
    logger.handlers = [_Notes()]
    StatusLine.is_silenced = False


def be_quiet() -> None:
    """Print no notes and show no progress until the next `print_notes`; errors are printed."""
    logging.getLogger("mlxqwen").handlers = [logging.NullHandler()]
    StatusLine.is_silenced = True


def print_error(problem: str, hint: str = "") -> None:
    """One line, or two, on standard error; on a terminal that is narrower, more, broken between words."""
    lines = [f"error: {one_line(problem)}"] + ([f"       {one_line(hint)}"] if hint else [])
    sys.stderr.write("".join(f"{one}\n" for line in lines for one in _between_words(line, 7)))


def _between_words(line: str, indent: int) -> list[str]:
    """A line for standard error in pieces that its terminal is wide enough for; a command stays whole, to be copied."""
    columns = terminal_size(sys.stderr).columns if sys.stderr.isatty() else 0
    if not 2 * indent < columns < len(line):
        return [line]
    text, command = line, ""
    if found := _COMMAND.search(line):
        text, command = line[: found.start()], found[0]
    blank = " " * indent
    pieces = textwrap.wrap(text, columns, subsequent_indent=blank, break_long_words=False, break_on_hyphens=False)
    if command and len(pieces[-1]) + 1 + len(command) <= columns:
        pieces[-1] += f" {command}"
    elif command:
        pieces.append(blank + command)
    return pieces
