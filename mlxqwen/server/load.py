"""How much a server has to do: replies that wait and run, what it refuses beyond that, and its end."""

from __future__ import annotations

import asyncio
import time

from mlxqwen.server.errors import ApiError

__all__ = ["Load"]


class Load:
    """Counts replies from the moment that room is taken for them. One thread, that of the loop, uses it.

    Args:
        max_running, max_queue: how many may run, and how many may wait.

    Attributes:
        replies: how many run or wait.
        requests: how many HTTP requests are under way.
        is_draining: whether new requests are refused, as the server is to end.
        has_ended: whether replies that are under way are ended, too.
        body_bytes: bytes of all bodies that are being read.
        bodies: how long each of these may take; none of them is waited for once the server is to end.
    """

    def __init__(self, max_running: int, max_queue: int) -> None:
        self.max_running = max_running
        self.most = max_running + max_queue
        self.replies = 0
        self.requests = 0
        self.is_draining = False
        self.has_ended = False
        self.body_bytes = 0
        self.bodies: set[asyncio.Timeout] = set()

    def take_bytes(self, count: int, most: int) -> None:
        """Take room for so many bytes of a body. Raises `ApiError` 429 if all bodies had more than `most`."""
        if self.body_bytes + count > most:
            raise ApiError(
                429,
                f"server: {self.body_bytes:,} bytes of requests are being read, expected room for more of {most:,}",
                code="bodies_full",
                headers={"retry-after": "1"},
            )
        self.body_bytes += count

    @property
    def running(self) -> int:
        """Replies that may run now."""
        return min(self.replies, self.max_running)

    @property
    def waiting(self) -> int:
        """Replies beyond those."""
        return self.replies - self.running

    def take(self, count: int, *, held: int = 0) -> None:
        """Take room for `count` replies, of a request that holds room for `held` already.

        Raises `ApiError`: 429 if there is no room, 400 if there never is, 503 once the server is to end.
        """
        if not held:
            self.check_open()
        if count + held > self.most:
            found = f"n: found {count + held}, expected at most the {self.most} replies that this server takes"
            raise ApiError(400, found, code="invalid_value", param="n")
        if self.replies + count > self.most:
            raise ApiError(
                429,
                f"server: {self.replies:,} replies run or wait, expected room for {count} more of {self.most:,}",
                code="queue_full",
                headers={"retry-after": "1"},
            )
        self.replies += count

    def leave(self, count: int) -> None:
        """Give room back."""
        self.replies -= count

    def check_open(self) -> None:
        """Raise `ApiError` 503 once the server is to end."""
        if self.is_draining:
            raise ApiError(
                503,
                "server: ends, expected no new requests",
                code="server_shutdown",
                headers={"retry-after": "5", "connection": "close"},
            )

    def check_time(self, deadline: float | None) -> None:
        """Raise `ApiError`: 504 once `deadline` (of `time.monotonic`) has passed, 503 once replies are ended."""
        if deadline is not None and time.monotonic() >= deadline:
            raise ApiError(504, "request: not over when its time was, expected it to be", code="deadline_exceeded")
        if self.has_ended:
            raise ApiError(503, "server: ends, expected this reply to be over", code="server_shutdown")

    async def drain(self, seconds: float, *, is_forced: asyncio.Event) -> None:
        """Refuse new requests and those that are half there, let those under way end for `seconds`, then end them.

        Args:
            seconds: how long.
            is_forced: set, nothing is waited for.
        """
        self.is_draining = True
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        for limit in self.bodies:
            limit.reschedule(loop.time())
        while (self.requests or self.replies) and loop.time() < until and not is_forced.is_set():
            await asyncio.sleep(0.05)
        self.has_ended = True
