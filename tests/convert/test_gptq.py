"""GPTQ against an independent encoder: codes in order are moved, reordered ones dequantized exactly."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen_convert import affine, gptq
from mlxqwen_convert.errors import SourceError
from tests.convert.encoders import Array, Grouped, encode_gptq, quantize_grouped, unpack_affine, unpack_words

Arrays = tuple[mx.array, mx.array, mx.array]

every_format = pytest.mark.parametrize("zero_offset", [0, 1], ids=["v2", "v1"])


def arrays(tensors: dict[str, Array]) -> Arrays:
    return mx.array(tensors["qweight"]), mx.array(tensors["qzeros"]), mx.array(tensors["scales"])


def random_grouped(
    rng: np.random.Generator, bits: int, rows: int, groups: int, group_size: int, zero_offset: int
) -> Grouped:
    """Codes and zeros over the whole range of the format; scales from subnormal to large float16."""
    codes = rng.integers(0, 2**bits, (rows, groups * group_size))
    zeros = rng.integers(0, 2**bits, (rows, groups)) + zero_offset
    scales = (2.0 ** rng.uniform(-24, 6, (rows, groups))).astype(np.float16)
    return Grouped(codes, zeros, scales, np.arange(groups * group_size) // group_size)


@given(
    st.sampled_from(gptq.BITS),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([32, 64, 128, 96, 256]),
    st.sampled_from([0, 1]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_move_exactly(
    bits: int, words: int, groups: int, group_size: int, zero_offset: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    grouped = random_grouped(rng, bits, 32 // bits * words, groups, group_size, zero_offset)
    tensors = encode_gptq(grouped, bits, zero_offset=zero_offset)
    assert gptq.in_order(mx.array(tensors["g_idx"]), group_size)
    gptq.check(*arrays(tensors), bits, zero_offset=zero_offset, name="x.scales")
    size = affine.repack_group_size(group_size)
    assert size is not None
    times = group_size // size
    for dtype, numpy_dtype in ((mx.float16, np.float16), (mx.float32, np.float32)):
        packed = gptq.repack(*arrays(tensors), bits, dtype, zero_offset=zero_offset)
        assert np.array_equal(unpack_words(np.array(packed.weight), bits, groups * group_size), grouped.codes)
        assert np.array_equal(np.array(packed.scales), grouped.scales.repeat(times, axis=1).astype(numpy_dtype))
        biases = (-grouped.zeros * grouped.scales.astype(np.float64)).astype(numpy_dtype)
        assert np.array_equal(np.array(packed.biases), biases.repeat(times, axis=1))


@given(
    st.sampled_from(gptq.BITS),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([8, 24, 32, 128]),
    st.sampled_from([0, 1]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_dequantized_weights_are_exact(
    bits: int, words: int, groups: int, group_size: int, zero_offset: int, act_order: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    grouped = random_grouped(rng, bits, 32 // bits * words, groups, group_size, zero_offset)
    g_idx = None
    if act_order:
        rng.shuffle(grouped.groups)
        g_idx = mx.array(grouped.groups)
        gptq.check_groups(g_idx, groups, name="x.g_idx")
    tensors = arrays(encode_gptq(grouped, bits, zero_offset=zero_offset))
    weight = gptq.dequantize(*tensors, bits, g_idx, zero_offset=zero_offset)
    assert weight.dtype == mx.float32
    assert np.array_equal(np.array(weight), grouped.weight)


@every_format
@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_repacked_weights_are_those_of_the_source(
    bits: int, symmetric: bool, group_size: int, zero_offset: int
) -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, (64, 512)).astype(np.float32)
    grouped = quantize_grouped(weight, bits, group_size, symmetric=symmetric)
    tensors = arrays(encode_gptq(grouped, bits, zero_offset=zero_offset))
    for dtype, bound in ((mx.float16, 1e-3), (mx.float32, 5e-7)):
        packed = gptq.repack(*tensors, bits, dtype, zero_offset=zero_offset)
        read = unpack_affine(np.array(packed.weight), np.array(packed.scales), np.array(packed.biases), bits)
        mlx = np.array(affine.dequantize(packed, 128 if group_size == -1 else group_size, bits))
        # a bias is up to 2**bits steps large, so that its rounding weighs more the finer the steps
        assert np.linalg.norm(read - grouped.weight) <= bound * np.linalg.norm(grouped.weight)
        assert np.linalg.norm(mlx - grouped.weight) <= bound * np.linalg.norm(grouped.weight)


@given(st.sampled_from(gptq.BITS), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_column_chunks_do_not_matter(bits: int, chunks: list[int], act_order: bool) -> None:
    per_word = 32 // bits
    rng = np.random.default_rng(1)
    grouped = random_grouped(rng, bits, per_word * sum(chunks), 3, 32, 1)
    g_idx = None
    if act_order:
        rng.shuffle(grouped.groups)
        g_idx = mx.array(grouped.groups)
    qweight, qzeros, scales = arrays(encode_gptq(grouped, bits))
    whole, weight = gptq.repack(qweight, qzeros, scales, bits), gptq.dequantize(qweight, qzeros, scales, bits, g_idx)
    word = 0
    for count in chunks:
        rows = slice(per_word * word, per_word * (word + count))
        tile = qweight[:, rows], qzeros[:, word : word + count], scales[:, rows]
        for ours, theirs in zip(gptq.repack(*tile, bits), whole, strict=True):
            assert mx.array_equal(ours, theirs[rows])
        assert mx.array_equal(gptq.dequantize(*tile, bits, g_idx), weight[rows])
        word += count


def test_order_of_groups() -> None:
    assert gptq.in_order(mx.array([0, 0, 1, 1, 2]), 2)
    assert gptq.in_order(mx.zeros(8, dtype=mx.int32), 8)
    assert not gptq.in_order(mx.array([0, 1, 0, 1]), 2)
    assert not gptq.in_order(mx.array([0, 0, 0, 1]), 2)
    assert not gptq.in_order(mx.zeros(8, dtype=mx.int32), 4)


@pytest.mark.parametrize("group", [-1, 3])
def test_groups_that_are_not_there_are_named(group: int) -> None:
    g_idx = mx.array([0, 1, group, 2])
    with pytest.raises(SourceError, match=rf"^x\.g_idx: input 2 is in group {group}, expected 0 to 2"):
        gptq.check_groups(g_idx, 3, name="x.g_idx")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_scales_are_named(value: float) -> None:
    qweight, qzeros, scales = arrays(encode_gptq(random_grouped(np.random.default_rng(0), 4, 16, 3, 32, 1), 4))
    scales[2, 9] = value
    with pytest.raises(SourceError, match=rf"^x\.scales: scale \[2, 89\] is {value:.2g}"):
        gptq.check(qweight, qzeros, scales, 4, name="x.scales", origin=(0, 80))


@pytest.mark.parametrize("act_order", [False, True])
def test_zero_scales(act_order: bool) -> None:
    rng = np.random.default_rng(0)
    grouped = random_grouped(rng, 8, 16, 3, 32, 1)
    g_idx = None
    if act_order:
        rng.shuffle(grouped.groups)
        g_idx = mx.array(grouped.groups)
    inputs = np.flatnonzero(grouped.groups == 2)
    grouped.codes[9, inputs], grouped.zeros[9, 2], grouped.scales[9, 2] = 5, 5, 0
    gptq.check(*arrays(encode_gptq(grouped, 8)), 8, g_idx, name="x.scales")
    grouped.codes[9, inputs[-1]] = 6
    with pytest.raises(SourceError, match=r"^x\.scales: scale \[2, 9\] is zero over codes"):
        gptq.check(*arrays(encode_gptq(grouped, 8)), 8, g_idx, name="x.scales")
