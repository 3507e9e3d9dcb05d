"""What is typed while nothing reads it: kept for the next prompt, and not shown before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlxqwen.cli.interrupts import before_leaving

__all__ = ["typing_unseen"]


@contextmanager
def typing_unseen() -> Iterator[None]:
    """While it lasts, the terminal neither shows what is typed nor edits lines; Ctrl-C and Ctrl-Z work as ever.

    Shown, it would stand between the lines of a reply, and again at the prompt. Edited, Ctrl-D would be an end of
    input that nobody is there to read, and lost; so it is a key, which the next prompt has.
    """
    if not sys.stdin.isatty():
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before: list[Any] = termios.tcgetattr(descriptor)
    unseen = before.copy()
    unseen[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, unseen)
    with before_leaving(lambda: termios.tcsetattr(descriptor, termios.TCSANOW, before)):
        yield
