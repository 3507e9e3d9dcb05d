"""Many rows at once: tokens of all rows together in a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.checkpoints import bits_name, checkpoint, layers_of
from benchmarks.comparison import Comparison, Point, compared
from benchmarks.machine import has_mlx_lm
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Theirs, on_cpu
from benchmarks.steps import seconds_per_step
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.sampling.params import SamplingParams

__all__ = ["batch", "few_layers", "tokens_per_second"]

_SIZES = (1, 8, 32)
_LAYERS = 2
_PROMPT = 4  # tokens: reading them is not measured
_MOST_IN_BFLOAT16 = 8  # quantized rows; on a CPU mlx-lm would take minutes to read the prompts of more
_MOST_TOKENS = 400  # never decoded to the end
_MOST_STEPS = 16  # of a turn


def batch(settings: Settings) -> Iterator[Comparison]:
    """Tokens per second with 1, 8 and 32 rows: few layers of a release, and the whole demo model."""
    sizes = _SIZES[:2] if settings.quick else _SIZES
    for name, bits, folder in _models(settings):
        yield from tokens_per_second(settings, name, bits, folder, sizes)


def tokens_per_second(
    settings: Settings, name: str, bits: int | None, folder: Path, sizes: Sequence[int]
) -> Iterator[Comparison]:
    """Lines for so many rows of one model, which `name` names."""
    unit = "tokens per processor second" if settings.processor_time else "tokens/s"
    for size in sizes:
        what = f"batch of {size}, {name}"
        settings.tell(what)
        sides = _sides(folder, bits, size)
        turns = settings.turns(5, quick=2)
        times = seconds_per_step([*sides.values()], turns, min(_MOST_STEPS, _MOST_TOKENS // (turns + 3)))
        rates = {side: [size / seconds for seconds in some] for side, some in zip(sides, times, strict=True)}
        yield from compared(what, unit, rates, more_is_better=True, point=Point("rows", name, size))


def few_layers(settings: Settings, bits: int | None) -> tuple[str, int | None, Path]:
    """A release of few layers: name, bits, folder."""
    folder = checkpoint(settings, bits, layers=settings.layers or _LAYERS)
    return f"{settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}, {layers_of(folder)} layers", bits, folder


def _models(settings: Settings) -> Iterator[tuple[str, int | None, Path]]:
    """Name, bits, folder."""
    yield from (few_layers(settings, bits) for bits in (None, 4))
    yield "demo model", None, DEMO_FOLDER


def _sides(folder: Path, bits: int | None, rows: int) -> dict[str, Iterator[None]]:
    sides = {"mlxqwen": _our_steps(Ours.load(folder).model, rows)}
    if has_mlx_lm():
        if not on_cpu() or bits is None or rows <= _MOST_IN_BFLOAT16:
            sides[MLX_LM] = _their_steps(Theirs.load(folder).model, rows)
        if on_cpu():
            sides[FLOAT32] = _their_steps(Theirs.load(folder, mx.float32).model, rows)
    return sides


def _prompts(rows: int) -> list[list[int]]:
    return [[row + 1] * _PROMPT for row in range(rows)]


def _our_steps(model: Any, rows: int) -> Iterator[None]:
    greedy = SamplingParams(temperature=0.0)
    stream = generate_tokens(model, _prompts(rows), sampling=greedy, max_tokens=_MOST_TOKENS, eos_token_ids=())
    for row, _ in stream:
        if row == rows - 1:
            mx.synchronize()
            yield


def _their_steps(model: Any, rows: int) -> Iterator[None]:
    from mlx_lm.generate import BatchGenerator, generation_stream

    generator = BatchGenerator(model, completion_batch_size=rows, prefill_batch_size=rows)
    generator.insert(_prompts(rows), max_tokens=[_MOST_TOKENS] * rows)
    while True:
        if generator.next_generated():
            mx.synchronize(generation_stream)
            yield
