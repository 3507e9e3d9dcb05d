"""The parts of the benchmark by name; each is imported in the process that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import cast

from benchmarks.clock import use_processor_time
from benchmarks.comparison import Comparison
from benchmarks.processes import ProcessError
from benchmarks.settings import Settings

__all__ = ["PARTS", "Part", "PartError", "run_part"]


class PartError(Exception):
    """A part did not end well."""


@dataclass(frozen=True)
class Part:
    """Where a part lives, what it measures, about how many minutes it takes, and whether it is run unless named."""

    module: str
    function: str
    what: str
    minutes: float
    by_default: bool = True


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
    "moe": Part("experts", "moe", "a block of experts on 1, 8, 64 and 512 tokens", 4),
    "speculation": Part("speculating", "speculation", "replies of the demo model with prompt lookup and without", 1),
    "convert": Part(
        "conversion", "convert", "BF16 to 4-bit beside mlx_lm.convert, whole processes", 2, by_default=False
    ),
}


def run_part(name: str, settings: Settings) -> list[Comparison]:
    """Run a part in a process of its own, so that it starts with nothing. Raises `PartError` if it fails."""
    part = PARTS[name]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return list(pool.submit(_run, part, settings).result())
        except BrokenProcessPool:
            raise PartError(f"{name}: its process was killed; there may not be enough memory") from None
        except ProcessError as error:
            raise PartError(f"{name}: {error}") from None
        except Exception as error:  # the other parts' figures are not lost with this one's
            raise PartError(f"{name}: {type(error).__name__}: {error}") from error


def _run(part: Part, settings: Settings) -> Sequence[Comparison]:
    if settings.processor_time:
        use_processor_time()
    function = getattr(import_module(f"benchmarks.{part.module}"), part.function)
    return cast(Sequence[Comparison], function(settings))
