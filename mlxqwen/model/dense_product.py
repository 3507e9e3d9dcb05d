"""Products with quantized weights: dequantized a block at a time, each core another one.

MLX's CPU backend unpacks quantized weights anew for every row, and takes five passes to dequantize them. Codes of 2, 4
and 8 bits are bytes, or parts of bytes, that can be taken out where they stand: the first codes of all bytes, then the
second ones. So a row's columns come in another order, and a code that stands k bits high is 2ᵏ times as large; the
activations are put into that order, and made smaller. A group's bias counts as often as its activations' sum says, so
it is not added to each weight.
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen.model.blocks import by_blocks
from mlxqwen.model.openblas_product import openblas_product

__all__ = ["Packed", "dense_product", "for_codes", "is_dense", "scaled_codes"]

Packed = tuple[mx.array, mx.array, mx.array]
"""Affine-quantized weights as MLX packs them: codes, scales, biases."""

_LEAST = 1 << 18
"""Multiplications of a product from which on its weights are dequantized: for fewer, MLX's steps take too long."""

_IN_BYTES = (2, 4, 8)  # bits


def is_dense(rows: float, numbers: int, dense_from: int) -> bool:
    """Whether rows go through a matrix of so many numbers more quickly dequantized; `dense_from` is `Device`'s."""
    return rows >= dense_from and rows * numbers >= _LEAST


def dense_product(x: mx.array, packed: Packed, group_size: int, bits: int, cores: int = 1) -> mx.array:
    """Rows `[N, in]` through affine-quantized weights → `[N, out]`; see `by_blocks`.

    Args:
        x: activations in float32.
        packed: `weight`, `[out, in * bits / 32]`, `scales` and `biases`, `[out, in / group_size]` in float32.
        group_size, bits: of the weights.
        cores: that may compute.
    """
    weight, scales, biases = packed
    activations = for_codes(x, bits)

    def product(cut: slice) -> mx.array:
        return openblas_product(activations, scaled_codes(weight[cut], scales[cut], group_size, bits))

    sums = x.reshape(len(x), -1, group_size).sum(axis=-1)
    return by_blocks(product, len(weight), x.shape[1], len(x), cores) + sums @ biases.T


def scaled_codes(weight: mx.array, scales: mx.array, group_size: int, bits: int) -> mx.array:
    """Weights without their biases in float32, `[out, in]` as they are multiplied by activations `for_codes`."""
    if bits not in _IN_BYTES:
        return mx.dequantize(weight, scales, mx.zeros_like(scales), group_size, bits)
    codes, places = weight.view(mx.uint8)[:, None], range(0, 8, bits)
    if len(places) > 1:
        codes = codes & mx.array([[((1 << bits) - 1) << place] for place in places], dtype=mx.uint8)
    by_group = codes.astype(mx.float32).reshape(len(weight), len(places), -1, group_size // len(places))
    return (by_group * scales[:, None, :, None]).reshape(len(weight), -1)


def for_codes(x: mx.array, bits: int) -> mx.array:
    """`[N, in]` with the columns first whose codes stand lowest in their bytes; those of others as much smaller."""
    places = range(0, 8, bits)
    if bits not in _IN_BYTES or len(places) == 1:
        return x
    by_place = x.reshape(len(x), -1, len(places)).swapaxes(1, 2)
    return (by_place * mx.array([[0.5**place] for place in places])).reshape(x.shape)
