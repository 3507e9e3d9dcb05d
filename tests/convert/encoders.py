"""Independent NumPy encoders and decoders of every source format, each straight from the format's definition.

They place codes bit by bit and share nothing with the converter. Codes are `[out, in]`, zeros and scales
`[out, groups]`; encoders return tensors under the names that they bear in a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Grouped:
    """An integer-quantized weight: `w[o, i] = (codes[o, i] − zeros[o, g]) · scales[o, g]`, `g = groups[i]`."""

    codes: npt.NDArray[np.int64]
    zeros: npt.NDArray[np.int64]
    scales: npt.NDArray[np.floating]
    groups: npt.NDArray[np.int64]

    @property
    def weight(self) -> Floats:
        """float32 `[out, in]`."""
        difference = (self.codes - self.zeros[:, self.groups]).astype(np.float32)
        return difference * self.scales.astype(np.float32)[:, self.groups]


def quantize_grouped(
    weight: Floats,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    groups: npt.NDArray[np.int64] | None = None,
    scale_dtype: npt.DTypeLike = np.float16,
) -> Grouped:
    """Rounds a weight to a grid from the least to the greatest of each group (or about zero, if symmetric)."""
    out, width = weight.shape
    size = width if group_size == -1 else group_size
    if groups is None:
        groups = np.arange(width) // size
    count, top = int(groups.max()) + 1, 2**bits - 1
    zeros, scales = np.zeros((out, count), np.int64), np.zeros((out, count), scale_dtype)
    for group in range(count):
        part = weight[:, groups == group].astype(np.float64)
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scale = np.maximum((high - low) / top, 1e-5).astype(scale_dtype)
        scales[:, group] = scale
        zeros[:, group] = (top + 1) // 2 if symmetric else np.clip(np.rint(-low / scale.astype(np.float64)), 0, top)
    codes = np.rint(weight / scales.astype(np.float64)[:, groups]).astype(np.int64) + zeros[:, groups]
    return Grouped(np.clip(codes, 0, top), zeros, scales, groups)


def pack_words(codes: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int32]:
    """Codes `[rows, n]` → int32 `[rows, ceil(n · bits / 32)]`, one stream of bits for each row, low bits first."""
    rows, count = codes.shape
    stream = np.zeros((rows, -(-count * bits // 32) * 32), np.uint8)
    for bit in range(bits):
        stream[:, bit : count * bits : bits] = (codes >> bit) & 1
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def unpack_words(words: Array, bits: int, count: int) -> npt.NDArray[np.int64]:
    """What `pack_words` packed."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    codes = np.zeros((len(words), count), np.int64)
    for bit in range(bits):
        codes += stream[:, bit::bits].astype(np.int64) << bit
    return codes


def unpack_affine(weight: Array, scales: Array, biases: Array, bits: int) -> Floats:
    """MLX's affine form → float32: `scale · code + bias`."""
    groups = scales.shape[-1]
    codes = unpack_words(weight, bits, weight.shape[-1] * 32 // bits).reshape(len(weight), groups, -1)
    values = codes * scales.astype(np.float64)[..., None] + biases.astype(np.float64)[..., None]
    return values.reshape(len(weight), -1).astype(np.float32)


def encode_awq(grouped: Grouped) -> dict[str, Array]:
    """AutoAWQ's GEMM layout."""

    def pack(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
        for nibble, column in enumerate(AWQ_ORDER):
            words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
        return words.view(np.int32)

    return {
        "qweight": pack(grouped.codes.T),
        "qzeros": pack(grouped.zeros.T),
        "scales": np.ascontiguousarray(grouped.scales.T),
    }


def encode_gptq(grouped: Grouped, bits: int, *, zero_offset: int = 1) -> dict[str, Array]:
    """AutoGPTQ's layout; `zero_offset` 0 is the second version of it. Zeros lie in `zero_offset …`."""
    return {
        "qweight": np.ascontiguousarray(pack_words(grouped.codes, bits).T),
        "qzeros": pack_words((grouped.zeros - zero_offset).T, bits),
        "scales": np.ascontiguousarray(grouped.scales.T),
        "g_idx": grouped.groups.astype(np.int32),
    }


def encode_compressed_tensors(grouped: Grouped, bits: int, *, symmetric: bool) -> dict[str, Array]:
    """compressed-tensors' pack-quantized; symmetric zeros are `2**(bits − 1)` and not stored."""
    tensors: dict[str, Array] = {
        "weight_packed": pack_words(grouped.codes, bits),
        "weight_scale": grouped.scales,
        "weight_shape": np.array(grouped.codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack_words(grouped.zeros.T, bits).T)
    return tensors


def fp8_table() -> Floats:
    """The value of every E4M3 code: sign, 4 bits of exponent biased by 7, 3 of mantissa; 0x7F and 0xFF are NaN."""
    table = np.zeros(256, np.float32)
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        table[code] = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    table[127] = np.nan
    table[128:] = -table[:128]
    return table


def round_to_fp8(values: npt.NDArray[np.floating]) -> Codes:
    """The nearest E4M3 code, ties to an even mantissa, saturating at 448."""
    magnitudes = fp8_table()[:127].astype(np.float64)
    target = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    upper = np.clip(np.searchsorted(magnitudes, target), 1, 126)
    lower = upper - 1
    below, above = target - magnitudes[lower], magnitudes[upper] - target
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    codes = np.where(take_upper, upper, lower).astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) << 7)


def round_to_bf16(values: npt.NDArray[np.floating]) -> Floats:
    """float32 values that bfloat16 holds, nearest with ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def bf16_bytes(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to bfloat16: what a BF16 tensor holds on disk."""
    return (round_to_bf16(values).view(np.uint32) >> 16).astype(np.uint16)


def encode_fp8(
    weight: Floats, block: tuple[int, int] | None = (128, 128), *, bf16_scales: bool = True
) -> tuple[Codes, Floats]:
    """Codes `[out, in]` and the scales that multiply them; blocks at the edges may be ragged.

    Args:
        weight: float32.
        block: `(height, width)`; `(1, in)` is a scale for each row; None one for the whole tensor, of shape [1].
        bf16_scales: rounds the scales to bfloat16 values, as Qwen's releases have them.
    """
    height, width = block or weight.shape
    rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
    scales = np.zeros((rows, columns), np.float32)
    codes = np.zeros(weight.shape, np.uint8)
    for row in range(rows):
        for column in range(columns):
            part = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
            scale = np.float32(max(float(np.abs(weight[part]).max()) / 448, 1e-12))
            scales[row, column] = round_to_bf16(np.array([scale]))[0] if bf16_scales else scale
            codes[part] = round_to_fp8(weight[part] / np.float64(scales[row, column]))
    return codes, scales if block is not None else scales.reshape(1)


def decode_fp8(codes: Codes, scales: Floats, block: tuple[int, int]) -> Floats:
    """float32 `[out, in]`, element by element as the format defines it."""
    rows, columns = np.indices(codes.shape)
    return fp8_table()[codes] * scales[rows // block[0], columns // block[1]]
