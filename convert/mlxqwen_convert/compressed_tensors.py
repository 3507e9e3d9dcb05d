"""compressed-tensors `pack-quantized`: int4 and int8 weights, symmetric or not, by group or by row.

`weight_packed` int32 `[out, ceil(in · bits / 32)]`, low bits first, holds the signed code plus `2**(bits − 1)`;
`weight_scale` `[out, groups]`; without symmetry `weight_zero_point` int32 `[ceil(out · bits / 32), groups]` is packed
the same way along the *output*; `weight_g_idx` `[in]` the group of each input, where inputs were reordered;
`weight_shape` the two sizes. `w = (code − zero) · scale`. FP8 weights of the same family (`float-quantized`) are
those of `fp8`. Every function takes any range of rows, from a multiple of `32 / bits` on if there are zero points.
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen_convert import integer
from mlxqwen_convert.affine import Packed, unpack
from mlxqwen_convert.scales import check_scales, refuse_zero_scales

__all__ = ["BITS", "are_symmetric", "check", "dequantize", "repack", "zero_point_rows"]

BITS = (4, 8)


def zero_point_rows(start: int, stop: int, bits: int) -> slice:
    """The words of `weight_zero_point` for the weight's rows from `start`, a multiple of `32 / bits`, up to `stop`."""
    return slice(start * bits // 32, -(-stop * bits // 32))


def repack(
    packed: mx.array,
    scale: mx.array,
    zero_point: mx.array | None,
    bits: int,
    width: int,
    dtype: mx.Dtype = mx.float16,
) -> Packed:
    """The same codes in MLX's layout, for inputs that are in order.

    Args:
        packed, scale, zero_point: rows of the tensors; no zero point means symmetric codes.
        bits: 4 or 8.
        width: `in`, a multiple of 32.
        dtype: of the scales and biases returned; the bias `−zero · scale` is rounded to it.
    """
    zeros = _zeros(zero_point, scale, bits)
    return integer.repack(packed, zeros, scale, width // scale.shape[1], dtype, "compressed-tensors")


def dequantize(
    packed: mx.array,
    scale: mx.array,
    zero_point: mx.array | None,
    bits: int,
    width: int,
    g_idx: mx.array | None = None,
) -> mx.array:
    """float32 `[rows, width]`; `g_idx` None stands for inputs in order."""
    codes, zeros = unpack(packed, bits)[:, :width], _zeros(zero_point, scale, bits)
    return integer.dequantize(codes, zeros, scale, g_idx)


def check(
    packed: mx.array,
    scale: mx.array,
    zero_point: mx.array | None,
    bits: int,
    width: int,
    g_idx: mx.array | None = None,
    *,
    name: str,
    row_offset: int = 0,
) -> None:
    """Raises `SourceError` for a scale that is NaN, infinite, or zero over codes that are not. Scales may be negative.

    Args:
        name: of the scales' tensor.
        row_offset: the tensor's row that the arrays begin with.
    """
    if check_scales(scale, name, (row_offset, 0), signed=True):
        codes = unpack(packed, bits)[:, :width]
        lost = integer.lost_codes(codes, _zeros(zero_point, scale, bits), scale, g_idx)
        refuse_zero_scales(lost, name, (row_offset, 0))


def are_symmetric(zero_point: mx.array, bits: int, rows: int) -> bool:
    """Whether packed zero points, of `rows` rows of the weight at most, are all the one that symmetric codes have."""
    zeros = unpack(zero_point.T, bits)[:, : max(0, rows)]
    return bool((zeros == 2 ** (bits - 1)).all().item())


def _zeros(zero_point: mx.array | None, scale: mx.array, bits: int) -> mx.array:
    """float32 `[rows, groups]`, counted as the unsigned codes are."""
    if zero_point is None:
        return mx.full(scale.shape, 2 ** (bits - 1), dtype=mx.float32)
    return unpack(zero_point.T, bits).T[: len(scale)].astype(mx.float32)
