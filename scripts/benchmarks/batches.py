"""Many rows at once, and decoding behind long contexts; see `scripts/bench_batch.py`. Always in processor time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
from bench_batch import Pair, batch_times, decode_times

from benchmarks.checkpoints import bits_name, checkpoint, layers_of
from benchmarks.comparison import Comparison
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM

__all__ = ["batch", "context"]

_LAYERS = 2
_WINDOW = 1024


def batch(settings: Settings) -> list[Comparison]:
    """Decoded tokens per second of processor time with 1, 8 and 32 rows."""
    rows = []
    dtypes = {MLX_LM: None, FLOAT32: mx.float32} if mx.default_device().type == mx.DeviceType.cpu else {MLX_LM: None}
    for bits, sizes in ((None, (1, 8, 32)), (4, (1, 8))):
        folder = _folder(settings, bits)
        some = sizes[:2] if settings.quick else sizes
        for beside, dtype in dtypes.items():
            measure = partial(batch_times, folder, some, 3, dtype)
            turns = _turns(settings, f"batch, {bits_name(bits)}, {beside}", measure)
            for place, size in enumerate(some):
                ours, theirs = ([1 / getattr(turn[place], side) for turn in turns] for side in ("ours", "theirs"))
                what = f"batch of {size}, {_name(settings, folder, bits)}"
                rows.append(Comparison(what, beside, "tokens/s", ours, theirs, more_is_better=True))
    return rows


def context(settings: Settings) -> list[Comparison]:
    """Milliseconds of processor time a token behind 256 to 16,384 tokens, and in a ring of 1,024."""
    folder = _folder(settings)
    rows = []
    for cache, contexts, window in (("", (256, 4096, 16384), None), (", ring of 1,024", (2048, 16384), _WINDOW)):
        turns = _turns(settings, f"context{cache}", partial(decode_times, folder, contexts, 8, window))
        for place, tokens in enumerate(contexts):
            rows.append(
                Comparison(
                    f"decode behind {tokens:,} tokens{cache}, {_name(settings, folder)}",
                    MLX_LM,
                    "ms",
                    [turn[place].ours * 1e3 for turn in turns],
                    [turn[place].theirs * 1e3 for turn in turns],
                )
            )
    return rows


def _folder(settings: Settings, bits: int | None = None) -> Path:
    return checkpoint(settings, bits, layers=settings.layers or _LAYERS)


def _name(settings: Settings, folder: Path, bits: int | None = None) -> str:
    return f"{settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}, {layers_of(folder)} layers"


def _turns(settings: Settings, what: str, measure: Callable[[], list[Pair]]) -> list[list[Pair]]:
    found = []
    for turn in range(settings.turns(3, quick=1)):
        settings.tell(f"{what}: turn {turn + 1}")
        found.append(measure())
    return found
