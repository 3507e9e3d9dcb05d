"""One block of experts, of true shape and quantized, on so many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from benchmarks.checkpoints import checkpoint
from benchmarks.clock import now
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.machine import has_mlx_lm
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Theirs, on_cpu

__all__ = ["moe"]

DEFAULT_SHAPE = "Qwen3-30B-A3B"
_MOST_IN_BFLOAT16 = 8  # tokens; mlx-lm would take minutes for more on a CPU
_SLOW = (8, 512)  # tokens: mlx-lm takes seconds a turn, in bfloat16 and in float32
_VOCABULARY = 1024  # of the model around the block, which is not run


def moe(settings: Settings) -> Iterator[Comparison]:
    """Milliseconds for 1, 8, 64 and 512 tokens through one 4-bit block."""
    shape = next((name for name in settings.shapes if "-A" in name), DEFAULT_SHAPE)
    folder = checkpoint(settings, 4, shape=shape, layers=1, vocabulary=_VOCABULARY)
    ours = Ours.load(folder).model
    plain = Theirs.load(folder).model if has_mlx_lm() else None
    same = Theirs.load(folder, mx.float32).model if has_mlx_lm() and on_cpu() else None
    for count in (1, 8, 64, 512):
        x = mx.random.normal((count, ours.config.hidden_size), key=mx.random.key(count))
        sides = {"mlxqwen": (ours, x.astype(ours.dtype))}
        if plain is not None and (not on_cpu() or count <= _MOST_IN_BFLOAT16):
            sides[MLX_LM] = plain, x[None].astype(mx.bfloat16)
        if same is not None:
            sides[FLOAT32] = same, x[None]
        mx.eval([tokens for _, tokens in sides.values()])
        blocks = [partial(_milliseconds, model.model.layers[0].mlp, tokens) for model, tokens in sides.values()]
        what = f"MoE block, {shape.removeprefix('Qwen3-')} 4-bit, T = {count}"
        settings.tell(what)
        turns = settings.turns(3 if count > 64 else 7, quick=1 if count in _SLOW else 3)
        numbers = take_turns(blocks, turns, is_warm=settings.quick and count > 64)
        yield from compared(what, "ms", dict(zip(sides, numbers, strict=True)))


def _milliseconds(block: Callable[[mx.array], mx.array], x: mx.array) -> float:
    started = now()
    mx.eval(block(x))
    return (now() - started) * 1e3
