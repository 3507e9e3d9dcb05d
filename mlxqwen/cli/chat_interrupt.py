"""Ctrl-C during a reply: it stops the reply between two events, and the reading of its prompt at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupt", "stop_on_interrupt"]


class Interrupt:
    """Whether Ctrl-C was pressed during a reply.

    Attributes:
        is_pressed: whether the reply is to stop.
        raises: whether the first Ctrl-C raises KeyboardInterrupt where it is pressed, as each one behind it does.
    """

    def __init__(self) -> None:
        self.is_pressed = False
        self.raises = False

    def press(self, signal_number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        raises, self.is_pressed = self.is_pressed or self.raises, True
        if raises:
            raise KeyboardInterrupt


@contextmanager
def stop_on_interrupt(active: bool = True) -> Iterator[Interrupt]:
    """Around a reply: tells whether Ctrl-C was pressed.

    Args:
        active: False leaves everything as it is.
    """
    interrupt = Interrupt()
    handler = signal.getsignal(signal.SIGINT)
    if not active or handler is not signal.default_int_handler:
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt.press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, handler)
