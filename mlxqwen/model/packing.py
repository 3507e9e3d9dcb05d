"""Rows of several lengths without their padding: what computes each token by itself sees those that count alone."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

__all__ = ["Packing"]


class Packing:
    """Where the tokens that count stand in `B` rows that are padded on the right to `L` tokens.

    Args:
        lengths: how many tokens of each row count, from 1 to `L`.
        length: `L`.
    """

    def __init__(self, lengths: Sequence[int], length: int) -> None:
        places: list[int] = []
        back: list[int] = []
        for row, count in enumerate(lengths):
            first = len(places)
            places += range(row * length, row * length + count)
            back += [*range(first, first + count), *[first + count - 1] * (length - count)]
        self._places = mx.array(places, dtype=mx.int32)
        self._back = mx.array(back, dtype=mx.int32)

    def pack(self, x: mx.array) -> mx.array:
        """`[B * L, ...]` → `[N, ...]`, the tokens that count, row after row."""
        return mx.take(x, self._places, axis=0)

    def unpack(self, x: mx.array) -> mx.array:
        """`[N, ...]` → `[B * L, ...]`; the padding repeats the last token of its row."""
        return mx.take(x, self._back, axis=0)
