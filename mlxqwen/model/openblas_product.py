"""Products with a matrix of float32 in the forms that OpenBLAS computes quickest.

OpenBLAS copies both matrices into an order of its own before it multiplies; of few rows that takes most of the time.
Small products it computes from where the matrices lie, on processors for which it has such kernels (see `Device`). So a
large matrix is multiplied in tiles of its rows, each a small product. On other processors that takes about as long.
"""

from __future__ import annotations

import math

import mlx.core as mx

__all__ = ["openblas_product"]

_SMALL = 1_000_000
"""Multiplications of the largest product that OpenBLAS takes for small."""

_LEAST_TILE = 16
"""Rows of a tile: smaller ones were no quicker than the whole."""

_NARROW = 512
"""Numbers of a row below which the plain product was the quickest at any number of activations."""

_FEW = 32
"""A matrix's rows have at least so many numbers for each row of activations: else putting the products into their order
takes longer than is won."""


def openblas_product(x: mx.array, rows: mx.array) -> mx.array:
    """`[..., in]` through the rows `[out, in]` of a matrix, which lie one after another in memory → `[..., out]`."""
    (out, width), count = rows.shape, x.size // x.shape[-1]
    if width < _NARROW or count * _FEW > width or x.size * out <= _SMALL:
        return x @ rows.T
    activations, tile = x.reshape(count, width), tile_of(x.size, out)
    if tile:
        products = (activations @ rows.reshape(-1, tile, width).swapaxes(1, 2)).swapaxes(0, 1)
    else:
        products = mx.contiguous((rows @ activations.T).T)
    return products.reshape(*x.shape[:-1], out)


def tile_of(numbers: int, out: int) -> int:
    """How many of `out` rows a tile has, a power of two that divides them, for so many activations; 0 for no tiles."""
    most = _SMALL // numbers
    tile = math.gcd(out, 1 << most.bit_length() - 1) if most else 0
    return tile if tile >= _LEAST_TILE else 0
