"""Daemon threads that are used again: MLX leaves a thread of the operating system behind for each that has evaluated.

So a program that loads and lets go of many models has no more threads than it had models at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["Daemon"]


class Daemon:
    """Some work in a daemon thread, perhaps one whose earlier work is over.

    Args:
        work: what it does; begins at once.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._is_over = threading.Event()
        with _lock:
            tasks = _idle.pop() if _idle else None
        if tasks is None:
            tasks = SimpleQueue()
            threading.Thread(
                target=_do_one_after_the_other, args=(tasks,), name="mlxqwen scheduler", daemon=True
            ).start()
        tasks.put((work, self._is_over))

    def is_alive(self) -> bool:
        """Whether the work goes on."""
        return not self._is_over.is_set()

    def join(self, timeout: float) -> None:
        """Wait until the work is over, at most `timeout` seconds."""
        self._is_over.wait(timeout)


_Tasks = SimpleQueue[tuple[Callable[[], None], threading.Event]]

_lock = threading.Lock()
_idle: list[_Tasks] = []  # of the threads that have nothing to do


def _do_one_after_the_other(tasks: _Tasks) -> None:
    while True:
        work, is_over = tasks.get()
        try:
            work()  # an error of its own ends this thread, which is then not used again
            del work
            with _lock:
                _idle.append(tasks)
        finally:
            is_over.set()
