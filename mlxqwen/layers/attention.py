"""Grouped-query attention with RMS-normalised queries and keys."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.config import ModelConfig
from mlxqwen.layers.rope import Rope

__all__ = ["Attention", "LayerCache"]


class LayerCache(Protocol):
    """What attention asks of one layer's key/value cache."""

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, rope: Rope, scale: float) -> mx.array:
        """Rotate and store the new keys and values, and attend to all that each query may see.

        `queries` is `[B, num_attention_heads, L, head_dim]`, `keys` and `values` are
        `[B, num_key_value_heads, L, head_dim]`, none of them rotated; the result has the shape of `queries`.
        """
        ...


class Attention(nn.Module):
    """`[B, L, hidden_size]` → `[B, L, hidden_size]`, causal."""

    def __init__(self, config: ModelConfig, rope: Rope) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_attention_heads, self.num_key_value_heads = heads, kv_heads
        self.rope = rope
        self.scale = head_dim**-0.5 * rope.score_factor
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        B, L, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(B, L, self.num_attention_heads, -1)).transpose(0, 2, 1, 3)
        keys = self.k_norm(self.k_proj(x).reshape(B, L, self.num_key_value_heads, -1)).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(B, L, self.num_key_value_heads, -1).transpose(0, 2, 1, 3)
        if cache is None:
            queries, keys = self.rope(queries, 0), self.rope(keys, 0)
            output = mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=self.scale, mask="causal" if L > 1 else None
            )
        else:
            output = cache.attend(queries, keys, values, rope=self.rope, scale=self.scale)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))
