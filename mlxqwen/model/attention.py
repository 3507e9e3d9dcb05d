"""Grouped-query attention with RMS-normalised queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.device import Device
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.linear import FusedLinear, fuse_children
from mlxqwen.model.packing import Packing
from mlxqwen.model.rope import Rope
from mlxqwen.model.watched import RMSNorm, WatchedModule

__all__ = ["Attention", "LayerCache", "Rotation"]


Rotation: TypeAlias = Callable[[mx.array], mx.array]
"""Rotates queries or keys `[B, heads, L, head_dim]` to where they stand."""


class LayerCache(Protocol):
    """One layer's key/value cache, as attention uses it.

    `rope` is what its keys are rotated by, if that is not the RoPE of the model.
    """

    rope: Rope | None

    @property
    def position(self) -> mx.array:
        """Where the first token of this step stands: int32, one for all rows or `[B]`."""
        ...

    def rotate(self, x: mx.array, rope: Rope) -> mx.array:
        """Rotate queries or keys of this step, `[B, heads, L, head_dim]`, to where they stand."""
        ...

    def attend(
        self, queries: mx.array, rotated: mx.array, keys: mx.array, values: mx.array, rope: Rope, scale: float
    ) -> mx.array:
        """Store the new keys and values, and attend to all that each query may see → the shape of `queries`.

        Args:
            queries: `[B, num_attention_heads, L, head_dim]`, not rotated.
            rotated: the queries at their positions.
            keys, values: `[B, num_key_value_heads, L, head_dim]`; the keys at their positions.
            rope: what queries are rotated by that look from elsewhere.
            scale: of the products.
        """
        ...


class Attention(WatchedModule):
    """`[B * L, hidden_size]` → `[B * L, hidden_size]`, causal within each of the `B` rows."""

    def __init__(self, config: ModelConfig, rope: Rope) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_attention_heads, self.num_key_value_heads = heads, kv_heads
        self.rope = rope
        self.head_dim = head_dim
        self.joins_heads = False
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, batch_size: int, cache: LayerCache | None = None) -> mx.array:
        return self.output(self.attend(*self.project(x, batch_size, self.rotation(cache)), cache))

    def project(
        self, x: mx.array, batch_size: int, rotate: Rotation, packing: Packing | None = None
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Queries `[B, heads, L, head_dim]`, the same rotated, keys, rotated, and values; `x` may be packed."""
        if "qkv_proj" in self:
            qkv = self["qkv_proj"](x)
        else:
            qkv = mx.concatenate([self["q_proj"](x), self["k_proj"](x), self["v_proj"](x)], axis=-1)
        if packing is not None:
            qkv = packing.unpack(qkv)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        by_head = _split_heads(qkv, batch_size, heads + 2 * kv_heads)
        if self.joins_heads and self._are_normed_alike(qkv.dtype):
            both, values = mx.split(by_head, [heads + kv_heads], axis=1)
            both = self._norm_together(both)
            rotated, keys = mx.split(rotate(both), [heads], axis=1)
            return both[:, :heads], rotated, keys, values
        queries, keys, values = mx.split(by_head, [heads, heads + kv_heads], axis=1)
        queries = self["q_norm"](queries)
        return queries, rotate(queries), rotate(self["k_norm"](keys)), values

    def _are_normed_alike(self, dtype: mx.Dtype) -> bool:
        """Whether one norm of both gives what two do: they may have been set."""
        q_norm, k_norm = self["q_norm"], self["k_norm"]
        return bool(q_norm.eps == k_norm.eps and q_norm["weight"].dtype == k_norm["weight"].dtype == dtype)

    def _norm_together(self, both: mx.array) -> mx.array:
        """`q_norm` of the first heads and `k_norm` of the others, `[B, heads + kv_heads, L, head_dim]`."""
        shape = (1, self.head_dim)
        weights = [
            mx.broadcast_to(self["q_norm"]["weight"], (self.num_attention_heads, *shape)),
            mx.broadcast_to(self["k_norm"]["weight"], (self.num_key_value_heads, *shape)),
        ]
        return mx.fast.rms_norm(both, None, self["q_norm"].eps) * mx.concatenate(weights)

    def attend(
        self,
        queries: mx.array,
        rotated: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: LayerCache | None = None,
    ) -> mx.array:
        """The mix of values that each query sees → the shape of `queries`."""
        rope, scale = self.rope_and_scale(cache)
        if cache is not None:
            return cache.attend(queries, rotated, keys, values, rope, scale)
        mask = "causal" if queries.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(rotated, keys, values, scale=scale, mask=mask)

    def rotation(self, cache: LayerCache | None) -> Rotation:
        """What rotates the queries and keys of a step."""
        rope, _ = self.rope_and_scale(cache)
        return partial(rope, offset=0) if cache is None else partial(cache.rotate, rope=rope)

    def rope_and_scale(self, cache: LayerCache | None) -> tuple[Rope, float]:
        """The RoPE of queries and keys, and what their products are multiplied by."""
        rope = self.rope if cache is None or cache.rope is None else cache.rope
        return rope, self.head_dim**-0.5 * rope.score_factor

    def output(self, attended: mx.array, packing: Packing | None = None) -> mx.array:
        """`[B, num_attention_heads, L, head_dim]` → `[B * L, hidden_size]`, or packed, `[N, hidden_size]`."""
        merged = _merge_heads(attended)
        return self["o_proj"](merged if packing is None else packing.pack(merged))

    def fuse(self, device: Device) -> None:
        """Fuse the projections of the input, if they are quantized alike, and the norms where that saves primitives."""
        self.joins_heads = not device.has_fast_kernels
        fuse_children(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj", FusedLinear, device)
        fuse_children(self, ("o_proj",), "o_proj", FusedLinear, device)


def _split_heads(x: mx.array, batch_size: int, heads: int) -> mx.array:
    """`[B * L, heads * head_dim]` → `[B, heads, L, head_dim]`; with one token a row nothing has to move."""
    tokens = x.shape[0]
    if tokens == batch_size:
        return x.reshape(batch_size, heads, 1, -1)
    return x.reshape(batch_size, tokens // batch_size, heads, -1).transpose(0, 2, 1, 3)


def _merge_heads(x: mx.array) -> mx.array:
    """`[B, heads, L, head_dim]` → `[B * L, heads * head_dim]`."""
    B, heads, L, head_dim = x.shape
    return (x if L == 1 else x.transpose(0, 2, 1, 3)).reshape(B * L, heads * head_dim)
