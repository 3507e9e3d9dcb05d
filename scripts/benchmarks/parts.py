"""The parts of the benchmark by name; each is imported in the process that runs it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from benchmarks.clock import use_processor_time
from benchmarks.comparison import Comparison, Table
from benchmarks.processes import ProcessError
from benchmarks.settings import Settings

__all__ = ["PARTS", "Part", "PartError", "run_part"]


_LEAVING = 10  # seconds that a process may take to end once it has measured everything


class PartError(Exception):
    """A part did not end well."""


@dataclass(frozen=True)
class Part:
    """Where a part lives, what it measures, about how many minutes it takes, whether it is run unless named, and
    whether its figures are a table of their own, or lines of the common one beside mlx-lm."""

    module: str
    function: str
    what: str
    minutes: float
    by_default: bool = True
    has_table: bool = False


PARTS = {
    "import": Part("starting", "imports", "importing, whole processes", 1),
    "cold-start": Part("starting", "cold_start", "one token from a standing start, whole processes", 2),
    "load": Part("loading", "load", "weights into memory", 1),
    "decode": Part("decoding", "decode", "a token behind a short prompt, 4-bit, 8-bit, BF16", 8),
    "prefill": Part("decoding", "prefill", "reading a prompt, 4-bit, 8-bit, BF16", 4),
    "first-token": Part("decoding", "first_token", "from a long prompt to the first token", 3),
    "memory": Part("memory", "memory", "peaks while loading and generating", 15),
    "graph": Part("graph", "graph", "primitives and host time of a decoded token", 1),
    "sample": Part("sampling", "sample", "a draw from 151,936 logits, with the card's profile and greedily", 1),
    "batch": Part("batches", "batch", "tokens per second with 1, 8 and 32 rows", 9),
    "context": Part("contexts", "context", "a token behind up to 16,384, and in a ring of 1,024", 5),
    "curves": Part(
        "curves", "curves", "what the plot shows: 1 to 32 rows, and 256 to 8,192 tokens", 3, by_default=False
    ),
    "moe": Part("experts", "moe", "a block of experts on 1, 8, 64 and 512 tokens", 4),
    "scheduler": Part("scheduling", "scheduler", "host time of a step with 1 to 128 replies", 1),
    "prefix": Part("prefixes", "prefix", "hits of the prefix store, in memory and on disk", 2),
    "serve": Part("serving", "serve", "the demo over HTTP, 1 to 128 streams", 6, by_default=False),
    "convert": Part(
        "conversion", "convert", "BF16 to 4-bit beside mlx_lm.convert, and a weight by form", 4, by_default=False
    ),
    "speculation": Part(
        "speculating", "speculation", "replies of the demo model with guesses and without", 4, has_table=True
    ),
    "passes": Part("speculating", "passes", "a pass over several tokens", 1, by_default=False, has_table=True),
    "draws": Part("agreement", "draws", "a draft model's draws", 1, by_default=False, has_table=True),
    "same-replies": Part(
        "agreement", "same_replies", "replies with guesses, token by token", 2, by_default=False, has_table=True
    ),
    "accuracy": Part(
        "accuracy", "accuracy", "right answers of the demo model, converted", 9, by_default=False, has_table=True
    ),
}


def run_part(name: str, settings: Settings, deadline: float | None = None) -> Generator[Comparison | Table, None, None]:
    """Run a part in a process of its own, so that it starts with nothing → its lines, or its table, as they come.

    Args:
        name: of the part.
        settings: what the user asked for.
        deadline: when it has to be over, by `time.monotonic`; then it is stopped.

    Raises:
        PartError: it failed, or was stopped.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(PARTS[name], settings, sender))
    with receiver:
        process.start()
        sender.close()
        try:
            while True:
                if not receiver.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    raise PartError(f"{name}: stopped, as its time was over")
                try:
                    message = receiver.recv()
                except EOFError:
                    raise PartError(f"{name}: its process was killed; there may not be enough memory") from None
                if message is None:
                    process.join(_LEAVING)
                    return
                if isinstance(message, str):
                    raise PartError(f"{name}: {message}")
                yield message
        finally:
            _end(process)


def _run(part: Part, settings: Settings, sender: Connection) -> None:
    """In the part's process: send what it yields, then None, or in words why it failed."""
    os.setpgid(0, 0)  # a group with the processes that it starts, to be ended together
    if settings.processor_time:
        use_processor_time()
    try:
        function = getattr(import_module(f"benchmarks.{part.module}"), part.function)
        for row in [function(settings)] if part.has_table else function(settings):
            sender.send(row)
        sender.send(None)
    except ProcessError as error:
        sender.send(str(error))
    except Exception as error:  # the other parts' figures are not lost with this one's
        sender.send(f"{type(error).__name__}: {error}")


def _end(process: BaseProcess) -> None:
    """End a part's process if it is not over, with all that it has started."""
    if process.pid is not None and process.is_alive():
        with suppress(OSError):  # it has no group of its own yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
