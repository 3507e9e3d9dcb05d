"""What AWQ, GPTQ and compressed-tensors have in common: unsigned codes, zero points and scales by group.

All mean `w = (code − zero) · scale`, so that MLX's affine form is the same codes with `scale` and `−zero · scale`.
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen_convert.affine import Packed, repack_group_size
from mlxqwen_convert.errors import SourceError

__all__ = ["dequantize", "lost_codes", "repack"]


def repack(
    words: mx.array, zeros: mx.array, scales: mx.array, group_size: int, dtype: mx.Dtype, name: str = "weight"
) -> Packed:
    """MLX's form of the same codes; only `−zero · scale` is rounded, and `scale` where `dtype` is narrower.

    Args:
        words: uint32 or int32 `[rows, in · bits / 32]`, low bits first.
        zeros: float32 `[rows, groups]`.
        scales: any float dtype `[rows, groups]`.
        group_size: of the source; where MLX has none so large, scales and biases are repeated.
        dtype: of the scales and biases returned.

    Raises:
        SourceError: MLX has no group that divides the source's.
    """
    size = repack_group_size(group_size)
    if size is None:
        raise SourceError(
            f"{name}: groups of {group_size} cannot be repacked, expected a multiple of 32",
            hint="Dequantize and quantize again.",
        )
    scales = scales.astype(mx.float32)
    biases = (-zeros * scales).astype(dtype)
    scales = scales.astype(dtype)
    if group_size != size:
        scales, biases = (mx.repeat(part, group_size // size, axis=1) for part in (scales, biases))
    return Packed(mx.contiguous(words).view(mx.uint32), mx.contiguous(scales), mx.contiguous(biases))


def dequantize(codes: mx.array, zeros: mx.array, scales: mx.array, g_idx: mx.array | None = None) -> mx.array:
    """float32 `[rows, in]`: `(code − zero) · scale`, the difference exact and the product rounded once.

    Args:
        codes: uint8 `[rows, in]`.
        zeros, scales: `[rows, groups]`; without `g_idx`, groups divides `in`.
        g_idx: int `[in]`, the group of each input; None where they are in order.
    """
    zeros, scales = zeros.astype(mx.float32), scales.astype(mx.float32)
    if g_idx is None:
        groups = codes.reshape(*scales.shape, -1).astype(mx.float32)
        return ((groups - zeros[..., None]) * scales[..., None]).reshape(codes.shape)
    # inputs as rows, so that groups are fetched as whole rows
    zeros, scales = (mx.contiguous(part.T)[g_idx] for part in (zeros, scales))
    return mx.contiguous(((mx.contiguous(codes.T).astype(mx.float32) - zeros) * scales).T)


def lost_codes(codes: mx.array, zeros: mx.array, scales: mx.array, g_idx: mx.array | None = None) -> mx.array:
    """bool `[rows, groups]`: a zero scale over codes that differ from the zero point.

    Args:
        codes: uint8 `[rows, in]`.
        zeros, scales: `[rows, groups]`.
        g_idx: int `[in]`, the group of each input; None where they are in order.
    """
    if g_idx is None:
        return (scales == 0) & (codes.reshape(*scales.shape, -1) != zeros[..., None]).any(axis=-1)
    differ = (codes != zeros[:, g_idx]).astype(mx.int32)
    return (scales == 0) & (mx.zeros(scales.shape, dtype=mx.int32).at[:, g_idx].add(differ) > 0)
