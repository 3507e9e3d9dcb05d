"""AWQ's GEMM layout (AutoAWQ): 4-bit codes, eight output columns in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

`qweight` int32 `[in, out / 8]`, `qzeros` int32 `[in / group, out / 8]`, `scales` `[in / group, out]`, and
`w[out, in] = (code − zero) · scale`. Every function takes any tile of whole groups and whole words: columns are rows
of the result.
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen_convert import integer
from mlxqwen_convert.affine import Packed, unpack
from mlxqwen_convert.scales import check_scales, refuse_zero_scales

__all__ = ["check", "dequantize", "repack"]

_BITS = 4
# The nibble that holds the column.
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def repack(qweight: mx.array, qzeros: mx.array, scales: mx.array, dtype: mx.Dtype = mx.float16) -> Packed:
    """The same codes in MLX's layout: `[out, in / 8]`, `scale = s`, `bias = −zero · s` rounded to `dtype`."""
    group_size = qweight.shape[0] // scales.shape[0]
    return integer.repack(_words(qweight), _zeros(qzeros), scales.T, group_size, dtype, "AWQ")


def dequantize(qweight: mx.array, qzeros: mx.array, scales: mx.array) -> mx.array:
    """float32 `[out, in]`."""
    return integer.dequantize(unpack(_words(qweight), _BITS), _zeros(qzeros), mx.contiguous(scales.T))


def check(
    qweight: mx.array, qzeros: mx.array, scales: mx.array, *, name: str, origin: tuple[int, int] = (0, 0)
) -> None:
    """Raises `SourceError` for a scale that is NaN, infinite, or zero over codes that are not. Scales may be negative.

    Args:
        name: of the scales' tensor.
        origin: where `scales` begins in it: group and column.
    """
    if check_scales(scales, name, origin, signed=True):
        lost = integer.lost_codes(unpack(_words(qweight), _BITS), _zeros(qzeros), mx.contiguous(scales.T))
        refuse_zero_scales(lost.T, name, origin)


def _words(qweight: mx.array) -> mx.array:
    """uint32 `[out, in / 8]` from `[in, out / 8]`: eight words are an 8 × 8 matrix of nibbles to transpose."""
    words = mx.contiguous(qweight).view(mx.uint32)
    width, columns = words.shape
    for half, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift, low = 4 * half, mx.array(mask, dtype=mx.uint32)
        pairs = words.reshape(-1, 2, half * columns)
        upper, lower = pairs[:, 0], pairs[:, 1]
        words = mx.stack([(upper & low) | ((lower & low) << shift), ((upper >> shift) & low) | (lower & ~low)], axis=1)
    nibbles = words.reshape(width // 8, 8, columns)
    columns_in_order = nibbles[:, mx.array(_NIBBLES)]
    return mx.contiguous(columns_in_order.transpose(2, 1, 0)).reshape(8 * columns, width // 8)


def _zeros(qzeros: mx.array) -> mx.array:
    """float32 `[out, groups]`."""
    nibbles = unpack(qzeros, _BITS).reshape(len(qzeros), -1, 8)[..., mx.array(_NIBBLES)]
    return mx.contiguous(nibbles.reshape(len(qzeros), -1).T).astype(mx.float32)
