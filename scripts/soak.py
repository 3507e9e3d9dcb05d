"""Let clients of all kinds loose on `mlxqwen serve`, and see that it is as before: `python scripts/soak.py SECONDS`.

They ask for whole and streamed replies, leave in the midst of them, read nothing for a while, and send half a request
or a slow body. At the end no reply may run, and memory, threads and open files have to be what they were after the
first third. Linux only: the numbers are read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

KINDS = ("whole", "stream", "stream", "leave", "half", "slow body", "stall")
CLIENTS = 24
MEMORY_MAY_GROW = 1.15
FILES_MAY_GROW = 4


@dataclass(frozen=True)
class State:
    """What the server's process takes: megabytes, threads and open files."""

    megabytes: float
    threads: int
    files: int


def state_of(process: int) -> State:
    """Read it from /proc."""
    status = Path(f"/proc/{process}/status").read_text()
    memory, threads = re.search(r"VmRSS:\s+(\d+)", status), re.search(r"Threads:\s+(\d+)", status)
    assert memory is not None
    assert threads is not None
    return State(int(memory[1]) / 1024, int(threads[1]), len(os.listdir(f"/proc/{process}/fd")))


def request(kind: str) -> bytes:
    """A chat completion of random length, as it goes over the wire."""
    text = f"How many r's are in strawberry {random.randrange(10**6)}? " + "word " * random.randrange(60)
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "stream": kind != "whole",
        "n": random.choice([1, 1, 1, 2, 4]),
        "max_tokens": random.randrange(5, 150),
    }
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {len(data)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode() + data


async def ask(kind: str, port: int) -> str:
    """Make one request → how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = request(kind)
    try:
        if kind == "half":
            writer.write(data[:30])
            await asyncio.sleep(random.random())
            return kind
        if kind == "slow body":
            writer.write(data[:-10])
            await asyncio.sleep(random.random())
            writer.write(data[-10:])
        else:
            writer.write(data)
        if kind == "leave":
            await reader.read(random.randrange(1, 3000))
            return kind
        if kind == "stall":
            await reader.read(100)
            await asyncio.sleep(3 * random.random())
            await asyncio.wait_for(reader.read(), 120)
            return kind
        return (await asyncio.wait_for(reader.read(), 120))[9:12].decode()
    finally:
        writer.close()


async def client(port: int, until: float, ends: Counter[str]) -> None:
    """Ask again and again."""
    while time.monotonic() < until:
        try:
            ends[await ask(random.choice(KINDS), port)] += 1
        except (OSError, TimeoutError) as error:
            ends[type(error).__name__] += 1


async def soak(port: int, seconds: float, ends: Counter[str]) -> None:
    """All clients at once."""
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(port, until, ends) for _ in range(CLIENTS)))


def replies_left(port: int) -> float:
    """Replies that run, are read or wait."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        text = page.read().decode()
    return sum(float(value) for value in re.findall(r"^mlxqwen_\w+_replies (\S+)$", text, re.MULTILINE))


def main() -> None:
    """Run it, print what was seen, and exit with 1 if something is not as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    seconds = parser.parse_args().seconds
    command = [sys.executable, "-m", "mlxqwen", "serve", "--port", "0", "--prefix-cache", "32MB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r":(\d+)/v1", process.stdout.readline())
        if found is None:
            sys.exit(process.communicate()[1])
        port, ends, states = int(found[1]), Counter[str](), []
        reading = asyncio.new_event_loop()
        drained = reading.run_in_executor(None, process.stderr.read) if process.stderr is not None else None
        for _ in range(3):
            asyncio.run(soak(port, seconds / 3, ends))
            time.sleep(2)
            states.append(state_of(process.pid))
            print(states[-1], dict(ends), flush=True)
        left = replies_left(port)
        process.terminate()
        written = reading.run_until_complete(drained) if drained is not None else ""
        reading.close()
        status = process.wait(timeout=60)
    first, last = states[0], states[-1]
    wrong = [
        *([f"{left:.0f} replies are left"] if left else []),
        *([f"exit status {status}"] if status else []),
        *(["a traceback in the log"] if "Traceback" in written else []),
        *(["memory has grown"] if last.megabytes > MEMORY_MAY_GROW * first.megabytes else []),
        *(["threads have grown"] if last.threads > first.threads else []),
        *(["open files have grown"] if last.files > first.files + FILES_MAY_GROW else []),
        *([f"ends that should not be: {dict(ends)}"] if {*ends} - {"200", "half", "leave", "stall"} else []),
    ]
    print("; ".join(wrong) or "as it was")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
