"""Ctrl-C and closed pipes: exit codes, an exit at once during imports, and the line that a terminal wrote ^C on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["BROKEN_PIPE", "INTERRUPTED", "before_leaving", "end_interrupted_line", "leave_at_once", "tell_interrupted"]

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE

_restoring: list[Callable[[], None]] = []


def end_interrupted_line() -> None:
    """End the line on which the terminal wrote ^C; nothing where no stream is a terminal."""
    for stream in (sys.stderr, sys.stdout):
        if stream is not None and stream.isatty():
            with suppress(OSError, RuntimeError):  # gone; or Ctrl-C came while it was being written to
                stream.write("\n")
                stream.flush()
            return


def tell_interrupted(text: str) -> None:
    """Write on standard error what goes on from here, in the place of the terminal's ^C."""
    is_terminal = sys.stderr.isatty()
    erased = "\n" if os.environ.get("TERM") == "dumb" else "\r\x1b[K"
    sys.stderr.write(f"{erased if is_terminal else ''}interrupted{text}\n")


@contextmanager
def before_leaving(restore: Callable[[], None]) -> Iterator[None]:
    """Call `restore` at the end, and also if Ctrl-C ends the process at once."""
    _restoring.append(restore)
    try:
        yield
    finally:
        _restoring.remove(restore)
        restore()


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Around imports: Ctrl-C ends the process at once.

    Raised in the midst of an import, KeyboardInterrupt can come out as a RuntimeError, or be lost.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # signals are its alone
    if not is_main or handler is not signal.default_int_handler:  # ignored, as in a shell's background jobs
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _leave(signal_number: int, frame: FrameType | None) -> None:
    if os.isatty(2):
        os.write(2, b"\n")  # behind the terminal's ^C
    for restore in _restoring:
        restore()
    os._exit(INTERRUPTED)
