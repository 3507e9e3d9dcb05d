"""FP8 rows against a table built from the format's definition."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen_convert import fp8
from mlxqwen_convert.errors import SourceError
from tests.convert.encoders import Codes, Floats, decode_fp8, encode_fp8, fp8_table, round_to_bf16, round_to_fp8

BLOCK = (128, 128)
SCALE = "x.weight_scale_inv"


def check(codes: Codes, scale: Floats, block: tuple[int, int] | None = None, row_offset: int = 0) -> None:
    fp8.check_rows(mx.array(codes), mx.array(scale), block, row_offset, name="x.weight", scale_name=SCALE)


def random_codes(rng: np.random.Generator, rows: int, width: int) -> Codes:
    """Every code but the two that mean NaN."""
    codes = rng.integers(0, 256, (rows, width)).astype(np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)


def test_every_code() -> None:
    codes = np.array([[code for code in range(256) if code & 0x7F != 0x7F]], np.uint8)
    values = np.array(fp8.dequantize_rows(mx.array(codes), mx.array([1.0])))
    assert np.array_equal(values.view(np.uint32), fp8_table()[codes].view(np.uint32))
    assert np.array_equal(round_to_fp8(values), codes)
    mlx = np.array(mx.from_fp8(mx.array(codes), mx.float32))
    assert np.array_equal(values, mlx)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_blocks_are_exact_for_any_rows(
    rows: int, width: int, height: int, block_width: int, bf16: bool, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    codes, block = random_codes(rng, rows, width), (height, block_width)
    scale = rng.lognormal(-5, 3, (-(-rows // height), -(-width // block_width))).astype(np.float32)
    scale = round_to_bf16(scale) if bf16 else scale
    stored = mx.array(scale).astype(mx.bfloat16) if bf16 else mx.array(scale)
    expected = decode_fp8(codes, scale, block)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part, needed = mx.array(codes[start:stop]), fp8.scale_rows(start, stop, block)
    fp8.check_rows(part, stored[needed], block, start, name="x", scale_name="y")
    found = fp8.dequantize_rows(part, stored[needed], block, start)
    assert found.dtype == mx.float32
    assert np.array_equal(np.array(found), expected[start:stop])


@pytest.mark.parametrize("shape", [(300, 200), (128, 384), (1, 129)])
def test_released_block_size(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    codes, scale = encode_fp8(weight, BLOCK)
    values = np.array(fp8.dequantize_rows(mx.array(codes), mx.array(scale), BLOCK))
    assert np.array_equal(values, decode_fp8(codes, scale, BLOCK))
    assert np.abs(values - weight).max() <= 0.04 * np.abs(weight).max()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scale_for_the_tensor(shape: tuple[int, ...]) -> None:
    codes = random_codes(np.random.default_rng(0), 7, 33)
    scale = np.full(shape, 0.0173, np.float32)
    check(codes, scale)
    values = np.array(fp8.dequantize_rows(mx.array(codes), mx.array(scale), row_offset=5))
    assert np.array_equal(values, fp8_table()[codes] * np.float32(0.0173))


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_scale_for_each_row(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    codes, scale = random_codes(rng, 7, 33), rng.lognormal(-5, 1, shape).astype(np.float32)
    check(codes, scale)
    values = np.array(fp8.dequantize_rows(mx.array(codes), mx.array(scale)))
    assert np.array_equal(values, fp8_table()[codes] * scale.reshape(7, 1))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_named(code: int) -> None:
    codes = np.zeros((3, 5), np.uint8)
    codes[1, 4] = code
    with pytest.raises(SourceError, match=r"^x\.weight: weight \[201, 4\] is NaN"):
        check(codes, np.ones((1, 1), np.float32), BLOCK, row_offset=200)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-3])
def test_bad_scales_are_named(value: float) -> None:
    codes, scale = np.zeros((10, 10), np.uint8), np.ones((3, 3), np.float32)
    scale[2, 1] = value
    with pytest.raises(SourceError, match=rf"^x\.weight_scale_inv: scale \[4, 1\] is {value:g}, expected a finite"):
        check(codes, scale, (4, 4), row_offset=8)


def test_zero_scales() -> None:
    codes, scale = np.zeros((10, 10), np.uint8), np.ones((3, 3), np.float32)
    codes[0, 0], codes[1, 4] = 0x38, 0x80
    scale[0, 1] = 0
    check(codes, scale, (4, 4))  # over zeros, plain and negative, a zero scale loses nothing
    codes[3, 7] = 1
    with pytest.raises(SourceError, match=r"^x\.weight_scale_inv: scale \[0, 1\] is zero over codes that are not"):
        check(codes, scale, (4, 4))
    scale[0, 1], scale[2, 2] = 1, 0
    check(codes[:9], scale, (4, 4))
    codes[9, 9] = 1
    with pytest.raises(SourceError, match=r"scale \[2, 2\] is zero"):
        check(codes[6:], scale[1:], (4, 4), row_offset=6)


def test_zero_scales_without_blocks() -> None:
    codes = np.zeros((3, 4), np.uint8)
    check(codes, np.zeros(1, np.float32))
    check(codes, np.zeros((), np.float32))
    check(codes, np.zeros((3, 1), np.float32))
    codes[2, 0] = 0x40
    with pytest.raises(SourceError, match=r"scale \[0\] is zero"):
        check(codes, np.zeros(1, np.float32), row_offset=30)
    with pytest.raises(SourceError, match=r"scale \[\] is zero"):
        check(codes, np.zeros((), np.float32), row_offset=30)
    with pytest.raises(SourceError, match=r"scale \[32, 0\] is zero"):
        check(codes, np.zeros((3, 1), np.float32), row_offset=30)
