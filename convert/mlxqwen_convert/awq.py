"""AWQ's GEMM layout (AutoAWQ): 4-bit codes, eight output columns in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

`qweight` int32 `[in, out / 8]`, `qzeros` int32 `[in / group, out / 8]`, `scales` `[in / group, out]`, and
`w[out, in] = (code − zero) · scale`. Every function takes any tile of whole groups and whole words: columns are rows
of the result.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxqwen_convert import integer
from mlxqwen_convert.affine import Packed, unpack
from mlxqwen_convert.scales import check_scales, refuse_zero_scales

__all__ = ["NIBBLES", "check", "dequantize", "repack"]

_BITS = 4
# The nibble of a word that holds each of its columns.
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


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
    """uint32 `[out, in / 8]` from `[in, out / 8]`."""
    import numpy as np  # not all conversions need it

    from mlxqwen_convert.awq_words import mlx_words

    words: Any = mlx_words(np.asarray(qweight).view(np.uint32))
    return mx.array(words)


def _zeros(qzeros: mx.array) -> mx.array:
    """float32 `[out, groups]`."""
    nibbles = unpack(qzeros, _BITS).reshape(len(qzeros), -1, 8)[..., mx.array(NIBBLES)]
    return mx.contiguous(nibbles.reshape(len(qzeros), -1).T).astype(mx.float32)
