"""Ctrl-C and closed pipes: exit codes, and an exit at once during imports."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["BROKEN_PIPE", "INTERRUPTED", "before_leaving", "leave_at_once"]

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE

_restoring: list[Callable[[], None]] = []


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
