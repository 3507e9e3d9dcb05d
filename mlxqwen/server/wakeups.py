"""Waiting for replies on an asyncio loop: the engine's thread wakes it after each step, no thread waits in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection

from mlxqwen.engine.handle import Handle
from mlxqwen.engine.scheduler import Scheduler

__all__ = ["TICK", "Wakeups"]

TICK = 1.0
"""Seconds after which whoever waits is woken though nothing has come, to look at the clock."""

_PAUSE, _LONGEST_PAUSE = 4e-4, 2e-2
"""Seconds between two deliveries: for each who was woken, whose tokens take some 40 us to send, and at most."""


class Wakeups:
    """Wakes the coroutines that wait for replies of one scheduler, whichever loops they run on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._loops: dict[asyncio.AbstractEventLoop, _Waiting] = {}
        self._stop = scheduler.driver.listen(self._notify)

    def start(self) -> None:
        """Let the engine's thread take the steps."""
        self._scheduler.driver.start(self._scheduler)

    def close(self) -> None:
        """Wake nobody any more."""
        self._stop()

    async def wait(self, handles: Collection[Handle]) -> bool:
        """Wait until one of `handles` is ready, or about a second → whether one is."""
        loop = asyncio.get_running_loop()
        waiting = self._loops.get(loop)
        if waiting is None:  # only this loop's thread adds and removes it
            with self._lock:
                waiting = self._loops[loop] = _Waiting()
        future = loop.create_future()
        waiting.futures[future] = handles
        if not waiting.ticks:
            waiting.ticks = True
            loop.call_later(TICK, self._tick, loop, waiting)
        try:
            # Registered first and looked at then: a step that ends in between is not missed.
            return _is_any_ready(handles) or await future
        finally:
            waiting.futures.pop(future, None)

    def _notify(self) -> None:
        """Called by other threads: let each loop look for replies that are ready."""
        with self._lock:
            for loop, waiting in list(self._loops.items()):
                if waiting.futures and not waiting.is_notified:
                    waiting.is_notified = True
                    try:
                        loop.call_soon_threadsafe(_deliver_in_time, loop, waiting)
                    except RuntimeError:  # the loop is closed
                        del self._loops[loop]

    def _tick(self, loop: asyncio.AbstractEventLoop, waiting: _Waiting) -> None:
        waiting.ticks = bool(waiting.futures)
        for future in list(waiting.futures):
            if not future.done():
                future.set_result(False)
        if waiting.ticks:
            loop.call_later(TICK, self._tick, loop, waiting)
            return
        with self._lock:
            if self._loops.get(loop) is waiting and not waiting.futures:
                del self._loops[loop]


class _Waiting:
    """Who waits on one loop."""

    def __init__(self) -> None:
        self.futures: dict[asyncio.Future[bool], Collection[Handle]] = {}
        self.is_notified = False
        self.ticks = False
        self.next_delivery = 0.0  # in seconds of the loop's clock


def _deliver_in_time(loop: asyncio.AbstractEventLoop, waiting: _Waiting) -> None:
    """Deliver at once, or so long after the last time that what it costs is a small share of the time."""
    if loop.time() >= waiting.next_delivery:
        _deliver(loop, waiting)
    else:
        loop.call_at(waiting.next_delivery, _deliver, loop, waiting)


def _deliver(loop: asyncio.AbstractEventLoop, waiting: _Waiting) -> None:
    waiting.is_notified = False
    woken = 0
    for future, handles in list(waiting.futures.items()):
        if not future.done() and _is_any_ready(handles):
            future.set_result(True)
            woken += 1
    waiting.next_delivery = loop.time() + min(woken * _PAUSE, _LONGEST_PAUSE)


def _is_any_ready(handles: Collection[Handle]) -> bool:
    for handle in handles:  # noqa: SIM110 -- a generator costs more than the one handle that there mostly is
        if handle.is_ready:
            return True
    return False
