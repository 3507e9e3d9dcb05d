"""Products of many rows with quantized weights: dequantized a block at a time, each core another one.

MLX's CPU backend unpacks quantized weights anew for every row, and takes five passes to dequantize them. Codes of 2, 4
and 8 bits are bytes, or parts of bytes, that can be taken out where they stand: the first codes of all bytes, then the
second ones. So a row's columns come in another order, and the activations are put into it, too.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx

from mlxqwen.model.cores import on_core, ranges

__all__ = ["Packed", "dense_product", "dequantized", "reordered"]

Packed = tuple[mx.array, mx.array, mx.array]
"""Affine-quantized weights as MLX packs them: codes, scales, biases."""

_BLOCK = 1 << 21
"""Numbers of a matrix that a core dequantizes at once: 8 MiB."""

_IN_BYTES = (2, 4, 8)  # bits


def dense_product(x: mx.array, packed: Packed, group_size: int, bits: int, cores: int = 1) -> mx.array:
    """Rows `[N, in]` through affine-quantized weights → `[N, out]`, evaluated.

    Each core's block is there before the next ones are begun: MLX's CPU backend runs ahead, and would hold the
    dequantized weights of many layers at once.

    Args:
        x: activations in float32.
        packed: `weight`, `[out, in * bits / 32]`, `scales` and `biases`, `[out, in / group_size]` in float32.
        group_size, bits: of the weights.
        cores: that may compute.
    """
    weight, scales, biases = packed
    x, rows = reordered(x, bits), len(weight)
    at_once = len(ranges(rows, cores, x.shape[0] * x.shape[1] * rows))
    count = -(-rows * x.shape[1] // (_BLOCK * at_once)) * at_once
    cuts = [slice(start, stop) for start, stop in pairwise(rows * number // count for number in range(count + 1))]
    outputs: list[mx.array] = []
    for first in range(0, count, at_once):
        for core, cut in enumerate(cuts[first : first + at_once]):
            with on_core(core):
                outputs.append(x @ dequantized((weight[cut], scales[cut], biases[cut]), group_size, bits).T)
        mx.eval(outputs[first:])
    return outputs[0] if count == 1 else mx.concatenate(outputs, axis=-1)


def dequantized(packed: Packed, group_size: int, bits: int) -> mx.array:
    """Weights `[out, in * bits / 32]` in float32, `[out, in]` with the columns in the order of `reordered`.

    The numbers are those of `mx.dequantize`: a code that is left standing 2ᵏ times as high has a scale of 2⁻ᵏ.
    """
    weight, scales, biases = packed
    if bits not in _IN_BYTES:
        return mx.dequantize(weight, scales, biases, group_size, bits)
    codes, places = weight.view(mx.uint8)[:, None], range(0, 8, bits)
    if len(places) > 1:
        codes = codes & mx.array([[((1 << bits) - 1) << place] for place in places], dtype=mx.uint8)
        scales = scales[:, None] * mx.array([[0.5**place] for place in places])
    else:
        scales = scales[:, None]
    by_group = codes.astype(mx.float32).reshape(*scales.shape, group_size // len(places))
    return (by_group * scales[..., None] + biases[:, None, :, None]).reshape(len(weight), -1)


def reordered(x: mx.array, bits: int) -> mx.array:
    """`[N, in]` with the columns first whose codes stand lowest in their bytes."""
    if bits not in _IN_BYTES or bits == 8:
        return x
    return x.reshape(len(x), -1, 8 // bits).swapaxes(1, 2).reshape(x.shape)
