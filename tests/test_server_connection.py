"""Connections that say nothing, never stop, or speak another protocol before their request begins."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from mlxqwen.server import connection
from mlxqwen.server.connection import Connection

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Tell what was asked."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    told = [scope["method"], scope["path"], body.decode(), sorted(name.decode() for name, _ in scope["headers"])]
    answer = json.dumps(told).encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def connected(
    work: Callable[[Callable[[], Coroutine[Any, Any, Streams]]], Coroutine[Any, Any, None]], app: Any = echo
) -> None:
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


async def answer_of(reader: asyncio.StreamReader) -> Any:
    """The JSON of the next response."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    assert head.startswith(b"HTTP/1.1 200")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    return json.loads(await reader.readexactly(int(length.split()[1])))


def test_whole_requests_are_answered_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        reader, writer = await connect()
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nb: " + b"c" * 30_000 + b"\r\n\r\n")
            assert await answer_of(reader) == ["GET", "/", "", ["b", "host"]]
        writer.close()

    connected(work)


# As Java's client sends it with each request until it is answered otherwise, and a client of WebSockets.
OFFERS_HTTP_2 = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
OFFERS_WEBSOCKETS = b"Connection: upgrade\r\nupgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
PLAIN = b"GET /plain?a=b HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("offer", [OFFERS_HTTP_2, OFFERS_WEBSOCKETS], ids=["HTTP/2", "WebSocket"])
@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_a_request_that_offers_an_upgrade_is_answered_as_any_other(
    offer: bytes, piece: int, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = [
        b"Content-Length: 7\r\n\r\n{1: 23}",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    ]
    sent = b"".join(b"POST /a HTTP/1.1\r\nHost: a\r\n" + offer + body for body in bodies) + PLAIN
    names = sorted(line.split(b":")[0].decode().lower() for line in offer.splitlines())
    names.remove("upgrade")

    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        reader, writer = await connect()
        for place in range(0, len(sent), piece):
            writer.write(sent[place : place + piece])
            await asyncio.sleep(0)
        assert await answer_of(reader) == ["POST", "/a", "{1: 23}", sorted([*names, "content-length", "host"])]
        assert await answer_of(reader) == ["POST", "/a", "abcde", sorted([*names, "host", "transfer-encoding"])]
        assert await answer_of(reader) == ["GET", "/plain", "", ["host"]]
        writer.close()

    connected(work)
    assert not caplog.records


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(connection, "_told", {})
    return caplog


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", "found a TLS handshake, expected HTTP without TLS: an address with http://"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "found HTTP/2, expected HTTP/1.1"),
        (b"\x00\x01\xffsecret\r\n\r\n", "found no request that can be read (Invalid method encountered), expected"),
        (b"GET / HTTP/1.1\r\nsecret\r\n\r\n", "found no request that can be read (Invalid header token), expected"),
        (b"CONNECT secret:443 HTTP/1.1\r\n\r\n", "found CONNECT, which is a proxy's, expected"),
        (b"CONNECT /secret HTTP/1.1\r\n\r\n" + PLAIN, "found CONNECT, which is a proxy's, expected"),
        (b"GET //\x7fsecret HTTP/1.1\r\n\r\n", "expected"),
    ],
    ids=repr,
)
def test_what_is_no_http_is_refused_and_logged_once(sent: bytes, told: str, log: pytest.LogCaptureFixture) -> None:
    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        for _ in range(5):
            reader, writer = await connect()
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 20)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400")
            error = json.loads(body)["error"]
            assert told in error["message"]
            assert error["code"] == "invalid_http"
            writer.close()

    connected(work)
    (line,) = log.messages
    assert line.startswith("127.0.0.1 was not understood: ")
    assert told in line
    assert "secret" not in line
    connection._told.update((what, when - 3601) for what, when in connection._told.items())
    connected(work)
    assert log.messages == [line, line]


def test_a_client_that_speaks_https_is_told_in_the_log(log: pytest.LogCaptureFixture) -> None:
    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        _, writer = await connect()
        with pytest.raises((ssl.SSLError, OSError)):
            await writer.start_tls(ssl.create_default_context(), server_hostname="localhost")
        writer.close()

    connected(work)
    assert ["a TLS handshake" in line for line in log.messages] == [True]


def test_garbage_behind_an_answer_that_has_begun_is_not_answered() -> None:
    """What is written there would be read as a part of the answer."""

    async def streams(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def work(connect: Callable[[], Coroutine[Any, Any, Streams]]) -> None:
        reader, writer = await connect()
        writer.write(PLAIN)
        await asyncio.wait_for(reader.readuntil(b"begun"), 20)
        writer.write(b"\x00garbage\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()

    connected(work, streams)
