"""Products of many rows with a plain matrix by MLX's own CPU code, which is quicker where the matrix is turned.

The BLAS in MLX's wheel takes half the time or less where a matrix lies as `[in, out]`; each output is the same sum, to
the last bit. To turn a matrix takes as long as some five rows of a product: it is turned for more, a block at a time.
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen.model.blocks import by_blocks

__all__ = ["turned_product", "turns"]

_TILE = 32
"""Outputs that are turned together: what a core writes to then stays in its nearest cache."""

_FROM = 8
"""Rows from which on to turn a matrix is a gain."""

_LEAST = 1 << 18
"""Numbers of a matrix for which MLX's steps are worth their time."""


def turns(count: int, rows: mx.array) -> bool:
    """Whether so many rows are multiplied more quickly by the rows `[out, in]` of a float32 matrix if it is turned."""
    return count >= _FROM and rows.size >= _LEAST and len(rows) % _TILE == 0 and rows.dtype == mx.float32


def turned_product(x: mx.array, rows: mx.array, cores: int = 1) -> mx.array:
    """`[N, in]` through the rows `[out, in]` of a matrix, as many as `turns` takes → `[N, out]`; see `by_blocks`.

    Args:
        x: activations in float32.
        rows: of the matrix; they lie one after another in memory.
        cores: that may compute.
    """
    out, width = rows.shape

    def product(cut: slice) -> mx.array:
        tiles = mx.contiguous(rows[cut].reshape(-1, _TILE, width).swapaxes(1, 2))
        return (x @ tiles).swapaxes(0, 1).reshape(len(x), -1)

    return by_blocks(product, out, width, len(x), cores, _TILE)
