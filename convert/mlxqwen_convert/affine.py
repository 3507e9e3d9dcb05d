"""MLX's affine quantization: float32 rows ↔ packed codes with a scale and a bias for each group.

A group of `group_size` weights along the input shares one scale and one bias: `w ≈ scale · code + bias`. Codes are
unsigned, `bits` wide, and lie one behind the other, low bits first, in uint32 words. Rows never mix, so any split of
a tensor into row chunks gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.scales import first_true

__all__ = ["BITS", "GROUP_SIZES", "Packed", "check", "dequantize", "pack", "quantize", "repack_group_size"]
__all__ += ["sum_of_squares", "unpack"]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

# What MLX takes for the scale of a group whose weights are all alike.
_SMALLEST_SCALE = 1e-7
# Adding it rounds a float32 from 0 to 2²² to an integer, ties to even, which then lies in the low bits.
_ROUNDING = 2.0**23
# Shares of the range from the least to the greatest weight that the search starts from.
_SHARES = (1.0, 0.9, 0.8)
_REFITS = 2
# Bits at which weights far out are worth giving up for a finer grid; at more, one fit over the whole range is best.
_COARSE_BITS = (2, 3, 4, 5)


class Packed(NamedTuple):
    """Rows of one quantized tensor.

    Attributes:
        weight: uint32 `[rows, in · bits / 32]`.
        scales, biases: `[rows, in / group_size]`, float16, bfloat16 or float32.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array


def repack_group_size(group_size: int) -> int | None:
    """MLX's group size that holds codes of `group_size` as they are, with scales repeated; None if there is none."""
    return next((size for size in reversed(GROUP_SIZES) if group_size > 0 and group_size % size == 0), None)


def quantize(w: mx.array, group_size: int, bits: int, dtype: mx.Dtype, *, search: bool = False) -> Packed:
    """Quantizes rows, each code the nearest to its weight under the scale and bias as they are stored.

    Scale and bias are those of `mx.quantize` in float32, rounded to `dtype`. Weights that are not finite make scales
    or biases that are not, which `check` finds.

    Args:
        w: float32, or what float32 holds, `[rows, in]`, `in` a multiple of `group_size`.
        group_size: 32, 64 or 128 weights.
        bits: 2, 3, 4, 5, 6 or 8.
        dtype: of scales and biases.
        search: looks for the scale and bias of least squared error in each group, at several times the cost.
    """
    groups = w.astype(mx.float32).reshape(w.shape[0], -1, group_size)
    low, high = _extremes(groups)
    scales, biases = _stored(*_full_range(low, high, 2**bits - 1), dtype)
    if search:
        scales, biases = _least_squares(groups, low, high, scales, biases, bits)
    codes = _rounded_codes(groups, scales, biases, bits).view(mx.uint32).astype(mx.uint8)
    return Packed(pack(codes.reshape(w.shape), bits), scales, biases)


def dequantize(packed: Packed, group_size: int, bits: int) -> mx.array:
    """float32 `[rows, in]`: `scale · code + bias`, product and sum each rounded once."""
    rows, groups = packed.scales.shape
    codes = unpack(packed.weight, bits).reshape(rows, groups, group_size).astype(mx.float32)
    return (codes * _wide(packed.scales) + _wide(packed.biases)).reshape(rows, -1)


def sum_of_squares(rows: mx.array) -> mx.array:
    """Of float32 `[rows, in]`, not evaluated yet."""
    # down the rows first: MLX's quickest sum, and short enough for float32
    return mx.square(rows).sum(axis=0).sum()


def check(packed: Packed, name: str, row_offset: int = 0) -> None:
    """Raises `SourceError` if weights were not finite or do not fit the scales' dtype.

    Args:
        name: the tensor's, for the message.
        row_offset: the tensor's row that `packed` begins with.
    """
    bad = ~(mx.isfinite(packed.scales) & mx.isfinite(packed.biases))
    if bad.any().item():
        row, group = first_true(bad)
        dtype = str(packed.scales.dtype).rpartition(".")[2]
        raise SourceError(
            f"{name}: row {row_offset + row}, group {group} has weights that are not finite or too large for {dtype}, "
            "expected finite numbers",
            hint="Choose a wider --dtype for the scales, or use another release of the model.",
        )


def _full_range(low: mx.array, high: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """Scale and bias that reach from the least to the greatest weight, zero falling on a code, as MLX has them."""
    downward = mx.abs(low) > mx.abs(high)
    edge = mx.where(downward, low, high)
    scale = mx.maximum((high - low) / top, _SMALLEST_SCALE)
    scale = mx.where(downward, scale, -scale)
    steps = mx.round(edge / scale)
    at_zero = steps == 0
    return mx.where(at_zero, scale, edge / mx.where(at_zero, 1.0, steps)), mx.where(at_zero, 0.0, edge)


def _stored(scale: mx.array, bias: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    return scale.astype(dtype), bias.astype(dtype)


def _wide(per_group: mx.array) -> mx.array:
    """float32 `[rows, groups, 1]`, to meet weights `[rows, groups, group_size]`."""
    return per_group.astype(mx.float32)[..., None]


def _extremes(groups: mx.array) -> tuple[mx.array, mx.array]:
    """The least and the greatest of each group, `[rows, groups]`; in two steps, which MLX's CPU code does faster."""
    quarters = groups.reshape(*groups.shape[:2], 4, -1)
    return quarters.min(axis=2).min(axis=-1), quarters.max(axis=2).max(axis=-1)


def _rounded_codes(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """Codes in float32, `_ROUNDING` added."""
    steps = (groups - _wide(biases)) / _wide(scales)
    return mx.clip(steps, 0.0, float(2**bits - 1)) + _ROUNDING


def _least_squares(
    groups: mx.array, low: mx.array, high: mx.array, scales: mx.array, biases: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """The best of several starts, each improved by turns: the codes for scale and bias, scale and bias for the codes.

    The given scales and biases are one of the candidates: no group gets worse.
    """
    dtype, top = scales.dtype, 2**bits - 1
    mean = groups.mean(axis=-1)
    centred = groups - mean[..., None]
    codes = _rounded_codes(groups, scales, biases, bits) - _ROUNDING
    least = _group_errors(groups, codes, scales, biases)
    for share in _SHARES if bits in _COARSE_BITS else (1.0,):
        reach = (high - low) * (share / 2)
        middle = low + (high - low) / 2
        trial = _stored(mx.maximum(2 * reach / top, _SMALLEST_SCALE), middle - reach, dtype)
        for _ in range(1 + (_REFITS if bits in _COARSE_BITS else 1)):
            codes = _rounded_codes(groups, *trial, bits) - _ROUNDING
            error = _group_errors(groups, codes, *trial)
            better = error < least
            least = mx.where(better, error, least)
            scales, biases = mx.where(better, trial[0], scales), mx.where(better, trial[1], biases)
            trial = _stored(*_fitted(centred, codes, mean, trial), dtype)
            mx.eval(least, scales, biases, *trial)
    return scales, biases


def _group_errors(groups: mx.array, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return mx.square(codes * _wide(scales) + _wide(biases) - groups).sum(axis=-1)


def _fitted(
    centred: mx.array, codes: mx.array, mean: mx.array, fallback: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    """Scale and bias of least squares for given codes; the fallback where all codes of a group are equal.

    Args:
        centred: the weights, less `mean`, their mean in each group.
    """
    code_mean = codes.mean(axis=-1)
    spread = mx.square(codes).sum(axis=-1) - codes.shape[-1] * mx.square(code_mean)
    # Codes that are not all equal spread by more than a half; over those that are, the product sums to nothing.
    slope = (codes * centred).sum(axis=-1) / mx.maximum(spread, 0.5)
    usable = mx.abs(slope) > _SMALLEST_SCALE
    scale = mx.where(usable, slope, fallback[0].astype(mx.float32))
    return scale, mx.where(usable, mean - slope * code_mean, fallback[1].astype(mx.float32))


def pack(codes: mx.array, bits: int) -> mx.array:
    """uint8 codes `[..., n]`, each below `2**bits`, n a multiple of 32 → uint32 words `[..., n · bits / 32]`."""
    if bits == 8:
        return codes.view(mx.uint32)
    if bits == 4:
        pairs = codes.view(mx.uint16)
        return (pairs | (pairs >> 4)).astype(mx.uint8).view(mx.uint32)
    if bits == 2:
        fours = codes.view(mx.uint32)
        fours = fours | (fours >> 6)
        return (fours | (fours >> 12)).astype(mx.uint8).view(mx.uint32)
    eights = codes.view(mx.uint64)
    for lane in (8, 16, 32):
        used = bits * lane // 8
        shift = mx.array(lane - used, dtype=mx.uint64)
        eights = (eights & _lanes(0, used, 2 * lane)) | ((eights >> shift) & _lanes(used, used, 2 * lane))
    octets = eights.view(mx.uint8).reshape(*codes.shape[:-1], -1, 8)[..., :bits]
    return mx.contiguous(octets.reshape(*codes.shape[:-1], -1)).view(mx.uint32)


def unpack(packed: mx.array, bits: int) -> mx.array:
    """uint32 or int32 words `[..., n · bits / 32]` → uint8 codes `[..., n]`."""
    packed = mx.contiguous(packed)
    if bits == 8:
        return packed.view(mx.uint8)
    if bits == 4:
        pairs = packed.view(mx.uint8).astype(mx.uint16)
        return ((pairs | (pairs << 4)) & 0x0F0F).view(mx.uint8)
    if bits == 2:
        fours = packed.view(mx.uint8).astype(mx.uint32)
        fours = (fours | (fours << 12)) & 0x000F000F
        return ((fours | (fours << 6)) & 0x03030303).view(mx.uint8)
    octets = packed.view(mx.uint8).reshape(*packed.shape[:-1], -1, bits)
    padding = [(0, 0)] * (octets.ndim - 1) + [(0, 8 - bits)]
    eights = mx.contiguous(mx.pad(octets, padding)).view(mx.uint64)
    for lane in (32, 16, 8):
        used = bits * lane // 8
        shift = mx.array(lane - used, dtype=mx.uint64)
        eights = (eights & _lanes(0, used, 2 * lane)) | ((eights & _lanes(used, used, 2 * lane)) << shift)
    return eights.view(mx.uint8).reshape(*packed.shape[:-1], -1)


def _lanes(start: int, width: int, stride: int) -> mx.array:
    """A uint64 mask: `width` ones from bit `start` of every `stride` bits."""
    mask = sum(((1 << width) - 1) << (start + lane) for lane in range(0, 64, stride))
    return mx.array(mask, dtype=mx.uint64)
