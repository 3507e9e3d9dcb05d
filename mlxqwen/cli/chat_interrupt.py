"""Ctrl-C during a reply: it stops the reply between two events."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stop_on_interrupt"]


@contextmanager
def stop_on_interrupt(active: bool = True) -> Iterator[Callable[[], bool]]:
    """Around a reply: gives a function that tells whether Ctrl-C was pressed. The second one raises KeyboardInterrupt.

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

    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, handler)
