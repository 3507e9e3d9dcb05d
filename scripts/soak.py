"""Let clients of all kinds loose on `mlxqwen serve`, and see that it is as before: `scripts/soak.py --seconds N`.

Clients join, ask in all forms, whole and streamed, leave in the midst of it, die without a goodbye, read nothing for a
while, and send half a request or a slow body. What the server takes is looked at when it rests, after a quarter of the
time and at the end: no reply may be left, arrays, threads and open files have to be what they were, and the process as
large, give or take what its allocator keeps. Linux only: the numbers are read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import struct
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from served import server

CLIENTS = 24
MOST_SECONDS = 300.0  # for what a client does at once
RESTED_SECONDS = 60.0
PREFIX_CACHE = 4_000_000  # bytes: full within seconds, so that it is no growth
ARRAYS_MAY_GROW = 2 * PREFIX_CACHE // 10
PROCESS_MAY_GROW = 64  # megabytes that allocators keep for later
THREADS_MAY_GROW = 6  # of the server's pools, which begin threads as they are needed
KINDS = {
    "whole": 4,
    "stream": 6,
    "leave": 4,
    "die": 4,
    "stall": 3,
    "half": 2,
    "slow body": 2,
    "one after another": 2,
    "schema": 2,
    "responses": 2,
    "background": 2,
    "messages": 2,
    "too much": 1,
}
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer"}},
    "required": ["count"],
    "additionalProperties": False,
}
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@dataclass(frozen=True)
class State:
    """What the server takes: replies, bytes of arrays, megabytes of the process, its threads and open files."""

    replies: int
    array_bytes: int
    megabytes: float
    threads: int
    files: int


def metrics_of(port: int) -> dict[str, float]:
    """The gauges of `GET /metrics`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def state_of(process: int, port: int) -> State:
    """The state once no reply is left, or after a minute; connections have a few seconds to close."""
    until = time.monotonic() + RESTED_SECONDS
    while True:
        metrics = metrics_of(port)
        left = sum(metrics[f"mlxqwen_{one}_replies"] for one in ("running", "reading", "waiting"))
        if not left or time.monotonic() > until:
            break
        time.sleep(0.1)
    nbytes, files = [], []
    for _ in range(10):  # Python may collect garbage meanwhile, too
        time.sleep(0.3)
        files.append(len(os.listdir(f"/proc/{process}/fd")))
        nbytes.append(int(metrics_of(port)["mlxqwen_array_bytes"]))
    status = Path(f"/proc/{process}/status").read_text()
    found = {name: int(value) for name, value in re.findall(r"(VmRSS|Threads):\s+(\d+)", status)}
    return State(int(left), min(nbytes), round(found["VmRSS"] / 1024, 1), found["Threads"], min(files))


class Client:
    """One client, which draws what it does by its seed.

    Args:
        port: of the server.
        seed: of its draws.
        ends: counts what it did, by how that ended.
    """

    def __init__(self, port: int, seed: int, ends: Counter[str]) -> None:
        self._port = port
        self._draw = random.Random(seed)
        self._ends = ends

    async def run(self, until: float) -> None:
        """Do one thing after another."""
        while time.monotonic() < until:
            (kind,) = self._draw.choices(list(KINDS), list(KINDS.values()))
            try:
                end = await asyncio.wait_for(self._do(kind), MOST_SECONDS)
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                end = type(error).__name__
            self._ends[f"{kind}: {end}"] += 1

    async def _do(self, kind: str) -> str:
        """Do one thing → how it ended: the status of its last response, or "left"."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            if kind == "one after another":
                return await self._several(reader, writer)
            if kind == "background":
                writer.write(self._request(*self._body(kind), keeps=True))
                return await self._follow(reader, writer, json.loads((await _response(reader))[1])["id"])
            data = self._request(*self._body(kind))
            if kind == "half":
                writer.write(data[:30])
                await asyncio.sleep(self._draw.random())
                return "left"
            if kind == "slow body":
                writer.write(data[:-10])
                await asyncio.sleep(self._draw.random())
                writer.write(data[-10:])
            else:
                writer.write(data)
            if kind in ("leave", "die"):
                await reader.read(self._draw.randrange(1, 3000))
                if kind == "die":
                    _reset_at_the_end(writer)
                return "left"
            if kind == "stall":
                first = await reader.read(100)
                await asyncio.sleep(3 * self._draw.random())
                return _status(first + await reader.read())
            return _status(await reader.read())
        finally:
            writer.close()

    async def _several(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        statuses = set()
        for _ in range(self._draw.randrange(2, 5)):
            writer.write(self._request(*self._body("whole"), keeps=True))
            statuses.add((await _response(reader))[0])
        return " ".join(sorted(statuses))

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> str:
        """Ask for a response until it is over; now and then end it, and always forget it."""
        path, is_patient = f"/v1/responses/{name}", self._draw.random() < 0.7
        if not is_patient:
            writer.write(self._request(f"{path}/cancel", None, keeps=True))
            await _response(reader)
        while True:
            writer.write(self._request(path, None, method="GET", keeps=True))
            status, body = await _response(reader)
            if status != "200" or json.loads(body)["status"] not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.05)
        writer.write(self._request(path, None, method="DELETE", keeps=True))
        return f"{status} {(await _response(reader))[0]}"

    def _body(self, kind: str) -> tuple[str, dict[str, Any]]:
        """A path and a body for it."""
        draw = self._draw
        text = f"How many r's are in strawberry {draw.randrange(10**6)}? " + "word " * draw.randrange(60)
        message = [{"role": "user", "content": text}]
        most = draw.randrange(5, 150)
        if kind in ("responses", "background"):
            extra = {"background": True} if kind == "background" else {"stream": True, "store": False}
            return "/v1/responses", {"model": "demo", "input": text, "max_output_tokens": most, **extra}
        if kind == "messages":
            return "/v1/messages", {"model": "demo", "messages": message, "max_tokens": most, "stream": True}
        body: dict[str, Any] = {"model": "demo", "messages": message, "max_tokens": most}
        if kind == "schema":
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        elif kind == "too much":
            body["messages"] = [{"role": "user", "content": text * 1000}]
        else:
            body |= {"stream": kind != "whole", "n": draw.choice([1, 1, 1, 2, 4])}
        return "/v1/chat/completions", body

    def _request(self, path: str, body: dict[str, Any] | None, *, method: str = "POST", keeps: bool = False) -> bytes:
        """A request as it goes over the wire."""
        data = b"" if body is None else json.dumps(body).encode()
        connection = "keep-alive" if keeps else "close"
        head = (
            f"{method} {path} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Content-Length: {len(data)}",
            f"Connection: {connection}",
        )
        return "\r\n".join((*head, "", "")).encode() + data


async def _response(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The status and body of a response that says how long it is."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return _status(head), b"" if length is None else await reader.readexactly(int(length[1]))


def _status(data: bytes) -> str:
    found = _STATUS.match(data)
    if found is None:
        return "nothing" if not data else "no HTTP"
    failed = b'data: {"error":' in data or b"event: error\n" in data or b"event: response.failed\n" in data
    return f"{found[1].decode()}{' with an error' if failed else ''}"


def _reset_at_the_end(writer: asyncio.StreamWriter) -> None:
    """Let the connection end as that of a process that was killed does: by a reset."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def soak(port: int, seconds: float, seed: int, ends: Counter[str]) -> None:
    """All clients at once."""
    until = time.monotonic() + seconds
    await asyncio.gather(*(Client(port, seed + number, ends).run(until) for number in range(CLIENTS)))


def differences(first: State, last: State) -> list[str]:
    """What is not as it was."""
    return [
        *([f"{last.replies} replies are left"] if last.replies else []),
        *(["arrays have grown"] if last.array_bytes > first.array_bytes + ARRAYS_MAY_GROW else []),
        *(["the process has grown"] if last.megabytes > first.megabytes + PROCESS_MAY_GROW else []),
        *(["threads have grown"] if last.threads > first.threads + THREADS_MAY_GROW else []),
        *(["open files have grown"] if last.files > first.files else []),
    ]


def expected(end: str) -> bool:
    """Whether something a client did ended as it should."""
    kind, _, how = end.partition(": ")
    wanted = {"leave": "left", "die": "left", "half": "left", "too much": "400", "background": "200 200"}
    return how == wanted.get(kind, "200")


def main() -> None:
    """Run it, print what was seen, and exit with 1 if something is not as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do")
    options = parser.parse_args()
    ends = Counter[str]()
    with server("--prefix-cache", str(PREFIX_CACHE)) as (process, port, log):
        states = []
        for number, part in enumerate((0.25, 0.75)):
            asyncio.run(soak(port, part * options.seconds, options.seed + number * CLIENTS, ends))
            states.append(state_of(process.pid, port))
            print(states[-1], flush=True)
    wrong = [
        *differences(*states),
        *(f"{count} × {end}" for end, count in ends.items() if not expected(end)),
        *([f"exit status {process.returncode}"] if process.returncode else []),
        *(["a traceback in the log"] if any("Traceback" in line for line in log) else []),
    ]
    print(", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    print("; ".join(wrong) or "as it was")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
