"""Daemon threads that are used again: MLX leaves a thread of the operating system behind for each that has evaluated.

So a program that loads and lets go of many models has no more threads than it had models at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from mlxqwen.shutdown import NATIVE_WORK

__all__ = ["Daemon", "in_lasting_thread"]

_T = TypeVar("_T")


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
            threading.Thread(target=_do_one_after_the_other, args=(tasks,), name="mlxqwen daemon", daemon=True).start()
        tasks.put((work, self._is_over))

    def is_alive(self) -> bool:
        """Whether the work goes on."""
        return not self._is_over.is_set()

    def join(self, timeout: float) -> None:
        """Wait until the work is over, at most `timeout` seconds."""
        self._is_over.wait(timeout)


def in_lasting_thread(work: Callable[[], _T]) -> _T:
    """What `work` returns or raises, done in a thread that does not end before the process: the main one or a daemon.

    For what makes MLX keep a generator of random numbers for the thread: where a thread that has one ends while the
    interpreter does, the process is aborted.
    """
    if threading.current_thread() is threading.main_thread():
        return work()
    result: Future[_T] = Future()

    def do() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    with NATIVE_WORK:
        Daemon(do)
        return result.result()


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
