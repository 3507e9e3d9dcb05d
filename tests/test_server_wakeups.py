"""When those who wait for replies are woken: at once, but not so often that waking them takes the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mlxqwen.server import wakeups


class _Loop:
    """A clock that is set by hand, and what was asked for later."""

    def __init__(self) -> None:
        self.now = 100.0
        self.later: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, function: Callable[..., object], *arguments: Any) -> None:
        self.later.append((when, lambda: function(*arguments)))


class _Ready:
    is_ready = True


def ready_streams(count: int) -> dict[asyncio.Future[bool], Any]:
    """So many coroutines that wait for replies which have something new."""
    return {asyncio.get_running_loop().create_future(): [_Ready()] for _ in range(count)}


def run(check: Callable[[], None]) -> None:
    """Where futures can be made."""

    async def checked() -> None:
        check()

    asyncio.run(checked())


@pytest.mark.parametrize(("streams", "milliseconds"), [(1, 0.4), (8, 3.2), (32, 12.8), (500, 20.0)])
def test_a_step_that_ends_soon_after_another_is_told_a_little_later(streams: int, milliseconds: float) -> None:
    loop: Any = _Loop()

    def check() -> None:
        waiting = wakeups._Waiting()
        waiting.futures = first = ready_streams(streams)
        wakeups._deliver_in_time(loop, waiting)
        assert all(future.done() for future in first)
        assert not loop.later

        waiting.futures = second = ready_streams(streams)
        loop.now += milliseconds / 2e3
        wakeups._deliver_in_time(loop, waiting)
        assert not any(future.done() for future in second)
        ((when, deliver),) = loop.later
        assert when == pytest.approx(100.0 + milliseconds / 1e3)
        loop.now = when
        deliver()
        assert all(future.done() for future in second)

    run(check)


def test_a_step_that_ends_long_after_another_is_told_at_once() -> None:
    loop: Any = _Loop()

    def check() -> None:
        waiting = wakeups._Waiting()
        for _ in range(3):
            waiting.futures = ready_streams(64)
            wakeups._deliver_in_time(loop, waiting)
            assert all(future.done() for future in waiting.futures)
            loop.now += 0.021
        assert not loop.later

    run(check)
