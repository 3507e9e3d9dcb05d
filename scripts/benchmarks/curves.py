"""What the plot of docs/performance.md shows: tokens per second by rows and by context, in finer steps."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.batches import few_layers, tokens_per_second
from benchmarks.comparison import Comparison
from benchmarks.contexts import milliseconds_behind
from benchmarks.settings import Settings
from mlxqwen.files.hub import DEMO_FOLDER

__all__ = ["curves"]

_ROWS = (1, 2, 4, 8, 16, 32)
_CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)


def curves(settings: Settings) -> Iterator[Comparison]:
    """The demo model with 1 to 32 rows, and few layers of a release in BF16 behind 256 to 8,192 tokens."""
    name, _, folder = few_layers(settings, None)
    yield from tokens_per_second(settings, "demo model", None, DEMO_FOLDER, _ROWS)
    yield from milliseconds_behind(settings, name, folder, _CONTEXTS)
