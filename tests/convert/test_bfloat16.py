"""BF16 weights by NumPy: the same bits as by `affine.quantize`, the same errors as by an independent unpacker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlxqwen_convert import affine, bfloat16
from mlxqwen_convert.affine import GROUP_SIZES, Packed
from mlxqwen_convert.bfloat16 import Quantized, Quantizer, Read, working_bytes
from mlxqwen_convert.buffers import Buffers
from mlxqwen_convert.verification import error_of_bfloat16
from tests.convert.encoders import unpack_affine
from tests.convert.test_affine import KINDS, random_weight

Numbers = NDArray[np.uint16]

every_form = pytest.mark.parametrize(
    ("bits", "group_size"), [(bits, group_size) for bits in (4, 8) for group_size in GROUP_SIZES]
)


@pytest.fixture(scope="module", params=[1 << 11, 1 << 18], autouse=True)
def weights_per_block(request: pytest.FixtureRequest) -> Iterator[None]:
    """Many blocks, and blocks as large as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "_WEIGHTS_PER_BLOCK", request.param)
        yield


def as_numbers(weight: NDArray[Any]) -> Numbers:
    """BF16 of what it can hold."""
    return (np.ascontiguousarray(weight, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def reader(numbers: Numbers) -> Read:
    """Reads them piece by piece."""

    def read(piece: Numbers, start: int) -> None:
        piece[:] = numbers.reshape(-1)[start : start + piece.size]

    return read


def quickly(numbers: Numbers, group_size: int, bits: int) -> Quantized | None:
    return Quantizer(numbers.size, group_size, bits, Buffers()).quantize(reader(numbers), measure=True)


def by_mlx(numbers: Numbers, group_size: int, bits: int) -> Packed:
    rows = mx.array(numbers.reshape(-1, group_size)).view(mx.bfloat16)
    return affine.quantize(rows, group_size, bits, mx.bfloat16)


def same(found: Quantized | None, expected: Packed) -> None:
    assert found is not None
    assert np.array_equal(found.weight.reshape(-1).view(np.uint32), np.array(expected.weight).reshape(-1))
    assert np.array_equal(found.scales, np.array(expected.scales.view(mx.uint16)).reshape(-1))
    assert np.array_equal(found.biases, np.array(expected.biases.view(mx.uint16)).reshape(-1))


@every_form
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_by_mlx(kind: str, bits: int, group_size: int) -> None:
    weight = random_weight(kind)
    for sign in (1, -1):
        numbers = as_numbers(sign * weight)
        same(quickly(numbers, group_size, bits), by_mlx(numbers, group_size, bits))


@every_form
def test_any_finite_weights(bits: int, group_size: int) -> None:
    """Subnormals, zeros of both signs and exponents far apart, in one group and in groups of their own."""
    rng = np.random.default_rng(bits + group_size)
    numbers = rng.integers(0, 1 << 16, (300, group_size)).astype(np.uint16)
    numbers[100:] &= 0x807F | (rng.integers(0, 256, (200, 1)) << 7).astype(np.uint16)  # alike in size
    numbers[280:] &= 0x8000
    numbers[(numbers & 0x7FFF) >= 0x7E80] &= 0x8FFF  # their differences fit into float32
    same(quickly(numbers, group_size, bits), by_mlx(numbers, group_size, bits))


@given(st.integers(1, 1200), st.sampled_from(GROUP_SIZES), st.sampled_from((4, 8)), st.integers(0, 2**32 - 1))
@example(1009, 64, 4, 0)
@example(2 * 3 * 384, 128, 4, 0)
@settings(max_examples=25, deadline=None)
def test_any_number_of_groups(groups: int, group_size: int, bits: int, seed: int) -> None:
    numbers = as_numbers(np.random.default_rng(seed).normal(0, 1, (groups, group_size)))
    same(quickly(numbers, group_size, bits), by_mlx(numbers, group_size, bits))


@every_form
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "one-sided", "large"])
def test_errors_are_those_of_the_packed_codes(kind: str, bits: int, group_size: int) -> None:
    weight = random_weight(kind).reshape(-1, group_size)
    found = quickly(as_numbers(weight), group_size, bits)
    assert found is not None
    words = found.weight.reshape(-1).view(np.uint32).reshape(len(weight), -1)
    scales, biases = (part.reshape(-1, 1) for part in (found.wide_scales, found.wide_biases))
    difference = weight.astype(np.float64) - unpack_affine(words, scales, biases, bits)
    error = error_of_bfloat16(found)
    assert error.squared_error == pytest.approx(np.square(difference).sum(), rel=1e-4)
    assert error.squared_norm == pytest.approx(np.square(weight.astype(np.float64)).sum(), rel=1e-5)
    assert error.squared_error <= error.squared_bound


@pytest.mark.parametrize("number", [0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x7FFF, 0xFF81])
@pytest.mark.parametrize("others", [0.5, -0.5])
def test_what_is_not_finite_is_refused(number: int, others: float) -> None:
    for place in (0, 5, 63, 64 * 77 + 31):
        numbers = as_numbers(np.full(64 * 100, others))
        numbers[place] = number
        assert quickly(numbers, 64, 4) is None
        numbers[1::2] ^= 0x8000
        assert quickly(numbers, 64, 4) is None


def test_ranges_that_overflow_are_refused() -> None:
    numbers = as_numbers(np.tile([0.5, -0.5], 640))
    numbers[64:66] = 0x7F7F, 0xFF7F
    assert quickly(numbers, 64, 4) is None


@every_form
@pytest.mark.parametrize("groups", [509, 1024, 1536, 7919])
def test_sums_of_all_blocks(groups: int, bits: int, group_size: int) -> None:
    """Blocks are alike, whatever the number of groups: a prime one has no divisor that would do."""
    numbers = as_numbers(np.random.default_rng(groups).normal(0, 1, (groups, group_size)))
    quantizer = Quantizer(numbers.size, group_size, bits, Buffers())
    blocks, _, width = quantizer._units.shape
    assert 0 <= blocks * width - groups < blocks
    found, expected = quantizer.quantize(reader(numbers), measure=True), by_mlx(numbers, group_size, bits)
    same(found, expected)
    assert found is not None
    weight = (numbers.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    scales, biases = found.wide_scales[:, None], found.wide_biases[:, None]
    restored = unpack_affine(np.array(expected.weight), scales, biases, bits)
    assert found.squared_norm == pytest.approx(np.square(weight).sum(), rel=1e-5)
    assert found.squared_error == pytest.approx(np.square(weight - restored).sum(), rel=1e-4)


@every_form
def test_groups_of_equal_weights(bits: int, group_size: int) -> None:
    """All exponents: no step is lost, or made of nothing, on the way to a code."""
    numbers = np.repeat(np.arange(0, 0x7F80, 7, dtype=np.uint16)[:, None], group_size, axis=1)
    for sign in (0, 0x8000):
        whole = quickly(numbers | np.uint16(sign), group_size, bits)
        assert whole is None  # the largest have a scale of zero
        expected = by_mlx(numbers | np.uint16(sign), group_size, bits)
        usable = np.array(expected.scales.view(mx.uint16)).reshape(-1) & 0x7FFF != 0
        assert 0.8 < usable.mean() < 1
        kept = numbers[usable] | np.uint16(sign)
        same(quickly(kept, group_size, bits), by_mlx(kept, group_size, bits))


def test_working_bytes_are_those_of_the_buffers() -> None:
    for form in ((1 << 16, 32, 4), (3 << 15, 64, 8), (1 << 19, 128, 4), (1031 * 64, 64, 4)):
        buffers = Buffers()
        Quantizer(*form, buffers)
        kept = sum(array.nbytes for array in buffers._kept.values())
        passing = working_bytes(*form) - kept
        assert 0 < passing <= 41 * form[0] // form[1]


def test_buffers_serve_again() -> None:
    buffers = Buffers()
    for rows, group_size, bits in ((512, 64, 4), (100, 128, 8), (700, 32, 4), (1031, 64, 4), (509, 32, 8)):
        quantizer = Quantizer(rows * group_size, group_size, bits, buffers)
        for seed in range(3):
            numbers = as_numbers(np.random.default_rng(seed).normal(0, 1, (rows, group_size)))
            same(quantizer.quantize(reader(numbers), measure=seed != 1), by_mlx(numbers, group_size, bits))
