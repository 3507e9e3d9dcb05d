"""compressed-tensors against an independent encoder: every code moved, nothing rounded but the bias."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen_convert import affine, compressed_tensors
from mlxqwen_convert.errors import SourceError
from tests.convert.encoders import (
    Grouped,
    encode_compressed_tensors,
    quantize_grouped,
    round_to_bf16,
    unpack_affine,
    unpack_words,
)

BITS = compressed_tensors.BITS
Arrays = tuple[mx.array, mx.array, mx.array | None]


def arrays(grouped: Grouped, bits: int, symmetric: bool) -> Arrays:
    tensors = encode_compressed_tensors(grouped, bits, symmetric=symmetric)
    zero_point = tensors.get("weight_zero_point")
    return (
        mx.array(tensors["weight_packed"]),
        mx.array(tensors["weight_scale"]),
        None if zero_point is None else mx.array(zero_point),
    )


def random_grouped(
    rng: np.random.Generator, bits: int, rows: int, groups: int, group_size: int, symmetric: bool
) -> Grouped:
    codes = rng.integers(0, 2**bits, (rows, groups * group_size))
    zeros = rng.integers(0, 2**bits, (rows, groups))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = round_to_bf16(2.0 ** rng.uniform(-40, 6, (rows, groups)))
    return Grouped(codes, zeros, scales, np.arange(groups * group_size) // group_size)


@given(
    st.sampled_from(BITS),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([32, 64, 128, 96, 256]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_move_exactly(
    bits: int, rows: int, groups: int, group_size: int, symmetric: bool, seed: int
) -> None:
    grouped = random_grouped(np.random.default_rng(seed), bits, rows, groups, group_size, symmetric)
    width = groups * group_size
    tensors = arrays(grouped, bits, symmetric)
    compressed_tensors.check(*tensors, bits, width, name="x.weight_scale")
    size = affine.repack_group_size(group_size)
    assert size is not None
    times = group_size // size
    packed = compressed_tensors.repack(*tensors, bits, width, mx.float32)
    assert np.array_equal(unpack_words(np.array(packed.weight), bits, width), grouped.codes)
    assert np.array_equal(np.array(packed.scales), grouped.scales.repeat(times, axis=1))
    biases = (-grouped.zeros * grouped.scales.astype(np.float64)).astype(np.float32)
    assert np.array_equal(np.array(packed.biases), biases.repeat(times, axis=1))
    narrow = compressed_tensors.repack(*tensors, bits, width, mx.bfloat16)
    assert np.array_equal(np.array(narrow.scales.astype(mx.float32)), grouped.scales.repeat(times, axis=1))


@given(
    st.sampled_from(BITS),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([5, 8, 24, 32, 128]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_dequantized_weights_are_exact(
    bits: int, rows: int, groups: int, group_size: int, symmetric: bool, act_order: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    grouped = random_grouped(rng, bits, rows, groups, group_size, symmetric)
    g_idx = None
    if act_order:
        rng.shuffle(grouped.groups)
        g_idx = mx.array(grouped.groups)
    weight = compressed_tensors.dequantize(*arrays(grouped, bits, symmetric), bits, groups * group_size, g_idx)
    assert weight.dtype == mx.float32
    assert np.array_equal(np.array(weight), grouped.weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_repacked_weights_are_those_of_the_source(bits: int, symmetric: bool, group_size: int) -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, (40, 512)).astype(np.float32)
    grouped = quantize_grouped(weight, bits, group_size, symmetric=symmetric)
    packed = compressed_tensors.repack(*arrays(grouped, bits, symmetric), bits, 512, mx.float32)
    read = unpack_affine(np.array(packed.weight), np.array(packed.scales), np.array(packed.biases), bits)
    mlx = np.array(affine.dequantize(packed, 128 if group_size == -1 else group_size, bits))
    for values in (read, mlx):
        assert np.linalg.norm(values - grouped.weight) <= 5e-7 * np.linalg.norm(grouped.weight)


@given(st.sampled_from(BITS), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_row_chunks_do_not_matter(bits: int, chunks: list[int], ragged: int) -> None:
    per_word = 32 // bits
    total = max(per_word * sum(chunks) - min(ragged, per_word - 1), 1)
    packed, scale, zero_point = arrays(random_grouped(np.random.default_rng(1), bits, total, 3, 32, False), bits, False)
    assert zero_point is not None
    whole = compressed_tensors.repack(packed, scale, zero_point, bits, 96)
    weight = compressed_tensors.dequantize(packed, scale, zero_point, bits, 96)
    start = 0
    for count in chunks:
        rows = slice(start, min(start + per_word * count, total))
        words = compressed_tensors.zero_point_rows(rows.start, rows.stop, bits)
        tile = packed[rows], scale[rows], zero_point[words]
        for ours, theirs in zip(compressed_tensors.repack(*tile, bits, 96), whole, strict=True):
            assert mx.array_equal(ours, theirs[rows])
        assert mx.array_equal(compressed_tensors.dequantize(*tile, bits, 96), weight[rows])
        start = rows.stop


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_scales_are_named(value: float) -> None:
    packed, scale, zero_point = arrays(random_grouped(np.random.default_rng(0), 4, 16, 3, 32, False), 4, False)
    scale[9, 2] = value
    with pytest.raises(SourceError, match=rf"^x\.weight_scale: scale \[89, 2\] is {value:.2g}"):
        compressed_tensors.check(packed, scale, zero_point, 4, 96, name="x.weight_scale", row_offset=80)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_zero_scales(symmetric: bool, act_order: bool) -> None:
    rng = np.random.default_rng(0)
    grouped = random_grouped(rng, 8, 16, 3, 32, symmetric)
    g_idx = None
    if act_order:
        rng.shuffle(grouped.groups)
        g_idx = mx.array(grouped.groups)
    inputs = np.flatnonzero(grouped.groups == 2)
    grouped.codes[9, inputs], grouped.scales[9, 2] = grouped.zeros[9, 2], 0
    compressed_tensors.check(*arrays(grouped, 8, symmetric), 8, 96, g_idx, name="x")
    grouped.codes[9, inputs[0]] ^= 1
    with pytest.raises(SourceError, match=r"^x: scale \[9, 2\] is zero over codes"):
        compressed_tensors.check(*arrays(grouped, 8, symmetric), 8, 96, g_idx, name="x")
