"""`mlxqwen serve` beside mlx-lm's server, and beside Rapid-MLX's where `rapid-mlx` is installed: the demo over HTTP.

Both servers run at once, and only one of them is asked at a time. Clients are in this process.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.http_clients import Stream, ask_all, ask_one
from benchmarks.machine import has_mlx_lm
from benchmarks.processes import ROOT, ProcessError, environment, python
from benchmarks.settings import Settings
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["serve"]

_SIZES = (1, 8, 32, 128)
_WORDS = ("strawberry", "blueberry", "banana", "letter", "window", "summer", "carrot", "butter", "mirror", "pepper")
_LONG_PROMPT = 1_200  # tokens, about: what joins beside a running stream
_PREFIX = 300


def serve(settings: Settings) -> Iterator[Comparison]:
    """Tokens per second and first tokens with 1 to 128 streams, a known front, and a long prompt beside a stream."""
    with ExitStack() as stack:
        sides: dict[str, int] = {}
        for name, command in _commands().items():
            port = _free_port()
            stack.enter_context(_running(name, [*command, str(port)], port))
            sides[name] = port
        yield from _streams(settings, sides)
        yield from _known_front(settings, sides)
        yield from _beside_a_long_prompt(settings, sides)


def _commands() -> dict[str, list[str]]:
    """Name → command line that a port is added to."""
    commands = {"mlxqwen": python("-m", "mlxqwen", "serve", "--single", "--yarn", "auto", "--port")}
    if has_mlx_lm():
        theirs = python("-m", "mlx_lm", "server", "--model", DEMO_FOLDER, "--log-level", "ERROR", "--port")
        commands["mlx_lm.server"] = theirs
    if (rapid := shutil.which("rapid-mlx")) is not None:
        commands["rapid-mlx"] = [rapid, "serve", str(DEMO_FOLDER), "--port"]
    return commands


@contextmanager
def _running(name: str, command: list[str], port: int) -> Iterator[None]:
    """A server that answers, until this is left. Raises `ProcessError` if it does not come up."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(120):
            if process.poll() is not None:
                raise ProcessError(f"{' '.join(command)}: ended with {process.returncode}")
            streams, _ = ask_all(port, [_body("strawberry", max_tokens=4)])
            if streams[0].is_whole:
                break
            time.sleep(0.5)
        else:
            raise ProcessError(f"{name}: does not answer")
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def _streams(settings: Settings, sides: Mapping[str, int]) -> Iterator[Comparison]:
    for size in _SIZES[:2] if settings.quick else _SIZES:
        what = f"{size} stream{'s' * (size > 1)}"
        settings.tell(what)
        bodies = [_body(_WORDS[place % len(_WORDS)]) for place in range(size)]
        rates, firsts, lasts, dropped = _turns(settings, sides, bodies)
        yield from compared(what, "tokens/s", rates, more_is_better=True)
        yield from compared(f"{what}: first token, median", "ms", firsts)
        yield from compared(f"{what}: first token, 95 of 100", "ms", lasts)
        yield from compared(f"{what}: dropped", "", dropped)


def _turns(
    settings: Settings, sides: Mapping[str, int], bodies: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Tokens/s, median and 95th of 100 of the first token in ms, and dropped streams, by side and turn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    firsts: dict[str, list[float]] = {name: [] for name in sides}
    lasts: dict[str, list[float]] = {name: [] for name in sides}
    dropped: dict[str, list[float]] = {name: [] for name in sides}

    def measure(name: str) -> float:
        streams, seconds = ask_all(sides[name], bodies)
        whole = [stream for stream in streams if stream.is_whole and stream.pieces]
        waits = sorted(1e3 * stream.first_token for stream in whole) or [float("inf")]
        rates[name].append(sum(stream.tokens for stream in whole) / seconds)
        firsts[name].append(statistics.median(waits))
        lasts[name].append(waits[min(len(waits) - 1, len(waits) * 95 // 100)])
        dropped[name].append(len(streams) - len(whole))
        return seconds

    turns = settings.turns(5, quick=2)
    take_turns([partial(measure, name) for name in sides], turns)
    for kind in (rates, firsts, lasts, dropped):  # without the turn that warmed up
        for numbers in kind.values():
            del numbers[:-turns]
    return rates, firsts, lasts, dropped


def _known_front(settings: Settings, sides: Mapping[str, int]) -> Iterator[Comparison]:
    """The first token of a question behind instructions that were read before."""
    settings.tell("a front that is known")
    front = "Be brief. " * (_PREFIX // 4)
    waits: dict[str, list[float]] = {name: [] for name in sides}

    def measure(name: str) -> float:
        turn = len(waits[name])
        streams, seconds = ask_all(sides[name], [_body(_WORDS[turn % len(_WORDS)], system=front, max_tokens=4)])
        waits[name].append(1e3 * streams[0].first_token if streams[0].pieces else float("inf"))
        return seconds

    turns = settings.turns(9, quick=3)
    take_turns([partial(measure, name) for name in sides], turns)
    what = f"first token behind {_PREFIX} known tokens"
    yield from compared(what, "ms", {name: numbers[-turns:] for name, numbers in waits.items()})


def _beside_a_long_prompt(settings: Settings, sides: Mapping[str, int]) -> Iterator[Comparison]:
    """The longest wait between two tokens of a stream, while another's long prompt is read."""
    settings.tell("a long prompt beside a stream")
    gaps: dict[str, list[float]] = {name: [] for name in sides}
    ends = [str(token) for token in Tokenizer.from_folder(DEMO_FOLDER).eos_token_ids]

    async def both(port: int, turn: int) -> Stream:
        endless = _body("strawberry", max_tokens=400) | {"logit_bias": dict.fromkeys(ends, -100)}
        running = asyncio.create_task(ask_one(port, endless))
        await asyncio.sleep(0.1)
        front = f"Turn {turn}. " + "Be brief. " * (_LONG_PROMPT // 4)
        await ask_one(port, _body("banana", system=front, max_tokens=4))
        return await running

    def measure(name: str) -> float:
        stream = asyncio.run(both(sides[name], len(gaps[name])))
        gaps[name].append(1e3 * stream.longest_gap if stream.is_whole else float("inf"))
        return gaps[name][-1]

    turns = settings.turns(5, quick=2)
    take_turns([partial(measure, name) for name in sides], turns)
    what = f"longest wait between two tokens while {_LONG_PROMPT:,} tokens are read"
    yield from compared(what, "ms", {name: numbers[-turns:] for name, numbers in gaps.items()})


def _body(word: str, *, system: str = "", max_tokens: int = 160) -> dict[str, Any]:
    question = {"role": "user", "content": f"How many r's in {word}?"}
    messages = [{"role": "system", "content": system}, question] if system else [question]
    return {"model": str(DEMO_FOLDER), "messages": messages, "max_tokens": max_tokens, "temperature": 0}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
