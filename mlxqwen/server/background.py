"""Responses in the background: they go on whether or not anybody listens, and may be followed from any event on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from mlxqwen.server.errors import ApiError
from mlxqwen.server.event_stream import COMMENT, KeepAlive
from mlxqwen.server.wakeups import TICK

__all__ = ["Background", "BackgroundRuns"]

_MOST_LOGGED = 64
_MOST_BYTES = 4 * 2**20  # of one request
_MOST_BYTES_OF_ALL = 64 * 2**20
_DONE = b"data: [DONE]"


class Background:
    """One response in the background.

    Args:
        events: what makes it, as a stream would get it; taken to its end.
        is_logged: whether its events are kept for who follows it.
        at_end: called once it is over, in every case.
        nbytes: of the request, which is held as long as it runs.
        steps: how many steps the engine has begun.

    Attributes:
        steps: as given.
        nbytes: what it holds: the request, and the events.
        events: those so far, each by the number in its place, if they are kept.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        is_logged: bool,
        nbytes: int,
        at_end: Callable[[], None],
        steps: Callable[[], int],
    ) -> None:
        self.steps = steps
        self._source = events
        self.is_logged = is_logged
        self.nbytes = nbytes
        self._at_end = at_end
        self._is_over = False
        self._changed = asyncio.Event()
        self.events: list[bytes] = []

    async def begin(self) -> None:
        """Take what is there before the first token."""
        try:
            self._take(await anext(self._source))
        except BaseException:
            await self._end()
            raise

    async def run(self) -> None:
        """Take all the rest."""
        try:
            async for piece in self._source:
                self._take(piece)
        finally:
            await self._end()

    async def _end(self) -> None:
        await self._source.aclose()
        self._is_over = True
        self._at_end()
        self._changed.set()

    def _take(self, piece: bytes) -> None:
        if not self.is_logged:
            return
        events = [one + b"\n\n" for one in piece.split(b"\n\n") if one and one != _DONE]
        self.events += events
        self.nbytes += sum(map(len, events))
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, after: int, alive: KeepAlive) -> AsyncGenerator[bytes]:
        """Yield the events behind number `after`, those that are there and those that come.

        Args:
            after: the number of the last event that the client has; -1 for none.
            alive: says when a comment is due, as nothing else comes.
        """
        place = after + 1
        while True:
            changed = self._changed
            while place < len(self.events):
                alive.sent()
                yield self.events[place]
                place += 1
            if self._is_over:
                yield _DONE + b"\n\n"
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), TICK)
                continue
            if alive.is_due():
                yield COMMENT


class BackgroundRuns:
    """The responses that run in the background. One thread, that of the loop, uses it."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], Background] = {}

    def check_room(self, nbytes: int, *, is_logged: bool) -> None:
        """Check that one more may run.

        Args:
            nbytes: of its request.
            is_logged: whether its events are kept.

        Raises:
            ApiError: 400 for a request that is too large, 429 if those that run hold too much.
        """
        if nbytes > _MOST_BYTES:
            raise ApiError(
                400,
                f"background: found a request of {nbytes:,} bytes, expected at most {_MOST_BYTES:,}: leave out "
                "background",
                code="invalid_value",
                param="background",
            )
        held = sum(one.nbytes for one in self._tasks.values())
        if held + nbytes > _MOST_BYTES_OF_ALL:
            raise ApiError(
                429,
                f"background: responses that run hold {held:,} bytes, expected room for {nbytes:,} more of "
                f"{_MOST_BYTES_OF_ALL:,}: wait, or ask for it without background",
                code="queue_full",
                param="background",
                headers={"retry-after": "1"},
            )
        logged = sum(one.is_logged for one in self._tasks.values())
        if is_logged and logged >= _MOST_LOGGED:
            raise ApiError(
                429,
                f"background: {logged} responses run whose events are kept, expected fewer: leave out stream, or wait",
                code="queue_full",
                param="background",
                headers={"retry-after": "1"},
            )

    async def start(self, run: Background) -> None:
        """Begin a response, and let it go on by itself."""
        await run.begin()
        task = asyncio.get_running_loop().create_task(run.run())
        self._tasks[task] = run  # the loop holds tasks weakly
        task.add_done_callback(self._tasks.pop)
