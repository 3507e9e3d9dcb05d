"""BF16 and FP8 rows → 4- or 8-bit codes with BF16 scales, in NumPy, bit for bit as `affine.quantize`.

NumPy's loops use the widest vectors that the processor has, and write into buffers that stay in its cache; MLX's CPU
backend does neither, and takes three times as long.

A group is cut into units of eight weights. Blocks of groups are transposed unit by unit, so that what a group has one
of (extremes, scale, bias) lies along the last axis and meets its weights in long rows. The two weights of each 32-bit
word are widened apart, and their codes meet again when they are packed.

Threads take turns at Python's interpreter before and after each call: short calls would cost more in turns than in
work. Hence many weights at a time for the numbers of groups, and fewer, a block, for those of weights. Blocks have no
further axis: where a row meets several rows of several matrices, NumPy copies it into a buffer of its own each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlxqwen_convert.buffers import Buffers

__all__ = ["Quantized", "Quantizer", "Read", "working_bytes"]

Floats = NDArray[np.float32]
Words = NDArray[Any]
Read = Callable[[Words, int], None]
"""Fills uint16 with BF16 weights as they lie in the file, from that weight on."""

_UNIT = 8
_LANES = _UNIT // 2
_PASSING_BYTES_OF_GROUP = 40
_WEIGHTS_PER_BLOCK = 1 << 18
# Where groups of a block are a multiple of this, all its rows begin where a line of the cache does.
_WIDTH_STEP = 16
_SMALLEST_SCALE = np.float32(1e-7)  # as in `affine`
# BF16 next to a number so many steps from zero is 16 steps away at most.
_NEAR_STEPS = 1 << 12
_HALF, _UPPER_HALF = np.uint32(16), np.uint32(0xFFFF0000)
_SIGN, _MAGNITUDE, _INFINITY = 0x8000, 0x7FFF, 0x7F80


class Quantized(NamedTuple):
    """What became of some rows; buffers that the next rows are written into.

    Attributes:
        weight: packed codes, in the order of the file.
        scales, biases: BF16 as uint16, one for each group.
        wide_scales, wide_biases: the same in float32.
        squared_error: of what `weight` means, and
        squared_norm: of the weights; 0 if not measured.
    """

    group_size: int
    bits: int
    weight: Words
    scales: Words
    biases: Words
    wide_scales: Floats
    wide_biases: Floats
    squared_error: float
    squared_norm: float


class Quantizer:
    """Makes 4- or 8-bit codes of so many weights, whole groups of them.

    Attributes:
        form: weights, group size and bits, as given.
    """

    def __init__(self, weights: int, group_size: int, bits: int, buffers: Buffers) -> None:
        arrays = {name: buffers.array(name, *form) for name, form in _layout(weights, group_size, bits).items()}
        self.form, self._top, self._bits = (weights, group_size, bits), 2**bits - 1, np.uint32(bits)
        self._groups = weights // group_size
        self._units, self._greatest = arrays["units"], arrays["greatest"]
        self._scales, self._biases, self._weight = arrays["scales"], arrays["biases"], arrays["weight"]
        self._source, self._floats, self._codes = arrays["source"], arrays["floats"], arrays["codes"]
        self._sums = arrays["sums"]
        # Views, made once: nobody else has the interpreter meanwhile.
        _, units, width = self._units.shape
        self._source_units = self._source.view(np.complex128).reshape(width, units).T
        self._numbers, self._words = self._units.view(np.uint16), self._units.view(np.uint32)
        self._wide_even, self._wide_odd = self._floats.view(np.uint32)
        self._rows = self._floats.reshape(-1, width)
        self._even, self._odd = self._codes.view(np.uint32)
        self._packed = self._codes[0].view(self._weight.dtype)
        self._weight_by_unit = self._weight.swapaxes(1, 2)

    def quantize(
        self, read: Read, *, measure: bool, factors: Floats | None = None, infinity: int = _INFINITY
    ) -> Quantized | None:
        """What the weights that `read` gives become; None if weights or scales are not finite, or scales are zero.

        Args:
            read: gives BF16.
            measure: find the sums; only without factors.
            factors: float32 `[groups]`, above zero, by which weights are multiplied before they are quantized.
            infinity: the least BF16 magnitude that is no weight's.
        """
        blocks = range(len(self._units))
        for block in blocks:
            self._gather(block, read)
        with np.errstate(all="ignore"):
            low, high = self._extremes()
            if max((low & _MAGNITUDE).max(), (high & _MAGNITUDE).max()) >= infinity:
                return None
            by_lane, far = None, False
            if factors is None:
                scales, biases = _scales_and_biases(low, high, self._top)
            else:
                by_lane, factors = self._spread(factors)
                scales, biases, far = _of_floats(_wide(low) * factors, _wide(high) * factors, self._top)
                if (biases & _MAGNITUDE).max() >= _INFINITY:
                    return None
            magnitudes = scales & _MAGNITUDE
            if magnitudes.max() >= _INFINITY or not magnitudes.min():
                return None
            _repeat(scales, self._scales)
            _repeat(biases, self._biases)
            for block in blocks:
                self._widen(block, measure=measure)
                if by_lane is not None:
                    np.multiply(self._floats, by_lane[block], out=self._floats)
                self._quantize_block(block, far=far)
                if measure:
                    self._compare(block)
            error, norm = self._sums.sum(axis=(1, 2), dtype=np.float64).tolist() if measure else (0.0, 0.0)
        scales, biases = scales[: self._groups], biases[: self._groups]
        weight = self._weight.reshape(-1, self._weight.shape[-1])[: self._groups]
        return Quantized(*self.form[1:], weight, scales, biases, _wide(scales), _wide(biases), error, norm)

    def _gather(self, block: int, read: Read) -> None:
        """Read a block unit by unit, and find what is greatest in each lane."""
        start = block * self._source.size
        # Blocks are all alike: fewer groups than there are blocks are added to the last ones, of zeros.
        own = max(0, min(self._source.size, self.form[0] - start))
        if own:
            read(self._source[:own], start)
        self._source[own:] = 0
        np.copyto(self._units[block], self._source_units)
        numbers, greatest = self._numbers[block], self._greatest[:, block]
        np.maximum.reduce(numbers, axis=0, out=greatest[0])
        np.maximum.reduce(numbers.view(np.int16), axis=0, out=greatest[1].view(np.int16))

    def _extremes(self) -> tuple[Words, Words]:
        """The least and the greatest of each group, BF16.

        The number of a negative BF16 is above those of positive ones and rises with its magnitude: the greatest number
        is the least weight, if any is negative, and the greatest signed one is the greatest weight, if any is not.
        """
        unsigned, signed, spare = self._greatest
        low = _over_lanes(np.maximum, unsigned, spare)
        high = _over_lanes(np.maximum, signed.view(np.int16), spare.view(np.int16)).view(np.uint16)
        if low.min() < _SIGN or high.max() >= _SIGN:  # groups of one sign
            nearest_zero = _over_lanes(np.minimum, np.minimum.reduce(self._numbers, axis=1, out=unsigned), spare)
            return np.where(low < _SIGN, nearest_zero, low), np.where(high >= _SIGN, nearest_zero, high)
        return low, high

    def _widen(self, block: int, *, measure: bool) -> None:
        """A block's weights in float32; the sums of their squares."""
        words = self._words[block]
        np.left_shift(words, _HALF, out=self._wide_even)
        np.bitwise_and(words, _UPPER_HALF, out=self._wide_odd)
        if measure:
            np.vecdot(self._rows, self._rows, out=self._sums[1, block])

    def _spread(self, factors: Floats) -> tuple[Floats, Floats]:
        """Factors of all groups, for all lanes of a unit, as scales are; and by themselves, ones where groups end."""
        by_group = np.ones(self._scales.size // _LANES, np.float32)
        by_group[: self._groups] = factors
        return np.repeat(by_group, _LANES).reshape(self._scales.shape), by_group

    def _quantize_block(self, block: int, *, far: bool = False) -> None:
        """The block's packed codes. Its weights become their distances from the bias, in steps of the scale.

        Steps are between −½ and twice the greatest code, as the scale is the range of a group over the greatest code,
        but for what makes zero a code. Where a bias is not exact, they are a few more: see `_of_floats` for `far`.
        """
        floats, codes, odd = self._floats, self._codes, self._odd
        np.subtract(floats, self._biases[block], out=floats)
        np.divide(floats, self._scales[block], out=floats)
        if far:
            np.clip(floats, 0, self._top, out=floats)
        np.rint(floats, out=codes, casting="unsafe")
        np.clip(codes, 0, self._top, out=codes)
        np.left_shift(odd, self._bits, out=odd)
        np.bitwise_or(self._even, odd, out=self._even)
        np.copyto(self._weight_by_unit[block], self._packed)

    def _compare(self, block: int) -> None:
        """The sums of the squared differences between a block's weights and what its packed codes mean."""
        floats, codes = self._floats, self._codes
        np.copyto(self._packed, self._weight_by_unit[block])
        np.right_shift(self._even, self._bits, out=self._odd)
        np.bitwise_and(codes, self._top, out=codes)
        np.subtract(floats, codes, out=floats)
        np.multiply(floats, self._scales[block], out=floats)
        np.vecdot(self._rows, self._rows, out=self._sums[0, block])


def _layout(weights: int, group_size: int, bits: int) -> dict[str, tuple[type[np.generic], *tuple[int, ...]]]:
    """The arrays of a quantizer: their dtypes and shapes."""
    units, groups = group_size // _UNIT, weights // group_size
    blocks = _blocks(groups, math.ceil(weights / _WEIGHTS_PER_BLOCK))
    width = math.ceil(groups / blocks)
    code, packed = (np.int8, np.uint32) if bits == 4 else (np.int16, np.uint64)
    return {
        # A unit as one number of 16 bytes, the quickest to move.
        "units": (np.complex128, blocks, units, width),
        # For each lane of a unit, what is greatest in a group, as unsigned and as signed numbers; and space.
        "greatest": (np.uint16, 3, blocks, width * _UNIT),
        "scales": (np.float32, blocks, width * _LANES),
        "biases": (np.float32, blocks, width * _LANES),
        "weight": (packed, blocks, width, units),
        # Of one block: weights as they lie in the file, and even ones before odd ones.
        "source": (np.uint16, width * group_size),
        "floats": (np.float32, 2, units, width * _LANES),
        "codes": (code, 2, units, width * _LANES),  # signed, which NumPy clips in a tenth of the time of unsigned ones
        # Of rows short enough for sums in float32, and for BLAS to leave other threads alone.
        "sums": (np.float32, 2, blocks, 2 * units * _LANES),
    }


def working_bytes(weights: int, group_size: int, bits: int) -> int:
    """What a quantizer of so many weights holds at most."""
    arrays = _layout(weights, group_size, bits).values()
    kept = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, *shape in arrays)
    return kept + weights // group_size * _PASSING_BYTES_OF_GROUP


def _blocks(groups: int, fewest: int) -> int:
    """Into how many blocks groups are cut: evenly, if they can be."""
    even = (count for count in range(fewest, 2 * fewest) if groups % (count * _WIDTH_STEP) == 0)
    return next(even, fewest)


def _scales_and_biases(low: Words, high: Words, top: int) -> tuple[Words, Words]:
    """BF16 scales and biases as `affine.quantize` has them."""
    downward = (low & _MAGNITUDE) > (high & _MAGNITUDE)
    exchanged = np.negative(downward.view(np.int8), dtype=np.int16).view(np.uint16)
    exchanged &= low ^ high
    biases = high ^ exchanged
    bias: Floats = _wide(biases)
    scale: Floats = (_wide(low ^ exchanged) - bias) / np.float32(top)
    if np.abs(scale).min() < _SMALLEST_SCALE:  # groups whose weights are all alike
        scale = np.where(downward, np.maximum(scale, _SMALLEST_SCALE), np.minimum(scale, -_SMALLEST_SCALE))
        at_zero = np.rint(bias / scale) == 0
        scale = np.where(at_zero, scale, bias / np.where(at_zero, np.float32(1), np.rint(bias / scale)))
        biases = np.where(at_zero, np.uint16(0), biases)
    else:
        scale = bias / np.rint(bias / scale)
    return _nearest(scale), biases


def _of_floats(low: Floats, high: Floats, top: int) -> tuple[Words, Words, bool]:
    """BF16 scales and biases as `affine.quantize` has them, and whether weights may lie far beyond the codes.

    A bias is not the extreme itself, but the BF16 next to it: many steps away where the extreme is thousands of steps
    from zero, and then codes have no bits for all of them.
    """
    downward = np.abs(low) > np.abs(high)
    edge = np.where(downward, low, high)
    scale = (high - low) / np.float32(top)
    np.maximum(scale, _SMALLEST_SCALE, out=scale)
    scale = np.where(downward, scale, -scale)
    steps = np.rint(edge / scale)
    far = not np.abs(steps).max() <= _NEAR_STEPS
    at_zero = steps == 0
    if at_zero.any():
        steps[at_zero], edge[at_zero] = 1, scale[at_zero]
    scales = _nearest(edge / steps)
    edge[at_zero] = 0
    return scales, _nearest(edge), far


def _nearest(floats: Floats) -> Words:
    """BF16, ties to even; the lower halves of NaN must be zero."""
    bits = floats.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded.astype(np.uint16)


def _wide(numbers: Words) -> Floats:
    """BF16 → float32."""
    wide = numbers.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _repeat(numbers: Words, out: Floats) -> None:
    """BF16 → float32, each for all lanes of a unit."""
    pairs = numbers.astype(np.uint64)
    pairs *= np.uint64(0x0001_0000_0001_0000)
    lanes = out.reshape(-1).view(np.uint64)
    lanes[0::2] = pairs
    lanes[1::2] = pairs


def _over_lanes(extreme: np.ufunc, numbers: Words, spare: Words) -> Words:
    """The extreme of each eight numbers; of others that lie beside them too, which is quicker than to leave them out.

    Both `numbers` and `spare`, which is as large, are written over.
    """
    numbers, spare = numbers.reshape(-1), spare.reshape(-1)
    for distance in (4, 2, 1):
        numbers, spare = extreme(numbers[:-distance], numbers[distance:], out=spare[: numbers.size - distance]), numbers
    return numbers[::_UNIT].copy()
