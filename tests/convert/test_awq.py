"""AWQ against an independent encoder: every code moved, nothing rounded but the bias."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen_convert import affine, awq
from mlxqwen_convert.errors import SourceError
from tests.convert.encoders import Array, Grouped, encode_awq, quantize_grouped, unpack_affine, unpack_words

Arrays = tuple[mx.array, mx.array, mx.array]


def arrays(tensors: dict[str, Array]) -> Arrays:
    return mx.array(tensors["qweight"]), mx.array(tensors["qzeros"]), mx.array(tensors["scales"])


def random_grouped(rng: np.random.Generator, rows: int, groups: int, group_size: int) -> Grouped:
    """Codes and zeros over their whole range; scales from subnormal to large float16."""
    codes = rng.integers(0, 16, (rows, groups * group_size))
    scales = (2.0 ** rng.uniform(-24, 10, (rows, groups))).astype(np.float16)
    return Grouped(codes, rng.integers(0, 16, (rows, groups)), scales, np.arange(groups * group_size) // group_size)


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([32, 64, 128, 96, 256]), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_codes_and_scales_move_exactly(words: int, groups: int, group_size: int, seed: int) -> None:
    grouped = random_grouped(np.random.default_rng(seed), 8 * words, groups, group_size)
    tensors = arrays(encode_awq(grouped))
    awq.check(*tensors, name="x.scales")
    size = affine.repack_group_size(group_size)
    assert size is not None
    times = group_size // size
    for dtype, numpy_dtype in ((mx.float16, np.float16), (mx.float32, np.float32)):
        packed = awq.repack(*tensors, dtype)
        assert np.array_equal(unpack_words(np.array(packed.weight), 4, groups * group_size), grouped.codes)
        assert packed.scales.dtype == packed.biases.dtype == dtype
        assert np.array_equal(np.array(packed.scales), grouped.scales.repeat(times, axis=1).astype(numpy_dtype))
        with np.errstate(over="ignore"):
            biases = (-grouped.zeros * grouped.scales.astype(np.float64)).astype(numpy_dtype)
        assert np.array_equal(np.array(packed.biases), biases.repeat(times, axis=1))


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([8, 16, 24, 32, 128]), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_dequantized_weights_are_exact(words: int, groups: int, group_size: int, seed: int) -> None:
    grouped = random_grouped(np.random.default_rng(seed), 8 * words, groups, group_size)
    weight = awq.dequantize(*arrays(encode_awq(grouped)))
    assert weight.dtype == mx.float32
    assert np.array_equal(np.array(weight), grouped.weight)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_repacked_weights_are_those_of_the_source(group_size: int) -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, (64, 512)).astype(np.float32)
    grouped = quantize_grouped(weight, 4, group_size)
    tensors = arrays(encode_awq(grouped))
    for dtype, bound in ((mx.float16, 5e-4), (mx.float32, 1e-7)):
        packed = awq.repack(*tensors, dtype)
        read = unpack_affine(np.array(packed.weight), np.array(packed.scales), np.array(packed.biases), 4)
        mlx = np.array(affine.dequantize(packed, group_size, 4))
        for values in (read, mlx):
            assert np.linalg.norm(values - grouped.weight) <= bound * np.linalg.norm(grouped.weight)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.lists(st.integers(1, 3), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_tile_is_the_part_of_the_whole(columns: list[int], inputs: list[int]) -> None:
    grouped = random_grouped(np.random.default_rng(1), 8 * sum(columns), sum(inputs), 32)
    qweight, qzeros, scales = arrays(encode_awq(grouped))
    whole = awq.repack(qweight, qzeros, scales)
    weight = awq.dequantize(qweight, qzeros, scales)
    column = 0
    for count in columns:
        group = 0
        for size in inputs:
            words, groups = slice(column, column + count), slice(group, group + size)
            rows, width = slice(8 * column, 8 * (column + count)), slice(32 * group, 32 * (group + size))
            tile = qweight[width, words], qzeros[groups, words], scales[groups, rows]
            part = awq.repack(*tile)
            assert mx.array_equal(part.weight, whole.weight[rows, 4 * group : 4 * (group + size)])
            assert mx.array_equal(part.scales, whole.scales[rows, groups])
            assert mx.array_equal(part.biases, whole.biases[rows, groups])
            assert mx.array_equal(awq.dequantize(*tile), weight[rows, width])
            group += size
        column += count


def test_groups_that_mlx_lacks_are_refused() -> None:
    grouped = random_grouped(np.random.default_rng(0), 8, 2, 16)
    with pytest.raises(SourceError, match="groups of 16 cannot be repacked"):
        awq.repack(*arrays(encode_awq(grouped)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_scales_are_named(value: float) -> None:
    qweight, qzeros, scales = arrays(encode_awq(random_grouped(np.random.default_rng(0), 16, 3, 32)))
    scales[2, 9] = value
    with pytest.raises(SourceError, match=rf"^x\.scales: scale \[12, 89\] is {value:.2g}"):
        awq.check(qweight, qzeros, scales, name="x.scales", origin=(10, 80))


def test_zero_scales() -> None:
    grouped = random_grouped(np.random.default_rng(0), 16, 3, 32)
    grouped.codes[9, 64:], grouped.zeros[9, 2], grouped.scales[9, 2] = 5, 5, 0
    awq.check(*arrays(encode_awq(grouped)), name="x.scales")
    grouped.codes[9, 95] = 6
    with pytest.raises(SourceError, match=r"^x\.scales: scale \[2, 9\] is zero over codes"):
        awq.check(*arrays(encode_awq(grouped)), name="x.scales")
