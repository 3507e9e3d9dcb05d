"""Server-sent events: pieces of a reply as they come, with comments while nothing does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from pydantic_core import to_json as encode
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

__all__ = ["COMMENT", "EventStream", "KeepAlive", "event", "in_time", "to_json"]

COMMENT = b": waiting\n\n"


def to_json(value: object) -> str:
    """A value as JSON on one line."""
    return encode(value).decode()


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event: JSON, with its name where the form gives it one."""
    text = f"data: {to_json(data)}\n\n"
    return (text if name is None else f"event: {name}\n{text}").encode()


class KeepAlive:
    """When a comment is due: nothing was sent for a while, and the engine still takes steps.

    Args:
        seconds: how long a stream is silent.
        stuck_seconds: how long an engine may take for a step before nobody is told any more that it works.
        steps: how many steps the engine has begun.
    """

    def __init__(self, seconds: float, stuck_seconds: float, steps: Callable[[], int]) -> None:
        self._seconds = seconds
        self._stuck_seconds = stuck_seconds
        self._steps = steps
        self._sent = self._moved = time.monotonic()
        self._seen = steps()

    def sent(self) -> None:
        """Something was sent."""
        self._sent = time.monotonic()

    def is_due(self) -> bool:
        """Whether to send a comment now; from then on it counts as sent."""
        now, steps = time.monotonic(), self._steps()
        if steps != self._seen:
            self._seen, self._moved = steps, now
        if now - self._sent < self._seconds or now - self._moved > self._stuck_seconds:
            return False
        self._sent = now
        return True


class EventStream(StreamingResponse):
    """Sends events until they end, the client leaves, or it does not read for too long.

    Args:
        events: encoded; closed in every case.
        close: called at the end in every case, even if nothing was sent.
        stall_seconds: how long the client may leave the buffer full.
        headers: further ones.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        close: Callable[[], None],
        stall_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        own = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers={**own, **(headers or {})}, media_type="text/event-stream")
        self._events = events
        self._close = close
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, each within the time that the client has to read, or until it leaves."""
        gone = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            async with in_time(send, self._stall_seconds, until=gone) as send_in_time:
                await self.stream_response(send_in_time)
        except TimeoutError:
            if not gone.done():
                raise
        finally:
            gone.cancel()
            self._close()
            await self._events.aclose()


@asynccontextmanager
async def in_time(send: Send, seconds: float, *, until: asyncio.Future[None] | None = None) -> AsyncIterator[Send]:
    """`send` as it is, but the block ends with `TimeoutError` where a single call takes more than `seconds`.

    One timer serves all calls: it fires at most every `seconds`, and then looks at the call that is under way.

    Args:
        send: called for each message.
        seconds: that a call may take.
        until: the block ends with `TimeoutError`, too, once this is done.
    """
    loop = asyncio.get_running_loop()
    began: float | None = None
    is_over = False
    timer: asyncio.TimerHandle

    async def send_in_time(message: Message) -> None:
        nonlocal began
        began = loop.time()
        await send(message)
        began = None

    def look() -> None:
        nonlocal timer
        now = loop.time()
        due = (now if began is None else began) + seconds
        if due > now:
            timer = loop.call_at(due, look)
        else:
            limit.reschedule(now)

    def end(_: object) -> None:
        if not is_over:  # the loop calls this a moment after `until` is done
            limit.reschedule(loop.time())

    timer = loop.call_later(seconds, look)
    until = loop.create_future() if until is None else until
    try:
        async with asyncio.timeout(None) as limit:
            until.add_done_callback(end)
            yield send_in_time
    finally:
        is_over = True
        until.remove_done_callback(end)
        timer.cancel()
