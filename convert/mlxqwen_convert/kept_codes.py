"""Codes that were kept as they are: whether they are the source's, with its scales, and what rounding those has cost.

All of it as integers, in NumPy, and another way than the codes came: each format's tensors are taken as their
definition has them, and what is written is held to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxqwen_convert.affine import Packed, pack, unpack
from mlxqwen_convert.awq import NIBBLES
from mlxqwen_convert.awq_words import hold_the_same
from mlxqwen_convert.buffers import Buffers

__all__ = ["Found", "SourceCodes", "look_at", "of_awq", "of_compressed_tensors", "of_gptq", "of_mlx"]

_BUFFERS = ("written", "source", "shifted", "differing")
# The lower half of each lane of so many bits.
_LANES = {8: np.uint32(0x0F0F0F0F), 16: np.uint32(0x00FF00FF), 32: np.uint32(0x0000FFFF)}

Doubles = NDArray[np.float64]
Words = NDArray[Any]


class SourceCodes(NamedTuple):
    """What rows of a source mean: `scale · code + bias`, exactly.

    Attributes:
        bits: of a code.
        are: whether words in MLX's layout `[rows, in · bits / 32]` hold the same codes.
        scales, biases: float64 `[groups, rows]`.
    """

    bits: int
    are: Callable[[Words, Buffers], bool]
    scales: Doubles
    biases: Doubles


class Found(NamedTuple):
    """What is written beside what the source has.

    Attributes:
        codes_are_kept: whether all codes are the source's.
        scales, biases: float64 `[groups, rows]`, as they are written.
        scale_errors, bias_errors: by how much they differ from the source's.
        squared_error, squared_norm: sums over all weights, of the differences and of the source.
    """

    codes_are_kept: bool
    scales: Doubles
    biases: Doubles
    scale_errors: Doubles
    bias_errors: Doubles
    squared_error: float
    squared_norm: float


def of_awq(qweight: mx.array, qzeros: mx.array, scales: mx.array) -> SourceCodes:
    """Of the tensors that `awq` describes."""
    words, factors = _words(qweight), _doubles(scales)
    zeros = _words(qzeros)[:, :, None] >> 4 * np.array(NIBBLES, np.uint32) & np.uint32(15)
    biases = -1.0 * zeros.reshape(factors.shape) * factors
    return SourceCodes(4, lambda weight, buffers: hold_the_same(weight, words, buffers), factors, biases)


def of_gptq(qweight: mx.array, qzeros: mx.array, scales: mx.array, bits: int, zero_offset: int) -> SourceCodes:
    """Of the tensors that `gptq` describes, inputs in order."""
    words, factors = _words(qweight), _doubles(scales)
    zeros = _codes(_words(qzeros)[:, :, None], bits).reshape(factors.shape) + float(zero_offset)
    return SourceCodes(bits, lambda weight, _: np.array_equal(weight.T, words), factors, -1.0 * zeros * factors)


def of_compressed_tensors(packed: mx.array, scale: mx.array, zero_point: mx.array | None, bits: int) -> SourceCodes:
    """Of the tensors that `compressed_tensors` describes, inputs in order."""
    words, factors = _words(packed), _doubles(scale).T
    zeros: Any = 2.0 ** (bits - 1)
    if zero_point is not None:
        by_word = _codes(_words(zero_point).T[:, :, None], bits)
        zeros = by_word.reshape(len(factors), -1)[:, : factors.shape[1]]
    return SourceCodes(bits, lambda weight, _: np.array_equal(weight, words), factors, -1.0 * zeros * factors)


def of_mlx(packed: Packed, bits: int) -> SourceCodes:
    """Of MLX's own form, with the scales and biases of its file."""
    words = _words(packed.weight)
    scales, biases = _doubles(packed.scales).T, _doubles(packed.biases).T
    return SourceCodes(bits, lambda weight, _: np.array_equal(weight, words), scales, biases)


def look_at(source: SourceCodes, written: Packed, bits: int, group_size: int, buffers: Buffers) -> Found:
    """Compare all codes, scales and biases.

    Args:
        written: what became of the source's rows, of so many bits, the source's or more.
        group_size: of what is written; a group of the source may have become several.
    """
    scales, biases = _doubles(written.scales).T, _doubles(written.biases).T
    words = own = _words(written.weight)
    kept = True
    if bits != source.bits:
        codes = unpack(written.weight, bits)
        kept = not (codes >= 2**source.bits).any().item()
        own = _words(pack(codes, source.bits))
    kept = kept and source.are(own, buffers)
    if bits not in (4, 8):
        words, bits = _words(unpack(written.weight, bits).view(mx.uint32)), 8
    sums, squares = _code_sums(words, bits, group_size, buffers)
    times = len(scales) // len(source.scales)
    own_scales, own_biases = (np.repeat(part, times, axis=0) for part in (source.scales, source.biases))
    scale_errors, bias_errors = scales - own_scales, biases - own_biases

    def norm(scales: Doubles, biases: Doubles) -> float:
        """The sum of all squared `scale · code + bias`."""
        total = (scales * scales * squares + 2 * scales * biases * sums + group_size * biases * biases).sum()
        return max(0.0, float(total))  # below zero where weights are all zero, by rounding

    error, total = norm(scale_errors, bias_errors), norm(own_scales, own_biases)
    return Found(kept, scales, biases, scale_errors, bias_errors, error, total)


def _code_sums(words: Words, bits: int, group_size: int, buffers: Buffers) -> tuple[Words, Words]:
    """The sums of each group's codes and of their squares, uint32 `[groups, rows]`; 4 or 8 bits.

    Codes of one word are added in lanes of it, and words down the columns of the transposed matrix, in long rows.
    """
    rows, width = words.shape
    by_input, even, odd, both = (buffers.array(name, np.uint32, width, rows) for name in _BUFFERS)
    lane, lanes = 2 * bits, np.uint8 if bits == 4 else np.uint16
    np.copyto(by_input, words.T)
    np.bitwise_and(by_input, _LANES[lane], out=even)
    np.right_shift(by_input, np.uint32(bits), out=odd)
    np.bitwise_and(odd, _LANES[lane], out=odd)
    np.add(even, odd, out=both)
    for codes in (even, odd):
        np.multiply(codes.view(lanes), codes.view(lanes), out=codes.view(lanes))
        _fold(codes, lane, by_input)
    np.add(even, odd, out=even)
    if bits == 4:
        _fold(both, lane, by_input)
    per_group = group_size * bits // 32
    return _down_groups(both, np.uint16, per_group), _down_groups(
        even, np.uint16 if bits == 4 else np.uint32, per_group
    )


def _fold(words: Words, lane: int, spare: Words) -> None:
    """Add pairs of neighbouring lanes of so many bits: the sums lie in lanes twice as wide."""
    mask = _LANES[2 * lane]
    np.right_shift(words, np.uint32(lane), out=spare)
    np.bitwise_and(spare, mask, out=spare)
    np.bitwise_and(words, mask, out=words)
    np.add(words, spare, out=words)


def _down_groups(words: Words, lanes: type[np.unsignedinteger[Any]], per_group: int) -> Words:
    """Sums of all lanes of each so many words of a column: of 128 codes of 8 bits, no lane runs over."""
    groups = np.add.reduce(words.view(lanes).reshape(len(words) // per_group, per_group, -1), axis=1, dtype=lanes)
    sums: Words = groups.view(np.uint32)
    if lanes is np.uint16:
        _fold(sums, 16, np.empty_like(sums))
    return sums


def _codes(words: Words, bits: int) -> Words:
    """Codes of words `[…, 1]`, low bits first, `[…, 32 / bits]`."""
    codes: Words = words >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    return codes


def _words(array: mx.array) -> Words:
    words: Words = np.asarray(array).view(np.uint32)
    return words


def _doubles(array: mx.array) -> Doubles:
    return np.array(array.astype(mx.float32)).astype(np.float64)
