"""The most memory that a process holds while it loads a model and generates; one process each."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.checkpoints import bits_name, checkpoint, layers_of
from benchmarks.comparison import Comparison, compared
from benchmarks.machine import has_mlx_lm
from benchmarks.settings import Settings

__all__ = ["memory"]


@dataclass(frozen=True)
class Peaks:
    """In MiB: of the process; of MLX's arrays while loading, beyond the weights; while generating, beyond weights and
    cache."""

    process: float
    loading: float
    generating: float


_BOUND = 64  # MiB beyond weights and cache
_LONG_PROMPT = 1024  # tokens: two chunks
_LARGE_LAYERS = 2
_CACHES: dict[str, dict[str, int]] = {
    "": {},
    ", 8-bit cache": {"kv_bits": 8},
    ", ring of 512": {"max_kv_size": 512},
}


def memory(settings: Settings) -> Iterator[Comparison]:
    """Peaks beside mlx-lm's, and what mlxqwen generates with, beyond weights and cache, beside a bound."""
    yield from _beside_mlx_lm(settings)
    yield from _beside_the_bound(settings)


def _beside_mlx_lm(settings: Settings) -> Iterator[Comparison]:
    """A long prompt through few layers, and a short one through all; by default each side computes as it likes."""
    long, some = (256, 2) if settings.quick else (512, 4)
    sides = {"mlxqwen": "Ours", "mlx-lm": "Theirs"} if has_mlx_lm() else {"mlxqwen": "Ours"}
    for bits, layers, prompt in ((None, settings.layers or some, long), (None, None, 16), (4, None, 8)):
        folder = checkpoint(settings, bits, layers=layers)
        name = f"{settings.shape.removeprefix('Qwen3-')} {bits_name(bits)}"
        what = f"{name}, {layers_of(folder)} layers, {prompt} + 8 tokens"
        settings.tell(f"memory: {what}")
        peaks = {name: _in_a_process(side, folder, prompt) for name, side in sides.items()}
        for peak in ("generating, beyond weights and cache", "loading, beyond weights", "process, at most"):
            field = peak.partition(",")[0]
            mebibytes = {name: [getattr(side, field)] for name, side in peaks.items()}
            yield from compared(f"memory, {what}: {peak}", "MiB", mebibytes)


def _beside_the_bound(settings: Settings) -> Iterator[Comparison]:
    """A prompt of two chunks, whose activations grow with a model's width and not with its layers, in 4 bits."""
    shapes = dict.fromkeys(settings.shapes, _LARGE_LAYERS) or {"Qwen3-0.6B": 4, "Qwen3-8B": _LARGE_LAYERS}
    for number, (shape, layers) in enumerate(shapes.items()):
        if number and settings.quick:
            break
        layers = settings.layers or layers
        folder = checkpoint(settings, 4, shape=shape, layers=layers)
        for cache, options in _CACHES.items() if number == 0 else [("", {})]:
            what = f"{shape.removeprefix('Qwen3-')} 4-bit, {layers} layers, {_LONG_PROMPT:,} + 8 tokens{cache}"
            settings.tell(f"memory: {what}")
            peak = _in_a_process("Ours", folder, _LONG_PROMPT, **options).generating
            what = f"memory, {what}: generating, beyond weights and cache"
            yield Comparison(what, "a bound", "MiB", [peak], [_BOUND])


def _in_a_process(side: str, folder: Path, prompt: int, **cache_options: int) -> Peaks:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peaks, side, folder, prompt, cache_options).result()


def _peaks(name: str, folder: Path, prompt: int, cache_options: dict[str, int]) -> Peaks:
    import mlx.core as mx

    from benchmarks.sides import Ours, Side, Theirs, prompt_ids

    side: Side = Ours.load(folder, **cache_options) if name == "Ours" else Theirs.load(folder)
    loading = mx.get_peak_memory() - side.weight_bytes
    mx.reset_peak_memory()
    for _ in side.tokens(prompt_ids(prompt), 8):
        pass
    side.settle()
    generating = mx.get_peak_memory() - side.weight_bytes - side.cache_bytes
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Peaks(process / 2**20, max(0, loading) / 2**20, generating / 2**20)
