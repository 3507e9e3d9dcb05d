"""Ctrl-C during a reply: it stops the reply between two events."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["stop_on_interrupt"]


@contextmanager
def stop_on_interrupt(active: bool = True) -> Iterator[Callable[[], bool]]:
    """Around a reply: gives a function that tells whether Ctrl-C was pressed. The second one raises KeyboardInterrupt.

    What is typed meanwhile is not shown, so as not to get between the lines of the reply; the next prompt has it.

    Args:
        active: False leaves everything as it is.
    """
    if not active:
        yield lambda: False
        return
    handler = signal.getsignal(signal.SIGINT)
    pressed = False

    def press(signal_number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    with _without_echo():
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, press)
        try:
            yield lambda: pressed
        finally:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _without_echo() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before: list[Any] = termios.tcgetattr(descriptor)
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
