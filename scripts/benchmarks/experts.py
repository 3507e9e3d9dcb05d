"""One block of experts, of true shape and quantized, on so many tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from benchmarks.checkpoints import checkpoint
from benchmarks.clock import now
from benchmarks.comparison import Comparison, take_turns
from benchmarks.settings import Settings
from benchmarks.sides import FLOAT32, MLX_LM, Ours, Theirs

__all__ = ["moe"]

DEFAULT_SHAPE = "Qwen3-30B-A3B"
_MOST_IN_BFLOAT16 = 8  # tokens; mlx-lm would take minutes for more on a CPU


def moe(settings: Settings) -> list[Comparison]:
    """Milliseconds for 1, 8, 64 and 512 tokens through one 4-bit block."""
    shape = next((name for name in settings.shapes if "-A" in name), DEFAULT_SHAPE)
    folder = checkpoint(settings, 4, shape=shape, layers=1)
    ours = Ours.load(folder).model
    plain = Theirs.load(folder).model
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    same = Theirs.load(folder, mx.float32).model if on_cpu else plain
    rows = []
    for count in (1, 8, 64) if settings.quick else (1, 8, 64, 512):
        x = mx.random.normal((count, ours.config.hidden_size), key=mx.random.key(count))
        sides = {"mlxqwen": (ours, x.astype(ours.dtype))}
        if not on_cpu or count <= _MOST_IN_BFLOAT16:
            sides[MLX_LM] = plain, x[None].astype(mx.bfloat16)
        if on_cpu:
            sides[FLOAT32] = same, x[None]
        mx.eval([tokens for _, tokens in sides.values()])
        blocks = [partial(_milliseconds, model.model.layers[0].mlp, tokens) for model, tokens in sides.values()]
        what = f"MoE block, {shape.removeprefix('Qwen3-')} 4-bit, T = {count}"
        settings.tell(what)
        numbers = take_turns(blocks, settings.turns(3 if count > 64 else 7))
        for beside, theirs in zip([*sides][1:], numbers[1:], strict=True):
            rows.append(Comparison(what, beside, "ms", numbers[0], theirs))
    return rows


def _milliseconds(block: Callable[[mx.array], mx.array], x: mx.array) -> float:
    started = now()
    mx.eval(block(x))
    return (now() - started) * 1e3
