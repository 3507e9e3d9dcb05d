"""GPTQ (AutoGPTQ, GPTQModel), 4 and 8 bit.

`qweight` int32 `[in · bits / 32, out]` packed along the input, `qzeros` int32 `[groups, out · bits / 32]` packed along
the output, `scales` `[groups, out]`, `g_idx` int32 `[in]` the group of each input; `w[out, in] = (code − zero) ·
scale`. The first format stores `zero − 1`, `checkpoint_format: gptq_v2` the zero itself. Every function takes any
range of columns of whole words: columns are rows of the result.

In the first format the largest value that can be stored stands for a zero of `2**bits`, one beyond the codes: one is
added after the bits are taken apart, as most loaders do. (One that masks after adding reads it as 0, which its own
quantizer would have to store as −1, a borrow from the next zero.)
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen_convert import integer
from mlxqwen_convert.affine import Packed, unpack
from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.scales import check_scales, first_true, refuse_zero_scales

__all__ = ["BITS", "check", "check_groups", "dequantize", "in_order", "repack"]

BITS = (4, 8)


def in_order(g_idx: mx.array, group_size: int) -> bool:
    """Whether group k holds the inputs from `k · group_size` on, so that codes can be repacked as they are.

    All −1 is what compressed-tensors writes for a `g_idx` that is not used.
    """
    in_order = mx.array_equal(g_idx, mx.arange(g_idx.size) // group_size)
    return bool((in_order | (g_idx == -1).all()).item())


def check_groups(g_idx: mx.array, groups: int, *, name: str) -> None:
    """Raises `SourceError` if an input belongs to a group that is not there."""
    bad = (g_idx < 0) | (g_idx >= groups)
    if bad.any().item():
        (index,) = first_true(bad)
        raise SourceError(
            f"{name}: input {index} is in group {g_idx[index].item()}, expected 0 to {groups - 1}",
            hint="No quantizer writes such a group: use another release of the model.",
        )


def repack(
    qweight: mx.array,
    qzeros: mx.array,
    scales: mx.array,
    bits: int,
    dtype: mx.Dtype = mx.float16,
    *,
    zero_offset: int = 1,
) -> Packed:
    """The same codes in MLX's layout, for inputs that are `in_order`.

    Args:
        bits: 4 or 8.
        dtype: of the scales and biases returned; the bias `−zero · scale` is rounded to it.
        zero_offset: what to add to the stored zeros: 1, or 0 for `gptq_v2`.
    """
    words = mx.contiguous(qweight.T)
    group_size = words.shape[1] * 32 // bits // len(scales)
    return integer.repack(words, _zeros(qzeros, bits, zero_offset), scales.T, group_size, dtype, "GPTQ")


def dequantize(
    qweight: mx.array,
    qzeros: mx.array,
    scales: mx.array,
    bits: int,
    g_idx: mx.array | None = None,
    *,
    zero_offset: int = 1,
) -> mx.array:
    """float32 `[out, in]`; `g_idx` None stands for inputs in order."""
    codes, zeros = unpack(qweight.T, bits), _zeros(qzeros, bits, zero_offset)
    columns = mx.contiguous(scales.T)
    return integer.dequantize(codes, zeros, columns, g_idx)


def check(
    qweight: mx.array,
    qzeros: mx.array,
    scales: mx.array,
    bits: int,
    g_idx: mx.array | None = None,
    *,
    zero_offset: int = 1,
    name: str,
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Raises `SourceError` for a scale that is NaN, infinite, or zero over codes that are not. Scales may be negative.

    Args:
        name: of the scales' tensor.
        origin: where `scales` begins in it: group and column.
    """
    if not check_scales(scales, name, origin, signed=True):
        return
    codes, zeros, columns = unpack(qweight.T, bits), _zeros(qzeros, bits, zero_offset), mx.contiguous(scales.T)
    lost = integer.lost_codes(codes, zeros, columns, g_idx)
    refuse_zero_scales(lost.T, name, origin)


def _zeros(qzeros: mx.array, bits: int, zero_offset: int) -> mx.array:
    """float32 `[out, groups]`."""
    return unpack(qzeros, bits).T.astype(mx.float32) + zero_offset
