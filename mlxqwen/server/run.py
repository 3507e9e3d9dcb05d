"""Running a server: its socket, and the way it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from mlxqwen.server.app import make_app
from mlxqwen.server.connection import Connection
from mlxqwen.server.service import Service

__all__ = ["serve"]

logger = logging.getLogger("mlxqwen.server")

_ENDING = (signal.SIGINT, signal.SIGTERM)
_OPEN_FILES = 8192


class _Server(uvicorn.Server):
    """uvicorn's, which ends in peace: no new requests, those under way are waited for, then told that it ends."""

    should_exit: bool

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        on_ready: Callable[[int], None],
        on_signal: Callable[[int], None],
        leave: Callable[[int], object],
    ) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready
        self._on_signal = on_signal
        self._leave = leave
        self._is_forced = asyncio.Event()
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets and self.started:
            self._on_ready(sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.load.drain(self._service.settings.drain, is_forced=self._is_forced)
        await super().shutdown(sockets)

    def _tell_of_end(self) -> None:
        """Log what is waited for, if anything is."""
        count, seconds = self._service.load.requests, self._service.settings.drain
        if count and seconds:
            replies = "1 reply" if count == 1 else f"{count:,} replies"
            logger.info("ending: %s may go on for %g s; Ctrl-C again ends them now", replies, seconds)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the server; a second one does not wait for replies."""
        loop = asyncio.get_running_loop()

        def ask_to_end(number: int) -> None:
            self._on_signal(number)
            if self.should_exit:
                self._is_forced.set()
            else:
                self._tell_of_end()
            self.should_exit, self.signal = True, number

        def ask_again(number: int, frame: FrameType | None) -> None:
            self._on_signal(number)
            self._leave(self.signal or number)

        for number in _ENDING:
            loop.add_signal_handler(number, ask_to_end, number)
        try:
            yield
        finally:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            for number in _ENDING:
                loop.remove_signal_handler(number)
                signal.signal(number, ask_again)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(
    service: Service,
    listener: socket.socket,
    on_ready: Callable[[int], None],
    on_signal: Callable[[int], None],
    leave: Callable[[int], object],
) -> int | None:
    """Serve until Ctrl-C or SIGTERM → the number of the signal.

    Args:
        service: what answers.
        listener: see `mlxqwen.server.listener`; closed at the end.
        on_ready: told the port once requests are answered.
        on_signal: told the number of each such signal when it comes.
        leave: ends the process, given the number of the signal that ended the server; called by each signal that comes
            once no request is answered any more, however long models take to close.
    """
    _allow_open_files()
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )

    async def run() -> int | None:
        server = _Server(config, service, on_ready, on_signal, leave)
        await server.serve(sockets=[listener])
        return server.signal

    try:
        return asyncio.run(run())
    finally:
        listener.close()
        service.close()


def _allow_open_files() -> None:
    """Raise the limit of open files, 256 on Macs, as far as the system lets us: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
