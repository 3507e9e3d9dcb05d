"""How keys and values are stored: as computed, or in affine groups of 8 or 4 bits.

A stored tensor is a tuple of arrays whose second-last axis is the slot: `(x,)`, or `(codes, scales, biases)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import mlx.core as mx

__all__ = ["PlainStorage", "QuantizedStorage", "Storage", "Stored", "join_rows"]

Stored: TypeAlias = tuple[mx.array, ...]


class Storage(Protocol):
    """Encodes `[B, num_key_value_heads, S, head_dim]`, and computes the products of attention on the encoded form."""

    bits: int | None

    def encode(self, x: mx.array) -> Stored:
        """Encode keys or values."""
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


def join_rows(parts: Sequence[tuple[Stored, Sequence[int]]], capacity: int) -> Stored:
    """These rows of these tensors, in this order, in buffers of `capacity` slots; `()` stands for empty rows."""
    like = next((stored for stored, _ in parts if stored), ())
    return tuple(
        _join_part([(s[n] if s else None, rows) for s, rows in parts], x, capacity) for n, x in enumerate(like)
    )


def _join_part(parts: Sequence[tuple[mx.array | None, Sequence[int]]], like: mx.array, capacity: int) -> mx.array:
    _, heads, _, width = like.shape
    pieces: list[mx.array] = []
    for array, rows in parts:
        if array is None:
            pieces.append(mx.zeros((len(rows), heads, 0, width), dtype=like.dtype))
            continue
        pieces += [array[start:stop, :, :capacity] for start, stop in _runs(rows)]
    if all(piece.shape[2] == capacity for piece in pieces):
        return mx.contiguous(pieces[0]) if len(pieces) == 1 else mx.concatenate(pieces)
    joined, row = mx.zeros((sum(map(len, pieces)), heads, capacity, width), dtype=like.dtype), 0
    for piece in pieces:  # each is copied once, however many slots stay empty
        joined[row : row + len(piece), :, : piece.shape[2]] = piece
        row += len(piece)
    return joined


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive rows as `(start, stop)`: slices are cheaper than taking rows one by one."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield rows[start], rows[end - 1] + 1
            start = end
