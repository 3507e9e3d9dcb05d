"""Attention on a CPU: some heads and queries at a time, each core others.

MLX's attention has no kernel there: it multiplies head by head on one core. With OpenBLAS most of the time goes into
the softmax, which is computed in powers. With MLX's own products its softmax is kept, and all numbers to the last bit.
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen.cache.placement import Step
from mlxqwen.device import Device
from mlxqwen.model.cores import on_core, ranges
from mlxqwen.model.exponential import softmax

__all__ = ["attend_by_head", "attend_token"]

_MOST_SCORES = 1 << 20
"""Numbers that a core computes at a time; 4 MiB."""
_SMALLEST_BLOCK = 16  # queries
_UNSEEN = mx.finfo(mx.float32).min  # a query that sees nothing, as padding may, gets no nonsense


def attend_by_head(
    queries: mx.array, keys: mx.array, values: mx.array, plan: Step, scale: float, device: Device
) -> mx.array:
    """Queries `[B, num_attention_heads, L, head_dim]` on keys and values `[B, num_key_value_heads, S, head_dim]`,
    evaluated.

    Args:
        queries, keys: rotated.
        plan: which slots each query may see.
        scale: of the scores.
        device: that computes.
    """
    weights_of = softmax if device.multiplies_by_openblas else _precise_softmax
    B, heads, L, head_dim = queries.shape
    kv_heads, S = keys.shape[1:3]
    group = heads // kv_heads
    queries = (queries * scale).reshape(B, kv_heads, group, L, head_dim)
    at_once = len(ranges(kv_heads, device.cores, 2 * queries.size * S))
    length = min(L, max(_SMALLEST_BLOCK, _MOST_SCORES // (B * group * S)))
    together = min(-(-kv_heads // at_once), max(1, _MOST_SCORES // (B * group * S * length)))
    parts = [(start, plan.part(start, min(start + length, L))) for start in range(0, L, length)]
    blocks = [(slice(head, head + together), *part) for part in parts for head in range(0, kv_heads, together)]
    outputs: list[mx.array] = []
    for first in range(0, len(blocks), at_once):
        for core, (head, start, part) in enumerate(blocks[first : first + at_once]):
            with on_core(core):
                seen = slice(part.visible if isinstance(part.mask, str) else S)
                scores = _grouped(queries[:, head, :, start : start + length]) @ keys[:, head, seen].swapaxes(-1, -2)
                if part.mask_array is not None:
                    by_query = scores.reshape(B, -1, group, part.length, scores.shape[-1])
                    scores = mx.where(part.mask_array[:, :, None], by_query, _UNSEEN).reshape(scores.shape)
                mixed = weights_of(scores) @ values[:, head, seen]
                outputs.append(mixed.reshape(B, -1, part.length, head_dim))
        mx.eval(outputs[first:])  # MLX allocates what it has been asked for: all blocks at once, if it is let
    count = len(blocks) // len(parts)
    by_part = [mx.concatenate(outputs[first : first + count], axis=1) for first in range(0, len(outputs), count)]
    return mx.concatenate(by_part, axis=2)


def attend_token(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float) -> mx.array:
    """One query a head, `[B, num_attention_heads, 1, head_dim]`, in float32: `attend_by_head` on one core, all at once.

    Nothing is evaluated. `mask` is `[B, 1, 1, S]`.
    """
    B, _, _, head_dim = queries.shape
    scores = (queries * scale).reshape(B, keys.shape[1], -1, head_dim) @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, _UNSEEN)
    return (softmax(scores) @ values).reshape(queries.shape)


def _precise_softmax(scores: mx.array) -> mx.array:
    return mx.softmax(scores, axis=-1, precise=True)


def _grouped(queries: mx.array) -> mx.array:
    """`[B, kv_heads, group, L, head_dim]` → `[B, kv_heads, group * L, head_dim]`: all that look at the same keys."""
    B, kv_heads, _, _, head_dim = queries.shape
    return queries.reshape(B, kv_heads, -1, head_dim)
