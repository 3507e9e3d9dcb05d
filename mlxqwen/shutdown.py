"""The end of the process: daemon threads that compute come to a place where they can be left for ever, and stay there.

Behind the interpreter's end a daemon thread that asks for its lock is ended where it stands, up to Python 3.13. Where
that is in the midst of MLX's C++, or MLX keeps something for the thread, Linux aborts the process: "terminate called
without an active exception".
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import suppress

__all__ = ["NATIVE_WORK"]

_PATIENCE = 10.0  # seconds
_LAST_LINES = 0.005  # seconds for what a thread still runs between telling that it stays and staying


class _NativeWork:
    """What is entered by threads while they compute. Once the process ends, only the main thread goes on.

    Threads may enter it again inside. The others stay where they begin, pause or leave.
    """

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        """In a fork, which has none of the threads."""
        self._changed = threading.Condition()
        self._depths: dict[int, int] = {}  # of the threads that compute: how often they have entered
        self._is_over = False

    def begin(self) -> None:
        """Begin to compute."""
        me = threading.get_ident()
        if me == threading.main_thread().ident:
            return
        with self._changed:
            if me in self._depths or not self._is_over:
                self._depths[me] = self._depths.get(me, 0) + 1
                return
        _stay()

    def pause(self) -> None:
        """To be called now and then by what takes long."""
        if self._is_over and threading.get_ident() != threading.main_thread().ident:
            self._stop()
            _stay()

    def leave(self) -> None:
        """Compute no more."""
        me = threading.get_ident()
        if me not in self._depths:
            return
        self._depths[me] -= 1
        if not self._depths[me]:
            self._stop()
            if self._is_over:
                _stay()

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *error: object) -> None:
        self.leave()

    def _stop(self) -> None:
        with self._changed:
            self._depths.pop(threading.get_ident(), None)
            self._changed.notify_all()

    def end(self) -> None:
        """Wait until no thread but the main one computes, for a while."""
        with suppress(KeyboardInterrupt):
            with self._changed:
                self._is_over = True
                if self._depths:
                    self._changed.wait_for(lambda: not self._depths, _PATIENCE)
            time.sleep(_LAST_LINES)


def _stay() -> None:
    threading.Event().wait()


NATIVE_WORK = _NativeWork()
"""Held by threads that compute; see `_NativeWork`."""

atexit.register(NATIVE_WORK.end)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=NATIVE_WORK._begin_anew)
