"""How keys and values are stored: as they are, or in affine groups of 8 or 4 bits.

A stored tensor is a tuple of arrays whose second-last axis is the slot: `(x,)`, or `(codes, scales, biases)`.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import mlx.core as mx

__all__ = ["PlainStorage", "QuantizedStorage", "Storage", "Stored"]

Stored: TypeAlias = tuple[mx.array, ...]


class Storage(Protocol):
    """Encoding of `[B, num_key_value_heads, S, head_dim]`, and the two products of attention on the encoded form."""

    bits: int | None

    def encode(self, x: mx.array) -> Stored:
        """Keys or values as they will be stored."""
        ...

    def scores(self, queries: mx.array, keys: Stored) -> mx.array:
        """`queries` `[B, heads, N, head_dim]` times the keys → `[B, heads, N, S]`."""
        ...

    def mix(self, weights: mx.array, values: Stored) -> mx.array:
        """`weights` `[B, heads, N, S]` times the values → `[B, heads, N, head_dim]`."""
        ...


class PlainStorage:
    """Keys and values in the dtype they were computed in."""

    bits: int | None = None

    def encode(self, x: mx.array) -> Stored:
        return (x,)

    def scores(self, queries: mx.array, keys: Stored) -> mx.array:
        return queries @ keys[0].swapaxes(-1, -2)

    def mix(self, weights: mx.array, values: Stored) -> mx.array:
        return weights @ values[0]


class QuantizedStorage:
    """Keys and values in MLX's affine groups along `head_dim`."""

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits: int | None = bits
        self.group_size = group_size

    def encode(self, x: mx.array) -> Stored:
        return tuple(mx.quantize(x, group_size=self.group_size, bits=self.bits))

    def scores(self, queries: mx.array, keys: Stored) -> mx.array:
        return self._matmul(queries, keys, transpose=True)

    def mix(self, weights: mx.array, values: Stored) -> mx.array:
        return self._matmul(weights, values, transpose=False)

    def _matmul(self, x: mx.array, stored: Stored, *, transpose: bool) -> mx.array:
        codes, scales, biases = stored
        return mx.quantized_matmul(
            x, codes, scales, biases, transpose=transpose, group_size=self.group_size, bits=self.bits
        )
