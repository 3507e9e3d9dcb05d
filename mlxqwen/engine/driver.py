"""Which thread takes the steps of a scheduler: the first that waits, or a daemon thread from the second thread on.

MLX's streams belong to threads, and each thread that evaluates leaves an operating-system thread behind. So one thread
evaluates: the first that waits, while it is the only one; from then on a daemon thread, until the engine is closed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mlxqwen.daemons import Daemon
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.memory import account
from mlxqwen.errors import OptionError
from mlxqwen.forks import check_process

if TYPE_CHECKING:
    from mlxqwen.engine.scheduler import Scheduler

__all__ = ["PATIENCE", "Driver"]

logger = logging.getLogger("mlxqwen")

PATIENCE = 60.0
"""Seconds that a reply waits for another thread to read or close the replies that hold the memory it needs."""

_POLL = 0.02  # seconds between looks for memory that others give back


class Driver:
    """Takes the steps of one scheduler while a thread waits for a token. The daemon refers to the scheduler weakly."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._owner: weakref.ref[threading.Thread] | None = None
        self._changed = threading.Condition()
        self._daemon: Daemon | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_of_another_process(self) -> bool:
        """Whether this process was forked from the one that the driver belongs to."""
        return os.getpid() != self._process

    @property
    def has_daemon(self) -> bool:
        """Whether steps are taken though no thread waits for a token."""
        return self._daemon is not None and self._daemon.is_alive()

    def check_process(self) -> None:
        """Raise `OptionError` in a forked process, which lacks MLX's threads."""
        check_process()

    def drive(self, scheduler: Scheduler, generation: Generation) -> None:
        """Take a step, or wait for the thread that takes it; return once `generation` may have something new."""
        self.check_process()
        scheduler.check_outside_step()
        if scheduler.is_closed and not generation.is_over:
            scheduler.close()  # it was submitted meanwhile
            return
        if self.is_mine():
            if scheduler.step() or generation.records or generation.is_over:
                return
            if any(other.running or other.reading for other in account().schedulers if other is not scheduler):
                time.sleep(_POLL)  # another model's replies may give memory back
                return
            raise _cannot_go_on()
        with self._changed:
            while not (generation.records or generation.is_over or scheduler.is_closed):
                self._start(scheduler)
                self._changed.notify_all()  # a reply that was far ahead may go on
                self._changed.wait(timeout=min(1.0, PATIENCE))
                if all(one.idle_seconds > PATIENCE for one in account().schedulers):
                    raise _cannot_go_on()

    def start(self, scheduler: Scheduler) -> None:
        """Let the daemon thread take the steps from now on: for callers that wait in no thread."""
        self.check_process()
        with self._changed:
            self._start(scheduler)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after each step of the daemon thread, and when work comes or ends → what ends that.

        It is called by several threads, and has to return at once. What it raises is logged.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def wake(self) -> None:
        """Wake the threads that wait, as there is work."""
        _notify(self._changed)
        _tell(self._listeners)

    def wait_for_work(self, scheduler: Scheduler, timeout: float | None) -> bool:
        """Wait until `scheduler` has work, at most `timeout` seconds → whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: scheduler.has_work or scheduler.is_closed, timeout)

    def is_mine(self) -> bool:
        """Whether the calling thread takes the steps, perhaps from now on."""
        me = threading.current_thread()
        with self._changed:
            if self._owner is None:
                self._owner = weakref.ref(me)
            return self._owner() is me and self._daemon is None

    def _start(self, scheduler: Scheduler) -> None:
        if self._daemon is None or not self._daemon.is_alive():
            weakref.finalize(scheduler, _notify, self._changed).atexit = False
            arguments = (weakref.ref(scheduler), self._changed, self._listeners)
            self._daemon = Daemon(partial(_run, *arguments))


def _cannot_go_on() -> OptionError:
    return OptionError(
        "engine: found a reply that cannot go on, as nobody gives back the memory that it waits for",
        hint="Read or close the other replies of this process, or hold fewer tokens (--max-kv-size).",
    )


def _notify(changed: threading.Condition) -> None:
    with changed:
        changed.notify_all()


def _tell(listeners: list[Callable[[], None]]) -> None:
    for listener in tuple(listeners):
        try:
            listener()
        except Exception:  # it must not end the thread that takes the steps of all
            logger.exception("engine: a listener failed")


def _run(
    reference: weakref.ref[Scheduler],
    changed: threading.Condition,
    listeners: list[Callable[[], None]],
) -> None:
    """Take steps while there is work, else wait for it; end when the scheduler is gone or closed."""
    while True:
        scheduler = reference()
        if scheduler is None or scheduler.is_closed:
            return
        try:
            worked = scheduler.step()
        except BaseException as error:
            scheduler.fail_all(error)
            worked = False
        _tell(listeners)
        with changed:
            changed.notify_all()
            if not worked:
                timeout = _POLL if scheduler.has_work else 60.0
                del scheduler
                changed.wait(timeout)
            else:
                del scheduler
