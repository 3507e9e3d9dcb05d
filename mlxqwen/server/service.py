"""What all endpoints share: the models, the load, and one way from a body to its reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from mlxqwen.cache.prefix_store import PrefixStore
from mlxqwen.engine.memory import array_bytes
from mlxqwen.errors import InsufficientMemoryError, MlxqwenError, one_line
from mlxqwen.server.access import error_response
from mlxqwen.server.background import BackgroundRuns
from mlxqwen.server.bodies import Form, parse_body, read_body
from mlxqwen.server.chat_request import Prepared
from mlxqwen.server.errors import ApiError, api_error
from mlxqwen.server.event_stream import EventStream, KeepAlive
from mlxqwen.server.leases import Lease
from mlxqwen.server.load import Load
from mlxqwen.server.metrics import Gauges, Metrics
from mlxqwen.server.models import ServedModel
from mlxqwen.server.registry import ModelRegistry
from mlxqwen.server.replies import Replies
from mlxqwen.server.responses_store import ResponseStore
from mlxqwen.server.settings import ServerSettings
from mlxqwen.server.structured import may_compile
from mlxqwen.server.wakeups import TICK

__all__ = ["IGNORED_HEADER", "Presenter", "Service", "endpoint", "until_gone"]

logger = logging.getLogger("mlxqwen.server")

IGNORED_HEADER = "x-mlxqwen-ignored"
_THREADS = 4
_COMPILING_THREADS = 4
_BODIES = 8  # of the largest that are read at once
_MOST_LOGGED = 10_000  # characters
_FormT = TypeVar("_FormT", bound=Form)
_T = TypeVar("_T")


class Presenter(Protocol):
    """Gives the replies to one request the form of its API."""

    @property
    def comment(self) -> bytes:
        """What says that the reply is on its way, while nothing else does."""

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The reply that is not streamed."""

    def chunks(self, replies: Replies) -> AsyncGenerator[bytes]:
        """The events of the reply that is streamed; empty bytes about every second without any."""

    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream with an error."""


class Service:
    """The state of one server.

    Args:
        models: that it answers with.
        settings: how.
    """

    def __init__(self, models: ModelRegistry, settings: ServerSettings) -> None:
        self.settings = settings
        self.models = models
        self.load = Load(settings.max_running, settings.max_queue)
        self.metrics = Metrics()
        self.responses = ResponseStore()
        self.background = BackgroundRuns()
        self.metrics.watch(self._gauges)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="mlxqwen request")
        self._compiling = ThreadPoolExecutor(_COMPILING_THREADS, thread_name_prefix="mlxqwen grammar")

    def close(self) -> None:
        """Let the threads and the models go; engines that were not loaded here stay open."""
        for pool in (self._threads, self._compiling):
            pool.shutdown(wait=False, cancel_futures=True)
        self.models.close()

    async def in_thread(self, work: Callable[[], _T], *, compiles: bool = False) -> _T:
        """Do `work` in one of a few threads, so that the loop goes on.

        Args:
            compiles: whether it may compile grammars, which may take many seconds; such work has other threads.
        """
        pool = self._compiling if compiles else self._threads
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def lease(self, http: HttpRequest, name: str | None, deadline: float | None = None) -> Lease:
        """The use of a model, which is loaded if need be.

        Args:
            http: the request, whose client may leave meanwhile.
            name: the model's, or None.
            deadline: when to give up, in seconds of `time.monotonic`; None for never.

        Raises:
            ApiError: there is no such model, it cannot be loaded, or not in time.
        """
        lease = self.models.lease(self.models.find(name))
        if lease.loading is None:
            return lease
        try:
            loading = asyncio.wrap_future(lease.loading)
            loading.add_done_callback(lambda one: one.cancelled() or one.exception())  # perhaps nobody else asks for it
            await until_gone(http, self._until_done(loading, deadline))
        except BaseException:
            lease.release()
            raise
        return lease

    async def _until_done(self, loading: asyncio.Future[None], deadline: float | None) -> None:
        while not loading.done():
            self.load.check_time(deadline)
            await asyncio.wait({loading}, timeout=TICK)
        loading.result()

    @asynccontextmanager
    async def model(self, http: HttpRequest, name: str | None) -> AsyncIterator[ServedModel]:
        """A model while it is used. Raises what `lease` raises."""
        lease = await self.lease(http, name)
        try:
            yield lease.model
        finally:
            lease.release()

    async def form(self, http: HttpRequest, form: type[_FormT]) -> _FormT:
        """The fields of a request's body."""
        settings, held = self.settings, 0

        def take(count: int) -> None:
            nonlocal held
            self.load.take_bytes(count, _BODIES * settings.max_body)
            held += count

        try:
            body = await read_body(
                http, most=settings.max_body, seconds=settings.body_seconds, take=take, limits=self.load.bodies
            )
            return await self._parsed(body, form)
        except ApiError as error:
            if error.status == 408:
                self.load.check_open()
            raise
        finally:
            self.load.body_bytes -= held

    async def _parsed(self, body: bytes, form: type[_FormT]) -> _FormT:
        settings = self.settings
        if settings.log_content:
            logger.info("asked: %s", one_line(body.decode("utf-8", "replace"), _MOST_LOGGED))
        return await self.in_thread(lambda: parse_body(body, form))

    async def answer(
        self,
        http: HttpRequest,
        form: type[_FormT],
        prepare: Callable[[_FormT, ServedModel], Prepared],
        present: Callable[[_FormT, Prepared], Presenter],
        *,
        look_up: Callable[[_FormT], None] | None = None,
        in_background: Callable[[_FormT, Any, Replies, AsyncGenerator[bytes]], Awaitable[Response]] | None = None,
    ) -> Response:
        """Read, check and render a request; let the engine answer; send it whole or streamed.

        Args:
            http: the request.
            form: of its body; has `model` and `stream`.
            prepare: called in a thread; makes the engine's requests.
            present: makes what gives the replies their form.
            look_up: called before `prepare`, by the loop's thread: takes from the server's state what that needs.
            in_background: given the fields, what `present` made, the replies and their events: answers at once, and
                closes them later, where the fields ask for that.
        """
        load, settings = self.load, self.settings
        deadline = None if settings.timeout is None else time.monotonic() + settings.timeout
        load.take(1)
        taken, lease = 1, None
        try:
            fields = await self.form(http, form)
            lease = await self.lease(http, getattr(fields, "model", None), deadline)
            model = lease.model
            if look_up is not None:
                look_up(fields)
            prepared = await self.in_thread(lambda: prepare(fields, model), compiles=may_compile(fields))
            load.take(len(prepared.requests) - 1, held=1)
            taken = 0  # from here on the replies give it back
            replies = await self._replies(prepared, lease, deadline)
        except BaseException:
            load.leave(taken)
            if lease is not None:
                lease.release()
            raise
        try:
            headers = self._told(http, prepared)
            presenter = present(fields, prepared)
            http.scope.setdefault("mlxqwen", {})["replies"] = replies
            if in_background is not None and getattr(fields, "background", None):
                events = self._events(presenter, replies, http, is_followed=False)
                begun = await in_background(fields, presenter, replies, events)
                begun.headers.update(headers)
                return begun
            if getattr(fields, "stream", None):
                events = self._events(presenter, replies, http)
                return EventStream(events, close=replies.close, stall_seconds=settings.stall_seconds, headers=headers)
            response = JSONResponse(await until_gone(http, presenter.whole(replies)), headers=headers)
        except BaseException:
            replies.close()
            raise
        replies.close()
        return response

    async def _replies(self, prepared: Prepared, lease: Lease, deadline: float | None) -> Replies:
        """Submit a request; one that does not fit beside models that nobody uses is submitted again without them."""
        while True:
            try:
                return Replies(prepared, lease, self.load, self.metrics, deadline)
            except InsufficientMemoryError:  # room among the replies was given back
                if not await self.in_thread(lambda: self.models.unload_least_recently_used(prepared.model)):
                    raise
                self.load.take(len(prepared.requests))

    async def _events(
        self, presenter: Presenter, replies: Replies, http: HttpRequest, *, is_followed: bool = True
    ) -> AsyncGenerator[bytes]:
        """The events of a reply; where a client follows them, with what says that it is on its way."""
        alive = KeepAlive(self.settings.keepalive_seconds, self.settings.stuck_seconds, replies.steps)
        chunks = presenter.chunks(replies)
        try:
            async for piece in chunks:
                if piece:
                    alive.sent()
                    yield piece
                elif is_followed and alive.is_due():
                    yield presenter.comment
        except Exception as error:
            log_failure(error)
            replies.close()
            told = http.scope["mlxqwen"]["error"] = api_error(error)
            yield presenter.failure(told)
        finally:
            await chunks.aclose()

    def _told(self, http: HttpRequest, prepared: Prepared) -> dict[str, str]:
        """The header that says what was left out of the request."""
        if not prepared.notes:
            return {}
        notes = ", ".join(prepared.notes[:20])
        http.scope.setdefault("mlxqwen", {})["ignored"] = notes
        return {IGNORED_HEADER: notes.encode("ascii", "replace").decode()}

    def _gauges(self) -> Gauges:
        schedulers = [model.engine.scheduler for model in self.models.loaded]
        stores: list[PrefixStore] = [one.store for one in schedulers]
        return {
            "running_replies": ("Replies that decode", float(sum(len(one.running) for one in schedulers))),
            "reading_replies": ("Replies whose prompts are read", float(sum(len(one.reading) for one in schedulers))),
            "waiting_replies": ("Replies that have not begun", float(sum(len(one.waiting) for one in schedulers))),
            "cache_bytes": ("Bytes of caches in use", float(sum(one.cache_bytes for one in schedulers))),
            "array_bytes": ("Bytes of all arrays, weights and caches included", float(array_bytes())),
            "prefix_cache_bytes": ("Bytes of what was read and is kept", float(sum(one.held_nbytes for one in stores))),
            "model_loaded": (
                "Whether a model is loaded",
                {one.name: float(one.state == "loaded") for one in self.models.entries},
            ),
        }


def log_failure(error: BaseException) -> None:
    """Log an error that is not the client's; what a client did wrong it is told itself."""
    told = api_error(error)
    if told.status == 500:
        unexpected = None if isinstance(error, MlxqwenError | ApiError) else error
        logger.error("request failed: %s: %s", type(error).__name__, error, exc_info=unexpected)


async def until_gone(http: HttpRequest, work: Awaitable[_T]) -> _T:
    """The result of `work`, which is cancelled when the client leaves. Raises `ClientDisconnect` then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def endpoint(handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
    """A handler whose errors are told in the form of its API."""

    async def told(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            log_failure(error)
            return error_response(http.scope, api_error(error))

    return told
