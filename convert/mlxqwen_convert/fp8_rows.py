"""FP8 weights for the quantizer of `bfloat16`, and how far what it makes of them is from the source, in NumPy.

BF16 and float32 have sign, exponent and mantissa in E4M3's order, and longer exponents. E4M3's bits, moved to where
theirs begin, are the same numbers in units of 2 ** 120, subnormals included. The units come in with the scales, where
weights become float32. The comparison goes another way, from the codes to float32 in the order of the file.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxqwen_convert.bfloat16 import Floats, Quantized, Quantizer, Words
from mlxqwen_convert.buffers import Buffers

__all__ = ["Fp8Rows", "working_bytes"]

# Weights that are compared at once, at most, and a part of a chunk.
_PIECE = 1 << 17
_PIECES = 4
_SUMMED = 1 << 10
_BYTES_OF_GROUP = 80
_UNITS = np.float32(2.0**120)
# Bits that a code is moved by, and those of its numbers there, the sign and seven more.
_TO_BFLOAT16, _BFLOAT16_BITS = np.int16(4), np.int16(0x07F0 - 0x8000)
_TO_FLOAT32, _FLOAT32_BITS = np.int32(20), np.int32(0x07F0_0000 - 0x8000_0000)
_NAN = 0x07F0  # E4M3's greatest code in BF16
_SMALLEST = np.array([1 << 20], np.int32).view(np.float32)  # its smallest in float32
_LARGEST_SCALE = np.float32(2.0**7)  # less than so many units are a float32


class Fp8Rows:
    """Codes of some rows, to be read into `codes`, and the scales of their groups.

    Args:
        form: rows and width.
        scale, block, row_offset: as of `fp8.dequantize_rows`; all weights of a group have one scale.

    Attributes:
        scales: float32 `[groups]`.
    """

    def __init__(
        self,
        form: tuple[int, int],
        group_size: int,
        scale: mx.array,
        block: tuple[int, int] | None,
        row_offset: int,
        buffers: Buffers,
    ) -> None:
        rows, groups = form[0], form[1] // group_size
        own = np.array(scale.astype(mx.float32))
        if block is None:
            by_group = np.broadcast_to(own.reshape(-1, 1), (rows, groups))
        else:
            block_of_rows = (np.arange(rows) + row_offset) // block[0] - row_offset // block[0]
            by_group = np.repeat(own, block[1] // group_size, axis=1)[block_of_rows, :groups]
        self.codes, self.scales = buffers.array("fp8", np.uint8, form[0] * form[1]), by_group.reshape(-1)
        self._piece = _piece(self.codes.size)
        self._buffers = buffers

    @property
    def are_usual(self) -> bool:
        """Whether all scales are above zero and leave room, and subnormals count; what is not usual, `fp8` can do."""
        # Libraries compiled with -ffast-math take subnormals for zeros, in all threads of those that load them.
        keeps_subnormals = (_SMALLEST * _UNITS).all()
        return bool(keeps_subnormals and self.scales.min() > 0 and self.scales.max() < _LARGEST_SCALE)

    def quantized(self, quantizer: Quantizer) -> Quantized | None:
        """What the rows become, without sums; None where they are not usual, or codes are NaN."""
        if not self.are_usual:
            return None
        return quantizer.quantize(self.widen, measure=False, factors=self.scales * _UNITS, infinity=_NAN)

    def widen(self, weights: Words, start: int) -> None:
        """Fill uint16 with the BF16 numbers of the codes from that one on, in their units and not scaled."""
        numbers = weights.view(np.int16)
        np.copyto(numbers, self.codes[start : start + numbers.size].view(np.int8))  # all upper bits are the sign's
        np.left_shift(numbers, _TO_BFLOAT16, out=numbers)
        np.bitwise_and(numbers, _BFLOAT16_BITS, out=numbers)

    def measured(self, found: Quantized) -> Quantized:
        """The same with its sums: of the squared differences from the source, and of the source's squares."""
        group_size, error, norm = found.group_size, 0.0, 0.0
        step = self._piece // group_size
        expected = self._buffers.array("expected", np.float32, step, group_size)
        meant = self._buffers.array("meant", np.float32, step, group_size)
        codes = self.codes.view(np.int8).reshape(-1, group_size)
        packed = found.weight.reshape(len(codes), -1).view(np.uint8)
        for start in range(0, len(codes), step):
            some = slice(start, min(start + step, len(codes)))
            count = some.stop - start
            source, made = expected[:count], meant[:count]
            bits = source.view(np.int32)
            np.copyto(bits, codes[some])
            np.left_shift(bits, _TO_FLOAT32, out=bits)
            np.bitwise_and(bits, _FLOAT32_BITS, out=bits)
            np.multiply(source, self.scales[some, None] * _UNITS, out=source)
            norm += _sum_of_squares(source)
            if found.bits == 8:
                np.copyto(made, packed[some])
            else:
                np.bitwise_and(packed[some], np.uint8(15), out=made[:, 0::2], casting="unsafe")
                np.right_shift(packed[some], np.uint8(4), out=made[:, 1::2], casting="unsafe")
            np.multiply(made, found.wide_scales[some, None], out=made)
            np.add(made, found.wide_biases[some, None], out=made)
            np.subtract(source, made, out=source)
            error += _sum_of_squares(source)
        return found._replace(squared_error=error, squared_norm=norm)


def working_bytes(weights: int, group_size: int) -> int:
    """What rows of so many weights hold at most, beside the quantizer's."""
    return weights + weights // group_size * _BYTES_OF_GROUP + 2 * 4 * _piece(weights)


def _piece(weights: int) -> int:
    """A whole number of groups of any size."""
    return max(1, min(_PIECE, weights // _PIECES) // _SUMMED) * _SUMMED


def _sum_of_squares(floats: Floats) -> float:
    """In rows short enough for float32, and for BLAS to leave other threads alone."""
    rows = floats.reshape(-1, _SUMMED if floats.size % _SUMMED == 0 else floats.shape[-1])
    return float(np.vecdot(rows, rows).sum(dtype=np.float64))
