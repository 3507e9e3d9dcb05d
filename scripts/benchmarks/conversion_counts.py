"""What a conversion of each form reads, how often, and how often MLX evaluates: counts of `--check`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from make_checkpoint import FORMATS, SHAPES, make_checkpoint

from mlxqwen_convert import convert, source_files

__all__ = ["conversion_counts"]

# Wide enough for several strips, chunks and tasks, and quickly made.
_SHAPE = {**SHAPES["Qwen3-1.7B"], "hidden_size": 1024, "intermediate_size": 6144, "vocab_size": 1024}


def conversion_counts() -> dict[str, int]:
    """Of one layer, verified, by one thread, whose chunks do not depend on the machine."""
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, patch.dict(SHAPES, counted=_SHAPE):
        for form in FORMATS:
            source = Path(folder, form)
            make_checkpoint(source, "counted", layers=1, form=form)
            with _counted() as counts:
                convert(source, source.with_suffix(".out"), workers=1)
            found |= {
                f"{what} by a conversion from {form.upper()}": counts[what]
                for what in ("bytes read", "reads", "evaluations")
            }
    return found


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Reads of weights, and evaluations that are asked for, while this is open."""
    counts: Counter[str] = Counter()
    read_into, read, evaluate = source_files._read_into, source_files._read, mx.eval

    def reading_into(descriptor: int, info: Any, start: int, buffer: memoryview) -> None:
        counts.update({"bytes read": len(buffer), "reads": 1})
        read_into(descriptor, info, start, buffer)

    def reading(descriptor: int, info: Any, start: int, size: int) -> bytes:
        counts.update({"bytes read": size, "reads": 1})
        return read(descriptor, info, start, size)

    def evaluating(*arrays: Any) -> None:
        counts["evaluations"] += 1
        evaluate(*arrays)

    with (
        patch.object(source_files, "_read_into", reading_into),
        patch.object(source_files, "_read", reading),
        patch.object(mx, "eval", evaluating),
    ):
        yield counts
