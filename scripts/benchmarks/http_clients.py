"""Clients of a chat server over plain sockets: they cost little beside the server, and note when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Stream", "ask_all", "ask_one"]

_TIMEOUT = 300.0


@dataclass
class Stream:
    """One reply: when it was asked for, and the arrival of each piece that has text, in seconds of the clock."""

    asked: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    is_whole: bool = False

    @property
    def first_token(self) -> float:
        """Seconds from the question to the first piece."""
        return self.pieces[0] - self.asked

    @property
    def longest_gap(self) -> float:
        """The longest time between two pieces."""
        return max((after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)), default=0.0)


def ask_all(port: int, bodies: Sequence[Mapping[str, Any]]) -> tuple[list[Stream], float]:
    """Ask everything at once → the streams, and the seconds until the last one ended."""

    async def run() -> tuple[list[Stream], float]:
        started = time.perf_counter()
        streams = await asyncio.gather(*(ask_one(port, body) for body in bodies))
        return streams, time.perf_counter() - started

    return asyncio.run(run())


async def ask_one(port: int, body: Mapping[str, Any]) -> Stream:
    """Stream one chat completion to its end; a dropped connection leaves `is_whole` False."""
    stream = Stream(time.perf_counter())
    try:
        async with asyncio.timeout(_TIMEOUT):
            await _read(port, {**body, "stream": True, "stream_options": {"include_usage": True}}, stream)
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        stream.is_whole = False
    return stream


async def _read(port: int, body: Mapping[str, Any], stream: Stream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        text = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + text)
        await writer.drain()
        if b" 200 " not in await reader.readline():
            return
        while line := await reader.readline():  # lengths of chunks stand in lines of their own
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                stream.is_whole = True
                return
            event = json.loads(line[6:])
            if event.get("usage"):
                stream.tokens = event["usage"]["completion_tokens"]
            delta = (event.get("choices") or [{}])[0].get("delta") or {}
            if any(delta.get(name) for name in ("content", "reasoning", "reasoning_content")):
                stream.pieces.append(time.perf_counter())
    finally:
        writer.close()
