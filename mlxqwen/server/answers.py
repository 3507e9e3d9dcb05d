"""One way from a body to its reply: it is read, waits for its model, is rendered and submitted, and sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from mlxqwen.engine.room import missing_room
from mlxqwen.server.bodies import Form
from mlxqwen.server.chat_request import Prepared
from mlxqwen.server.errors import ApiError, api_error
from mlxqwen.server.event_stream import EventStream, KeepAlive
from mlxqwen.server.leases import Lease
from mlxqwen.server.models import ServedModel
from mlxqwen.server.presenter import Presenter
from mlxqwen.server.replies import Replies
from mlxqwen.server.service import Service, log_failure, until_gone
from mlxqwen.server.structured import may_compile
from mlxqwen.server.wakeups import TICK

__all__ = ["IGNORED_HEADER", "Beginning", "answer"]

IGNORED_HEADER = "x-mlxqwen-ignored"
_FormT = TypeVar("_FormT", bound=Form)
_PresenterT = TypeVar("_PresenterT", bound=Presenter)


class Beginning(Generic[_FormT]):
    """A request on its way to the engine: it waits for its model, is rendered, and is submitted.

    Until then it holds room for its replies and the use of its model. Closing it gives back what it holds, and ends the
    replies that it came to.

    Args:
        service: that answers.
        http: the request.
        prepare: called in a thread; makes the engine's requests.

    Attributes:
        prepared: what it came to; None while it waits.
        replies: that it came to; None while it waits.

    Raises:
        ApiError: there is no room for a reply, or the server ends.
    """

    def __init__(self, service: Service, http: HttpRequest, prepare: Callable[[_FormT, ServedModel], Prepared]) -> None:
        timeout = service.settings.timeout
        self._service = service
        self._http = http
        self._prepare = prepare
        self._deadline = None if timeout is None else time.monotonic() + timeout
        service.load.take(1)
        self._held = 1
        self._lease: Lease | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._waits = 0
        self._arrived: float | None = http.scope.get("mlxqwen", {}).get("began")
        self._seconds_waited = 0.0
        self.prepared: Prepared | None = None
        self.replies: Replies | None = None

    def lease(self, name: str | None) -> str:
        """Use the model of this name, which is loaded if need be → its own name. Raises `ApiError` if there is none."""
        self._lease = self._service.models.lease(self._service.models.find(name))
        return self._lease.entry.name

    async def begin(self, fields: _FormT, presenter: Presenter, patience: float | None) -> None:
        """Come to replies; where the model or its memory is not there yet, perhaps after `patience` seconds.

        Raises:
            ApiError, MlxqwenError: it cannot be answered, or not in time.
            ClientDisconnect: the client has gone.
        """
        assert self._lease is not None
        if self._lease.loading is None and await self._submit(fields, presenter, self._lease):
            return
        self._waiting = asyncio.ensure_future(self._wait_and_submit(fields, presenter))
        await until_gone(self._http, self.wait(patience))

    async def _wait_and_submit(self, fields: _FormT, presenter: Presenter) -> None:
        while True:
            assert self._lease is not None
            began = time.perf_counter()
            await self._service.loaded(self._lease, self._deadline)
            self._seconds_waited += time.perf_counter() - began
            if await self._submit(fields, presenter, self._lease):
                return

    async def _submit(self, fields: _FormT, presenter: Presenter, lease: Lease) -> bool:
        """Render and submit it → whether that was done; otherwise it waits for memory, with a new lease."""
        service, model = self._service, lease.model
        prepared = await service.in_thread(lambda: self._prepare(fields, model), compiles=may_compile(fields))
        presenter.begin(prepared)
        service.load.take(len(prepared.requests) - self._held, held=self._held)
        self._held = len(prepared.requests)
        if room := missing_room(model.engine.scheduler, prepared.requests):
            lease.release()
            self._lease = service.models.lease(lease.entry, room)
            return False
        self._held = 0  # from here on the replies give it back
        self.replies = Replies(
            prepared,
            lease,
            service.load,
            service.metrics,
            self._deadline,
            arrived=self._arrived,
            seconds_waited=self._seconds_waited,
        )
        if self._waiting is not None:
            service.metrics.model_wait.observe(self._seconds_waited)
        self.prepared = prepared
        return True

    async def wait(self, seconds: float | None) -> None:
        """Wait for the replies, at most `seconds`. Raises what keeps it from coming to any."""
        self._waits += 1
        waiting = self._waiting
        if waiting is None:
            return
        await asyncio.wait({waiting}, timeout=seconds)
        if waiting.cancelled():
            raise ApiError(400, "response: cancelled before its model was there", code="cancelled")
        if waiting.done():
            waiting.result()

    def give_up(self) -> None:
        """Wait no more."""
        if self._waiting is not None:
            self._waiting.cancel()

    def steps(self) -> int:
        """A number that grows while the request goes on: signs of waiting, then steps of the engine."""
        return self._waits if self.replies is None else self._waits + self.replies.steps()

    def told(self) -> dict[str, str]:
        """The header that says what was left out of the request, as far as that is known; the log has it, too."""
        details = self._http.scope.setdefault("mlxqwen", {})
        if self.replies is not None:
            details["replies"] = self.replies
        if self.prepared is None or not self.prepared.notes:
            return {}
        notes = details["ignored"] = ", ".join(self.prepared.notes[:20])
        return {IGNORED_HEADER: notes.encode("ascii", "replace").decode()}

    def close(self) -> None:
        """Give back what it holds, and end the replies that are not over."""
        if self.replies is not None:
            self.replies.close()
            return
        if self._waiting is not None:
            self._service.metrics.aborted.inc(self._held)
            if not self._waiting.done():
                self._waiting.cancel()
                self._http.scope.setdefault("mlxqwen", {})["is_cut"] = True
            elif not self._waiting.cancelled():
                self._waiting.exception()  # perhaps nobody else asks for it
        self._service.load.leave(self._held)
        self._held = 0
        if self._lease is not None:
            self._lease.release()


async def answer(
    service: Service,
    http: HttpRequest,
    form: type[_FormT],
    prepare: Callable[[_FormT, ServedModel], Prepared],
    present: Callable[[_FormT, str], _PresenterT],
    *,
    look_up: Callable[[_FormT], None] | None = None,
    in_background: Callable[[_FormT, _PresenterT, Beginning[_FormT], AsyncGenerator[bytes]], Awaitable[Response]]
    | None = None,
) -> Response:
    """Read, check and render a request; let the engine answer; send it whole or streamed.

    A stream whose model is not there begins before it is: a load may take longer than clients wait without a sign.

    Args:
        service: that answers.
        http: the request.
        form: of its body; has `model` and `stream`.
        prepare: called in a thread; makes the engine's requests.
        present: given the fields and the model's name, makes what gives the replies their form.
        look_up: called before `prepare`, by the loop's thread: takes from the server's state what that needs.
        in_background: given the fields, what `present` made, the request and the events of its reply: answers at once,
            and closes the request later, where the fields ask for that.
    """
    settings = service.settings
    beginning = Beginning(service, http, prepare)
    try:
        fields = await service.form(http, form)
        if look_up is not None:
            look_up(fields)
        presenter = present(fields, beginning.lease(getattr(fields, "model", None)))
        runs_on = in_background is not None and getattr(fields, "background", None)
        is_streamed = bool(getattr(fields, "stream", None))
        await beginning.begin(fields, presenter, settings.keepalive_seconds if runs_on or is_streamed else None)
        headers = beginning.told()
        if in_background is not None and runs_on:
            events = _events(service, http, beginning, presenter, is_followed=False)
            begun = await in_background(fields, presenter, beginning, events)
            begun.headers.update(headers)
            return begun
        if is_streamed:
            events = _events(service, http, beginning, presenter)
            return EventStream(events, close=beginning.close, stall_seconds=settings.stall_seconds, headers=headers)
        assert beginning.replies is not None
        response = JSONResponse(await until_gone(http, presenter.whole(beginning.replies)), headers=headers)
    except BaseException:
        beginning.close()
        raise
    beginning.close()
    return response


async def _events(
    service: Service,
    http: HttpRequest,
    beginning: Beginning[Any],
    presenter: Presenter,
    *,
    is_followed: bool = True,
) -> AsyncGenerator[bytes]:
    """The events of a reply; where a client follows them, with what says that it is on its way."""
    settings, chunks = service.settings, None
    try:
        has_waited = False
        while beginning.replies is None:
            if is_followed or not has_waited:
                yield presenter.waiting(beginning.give_up)
            has_waited = True
            await beginning.wait(max(settings.keepalive_seconds, TICK))
        if has_waited and is_followed:
            beginning.told()
        replies = beginning.replies
        alive = KeepAlive(settings.keepalive_seconds, settings.stuck_seconds, replies.steps)
        chunks = presenter.chunks(replies)
        async for piece in chunks:
            if piece:
                alive.sent()
                yield piece
            elif is_followed and alive.is_due():
                yield presenter.comment()
    except Exception as error:
        log_failure(error)
        beginning.close()
        told = http.scope["mlxqwen"]["error"] = api_error(error)
        yield presenter.failure(told)
    finally:
        if chunks is not None:
            await chunks.aclose()
        presenter.close()
