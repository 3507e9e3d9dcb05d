"""Connections that say nothing, or never stop, before their request begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from mlxqwen.server import connection
from mlxqwen.server.connection import Connection

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def connected(work: Callable[[Callable[[], Coroutine[Any, Any, Streams]]], Coroutine[Any, Any, None]]) -> None:
    """Do `work` with a way to connect to a server."""

    async def run() -> None:
        config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None)
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(config, state, {}, loop), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await work(lambda: asyncio.open_connection("127.0.0.1", port))
        server.close()
        await server.wait_closed()

    asyncio.run(run())


def test_a_head_that_does_not_end_is_refused() -> None:
    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 60_000)
        await asyncio.sleep(0.02)
        writer.write(b"b" * 10_000)
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 431")
        writer.close()

    connected(work)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"], ids=repr)
def test_silence_before_a_request_is_hung_up_on(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.05)

    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        reader, writer = await connect()
        writer.write(sent)
        with suppress(ConnectionResetError):  # if it was hung up on before this was sent
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()

    connected(work)


def test_whole_requests_are_answered_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        reader, writer = await connect()
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nb: " + b"c" * 30_000 + b"\r\n\r\n")
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).startswith(b"HTTP/1.1 204")
        writer.close()

    connected(work)
