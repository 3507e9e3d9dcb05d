"""FP8 weights for the quantizer of `bfloat16`, and how far what it makes of them is from the source, in NumPy.

BF16 holds every E4M3 number: a table of all pairs of codes widens two weights at a time, and the scales come in where
weights become float32. The comparison goes another way, by MLX's own table and in the order of the file.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxqwen_convert import fp8
from mlxqwen_convert.bfloat16 import Floats, Quantized, Words
from mlxqwen_convert.buffers import Buffers

__all__ = ["Fp8Rows", "working_bytes"]

# Weights that are looked up or compared at once, at most, and a part of a chunk.
_PIECE = 1 << 16
_PIECES = 4
_SUMMED = 1 << 10
_BYTES_OF_GROUP = 80
_NAN = np.uint32(0x7FC0)
_LARGEST_SCALE = np.float32(2.0**48)  # 1,024 squares of 448 times as much are a float32


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
        """Whether all scales are above zero and leave room; what others mean, `fp8` knows."""
        return bool(self.scales.min() > 0 and self.scales.max() < _LARGEST_SCALE)

    def widen(self, weights: Words, start: int) -> None:
        """Fill uint16 with the BF16 numbers of the codes from that one on, not scaled."""
        pairs = self.codes[start : start + weights.size].view(np.uint16)
        for place in range(0, pairs.size, self._piece // 2):
            some = slice(place, place + self._piece // 2)
            np.take(_bfloat16_pairs(), pairs[some], out=weights.view(np.uint32)[some], mode="clip")

    def measured(self, found: Quantized) -> Quantized:
        """The same with its sums: of the squared differences from the source, and of the source's squares."""
        group_size, error, norm = found.group_size, 0.0, 0.0
        step = self._piece // group_size
        expected = self._buffers.array("expected", np.float32, step, group_size)
        meant = self._buffers.array("meant", np.float32, step, group_size)
        codes = self.codes.reshape(-1, group_size)
        packed = found.weight.reshape(len(codes), -1).view(np.uint8)
        for start in range(0, len(codes), step):
            some = slice(start, min(start + step, len(codes)))
            count = some.stop - start
            source, made = expected[:count], meant[:count]
            pairs = codes[some].reshape(-1).view(np.uint16)
            np.take(_float_pairs(), pairs, out=source.reshape(-1).view(np.complex64), mode="clip")
            np.multiply(source, self.scales[some, None], out=source)
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
    """What rows of so many weights hold at most, beside the quantizer's and the tables, which all threads share."""
    indices, compared = 4 * _piece(weights), 2 * 4 * _piece(weights)
    return weights + weights // group_size * _BYTES_OF_GROUP + indices + compared


def _piece(weights: int) -> int:
    """A whole number of groups of any size."""
    return max(1, min(_PIECE, weights // _PIECES) // _SUMMED) * _SUMMED


def _sum_of_squares(floats: Floats) -> float:
    """In rows short enough for float32, and for BLAS to leave other threads alone."""
    rows = floats.reshape(-1, _SUMMED if floats.size % _SUMMED == 0 else floats.shape[-1])
    return float(np.vecdot(rows, rows).sum(dtype=np.float64))


@cache
def _bfloat16_pairs() -> NDArray[np.uint32]:
    """Of each two codes, as they lie in the file, the two BF16 numbers as they would."""
    exact: Any = fp8.dequantize_rows(_all_codes(), mx.array([1.0])).astype(mx.bfloat16).view(mx.uint16)
    numbers = np.array(exact).reshape(-1).astype(np.uint32)
    numbers[0x7F::0x80] |= _NAN
    return (numbers | numbers[:, None] << np.uint32(16)).reshape(-1)


@cache
def _float_pairs() -> NDArray[np.complex64]:
    """Of each two codes, as they lie in the file, the two float32."""
    numbers = np.array(mx.from_fp8(_all_codes(), mx.float32)).reshape(-1)
    pairs = np.empty((256, 256, 2), np.float32)
    pairs[..., 0], pairs[..., 1] = numbers, numbers[:, None]
    return pairs.view(np.complex64).reshape(-1)


def _all_codes() -> mx.array:
    return mx.arange(256).astype(mx.uint8).reshape(1, -1)
