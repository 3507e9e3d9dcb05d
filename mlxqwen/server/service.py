"""What all endpoints share: the models, the load, bodies, and the errors that are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mlxqwen.cache.prefix_store import PrefixStore
from mlxqwen.engine.memory import array_bytes
from mlxqwen.errors import MlxqwenError, one_line
from mlxqwen.server.access import error_response
from mlxqwen.server.background import BackgroundRuns
from mlxqwen.server.bodies import Form, parse_body, read_body
from mlxqwen.server.errors import ApiError, api_error
from mlxqwen.server.leases import Lease
from mlxqwen.server.load import Load
from mlxqwen.server.metrics import Gauges, Metrics
from mlxqwen.server.models import ServedModel
from mlxqwen.server.registry import ModelRegistry
from mlxqwen.server.responses_store import ResponseStore
from mlxqwen.server.settings import ServerSettings
from mlxqwen.server.wakeups import TICK

__all__ = ["Service", "endpoint", "log_failure", "until_gone"]

logger = logging.getLogger("mlxqwen.server")

_THREADS = 4
_COMPILING_THREADS = 4
_BODIES = 8  # of the largest that are read at once
_SMALL_BODY = 1 << 12  # bytes: mostly parsed in less time than a thread takes to begin, and in 10 ms at worst
_MOST_LOGGED = 10_000  # characters
_FormT = TypeVar("_FormT", bound=Form)
_T = TypeVar("_T")


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

    async def loaded(self, lease: Lease, deadline: float | None = None) -> ServedModel:
        """The model of a lease, once it is there.

        Args:
            lease: of the model; stays the caller's.
            deadline: when to give up, in seconds of `time.monotonic`; None for never.

        Raises:
            ApiError: it cannot be loaded, or not in time.
        """
        if lease.loading is not None:
            loading = asyncio.wrap_future(lease.loading)
            loading.add_done_callback(lambda one: one.cancelled() or one.exception())  # perhaps nobody else asks for it
            while not loading.done():
                self.load.check_time(deadline)
                await asyncio.wait({loading}, timeout=TICK)
            loading.result()
        return lease.model

    @asynccontextmanager
    async def model(self, http: HttpRequest, name: str | None) -> AsyncIterator[ServedModel]:
        """A model while it is used, loaded if need be. Raises `ApiError` if there is none, or it cannot be loaded."""
        lease = self.models.lease(self.models.find(name))
        try:
            yield await until_gone(http, self.loaded(lease))
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
        if len(body) <= _SMALL_BODY:
            return parse_body(body, form)
        return await self.in_thread(lambda: parse_body(body, form))

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
    """Log an error that is not the client's, unless it has been; what a client did wrong it is told itself."""
    told = api_error(error)
    if told.status == 500 and not told.is_logged:
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
