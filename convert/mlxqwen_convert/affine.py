"""MLX's affine quantization: float32 rows ↔ packed codes with a scale and a bias for each group.

A group of `group_size` weights along the input shares one scale and one bias: `w ≈ scale · code + bias`. Codes are
unsigned, `bits` wide, and lie one behind the other, low bits first, in uint32 words. Rows never mix, so any split of
a tensor into row chunks gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import mlx.core as mx

from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.scales import first_true

__all__ = ["BITS", "GROUP_SIZES", "Packed", "check", "dequantize", "pack", "quantize", "repack_group_size"]
__all__ += ["squared_errors", "unpack"]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

# What MLX takes for the scale of a group whose weights are all alike.
_SMALLEST_SCALE = 1e-7
# Adding it rounds a float32 in 0 … 2²² to an integer, ties to even, which then lies in the low bits.
_ROUNDING = float(2**23)
# Shares of the range from the least to the greatest weight that the search starts from.
_SHARES = (1.0, 0.9, 0.8)
_REFITS = 2


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

    Scale and bias are those of `mx.quantize` in float32, rounded to `dtype`.

    Args:
        w: float32 `[rows, in]`, `in` a multiple of `group_size`.
        group_size: 32, 64 or 128 weights.
        bits: 2, 3, 4, 5, 6 or 8.
        dtype: of scales and biases.
        search: looks for the scale and bias of least squared error in each group, at several times the cost.
    """
    groups = w.astype(mx.float32).reshape(w.shape[0], -1, group_size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    scales, biases = _stored(*_full_range(low, high, 2**bits - 1), dtype)
    codes = _nearest_codes(groups, scales, biases, bits)
    if search:
        scales, biases, codes = _least_squares(groups, low, high, scales, biases, codes, bits)
    return Packed(pack(codes.reshape(w.shape), bits), scales, biases)


def dequantize(packed: Packed, group_size: int, bits: int) -> mx.array:
    """float32 `[rows, in]`: `scale · code + bias`."""
    scales, biases = packed.scales.astype(mx.float32), packed.biases.astype(mx.float32)
    return mx.dequantize(packed.weight, scales, biases, group_size, bits)


def squared_errors(w: mx.array, restored: mx.array) -> tuple[float, float]:
    """The sum of `(w − restored)²` and that of `w²`, from float32 `[rows, in]`."""
    sums = mx.stack([mx.square(w - restored).sum(axis=-1).sum(), mx.square(w).sum(axis=-1).sum()])
    error, total = cast(list[float], sums.tolist())
    return error, total


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
            hint="Download the model again, or choose a wider dtype for the scales.",
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


def _nearest_codes(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """uint8 `[rows, groups, group_size]`."""
    return _rounded_codes(groups, scales, biases, bits).view(mx.uint32).astype(mx.uint8)


def _rounded_codes(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """float32 codes, `_ROUNDING` added."""
    scale, bias = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]
    return mx.minimum(mx.maximum((groups - bias) / scale, 0.0), float(2**bits - 1)) + _ROUNDING


def _least_squares(
    groups: mx.array,
    low: mx.array,
    high: mx.array,
    scales: mx.array,
    biases: mx.array,
    codes: mx.array,
    bits: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """The best of several starts, each improved by turns: the best scale and bias for the codes, then the codes.

    The given scales, biases and codes are one of the candidates: no group gets worse.
    """
    dtype, top = scales.dtype, 2**bits - 1
    mean = groups.mean(axis=-1)
    middle = (low + high) / 2
    least = _squared_error(groups, codes.astype(mx.float32), scales, biases)
    for share in _SHARES:
        reach = (high - low) * (share / 2)
        trial_scale = mx.maximum(2 * reach / top, _SMALLEST_SCALE)
        trial = _stored(trial_scale, middle - reach, dtype)
        for _ in range(_REFITS + 1):
            floats = _rounded_codes(groups, *trial, bits) - _ROUNDING
            error = _squared_error(groups, floats, *trial)
            better = error < least
            least = mx.where(better, error, least)
            scales, biases = mx.where(better, trial[0], scales), mx.where(better, trial[1], biases)
            trial = _stored(*_fitted(groups, floats, mean, trial), dtype)
            mx.eval(least, scales, biases, *trial)
    return scales, biases, _nearest_codes(groups, scales, biases, bits)


def _squared_error(groups: mx.array, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    scale, bias = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]
    return mx.square(codes * scale + bias - groups).sum(axis=-1)


def _fitted(
    groups: mx.array, codes: mx.array, mean: mx.array, fallback: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    """The line of least squares from codes to weights; the fallback where all codes are equal."""
    code_mean = codes.mean(axis=-1)
    centred = codes - code_mean[..., None]
    spread = mx.square(centred).sum(axis=-1)
    slope = (centred * groups).sum(axis=-1) / mx.maximum(spread, 1e-30)
    usable = (spread > 0) & (mx.abs(slope) > _SMALLEST_SCALE)
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
