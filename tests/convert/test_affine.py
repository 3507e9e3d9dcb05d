"""The quantizer against MLX's own, an independent unpacker, and the least squared error."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen_convert import affine
from mlxqwen_convert.affine import BITS, GROUP_SIZES, Packed
from mlxqwen_convert.errors import SourceError
from tests.checkpoint_arrays import arrays_of
from tests.convert.encoders import (
    Floats,
    decode_fp8,
    encode_fp8,
    pack_words,
    round_to_bf16,
    unpack_affine,
    unpack_words,
)

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
DEMO = Path(__file__).parents[2] / "mlxqwen" / "demo"

every_form = pytest.mark.parametrize(
    ("bits", "group_size"), [(bits, group_size) for bits in BITS for group_size in GROUP_SIZES]
)


def random_weight(kind: str, rows: int = 48, width: int = 512, seed: int = 0) -> Floats:
    """Weights that bfloat16 holds."""
    rng = np.random.default_rng(seed)
    draws = {
        "gaussian": lambda: rng.normal(0, 0.02, (rows, width)),
        "heavy-tailed": lambda: 0.02 * rng.standard_t(3, (rows, width)),
        "one-sided": lambda: rng.normal(1, 0.01, (rows, width)),
        "sparse": lambda: rng.normal(0, 0.02, (rows, width)) * (rng.random((rows, width)) < 0.05),
        "tiny": lambda: rng.normal(0, 1e-7, (rows, width)),
        "tinier": lambda: rng.normal(0, 1e-10, (rows, width)),
        "large": lambda: rng.normal(0, 300, (rows, width)),
        "constant": lambda: np.full((rows, width), -0.37),
        "zero": lambda: np.zeros((rows, width)),
    }
    return round_to_bf16(draws[kind]())


KINDS = ("gaussian", "heavy-tailed", "one-sided", "sparse", "tiny", "tinier", "large", "constant", "zero")


def restored(packed: Packed, bits: int) -> Floats:
    """What the independent unpacker reads."""
    scales, biases = (np.array(part.astype(mx.float32)) for part in (packed.scales, packed.biases))
    return unpack_affine(np.array(packed.weight), scales, biases, bits)


def squared_error(weight: Floats, packed: Packed, bits: int) -> float:
    return float(np.square(weight.astype(np.float64) - restored(packed, bits)).sum())


def relative_error(weight: Floats, packed: Packed, bits: int) -> float:
    return math.sqrt(squared_error(weight, packed, bits) / float(np.square(weight.astype(np.float64)).sum()))


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_codes_are_packed_as_one_stream_of_bits(bits: int, rows: int, words: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * words))
    packed = affine.pack(mx.array(codes.astype(np.uint8)), bits)
    assert packed.dtype == mx.uint32
    assert np.array_equal(np.array(packed).view(np.int32), pack_words(codes, bits))
    unpacked = affine.unpack(packed, bits)
    assert unpacked.dtype == mx.uint8
    assert np.array_equal(np.array(unpacked), codes)


@every_form
def test_mlx_reads_what_was_meant(bits: int, group_size: int) -> None:
    weight = random_weight("gaussian", rows=5)
    for dtype in DTYPES:
        packed = affine.quantize(mx.array(weight), group_size, bits, dtype)
        assert packed.weight.shape == (5, 512 * bits // 32)
        assert packed.scales.shape == packed.biases.shape == (5, 512 // group_size)
        assert packed.scales.dtype == packed.biases.dtype == dtype
        ours = np.array(affine.dequantize(packed, group_size, bits))
        assert np.allclose(ours, restored(packed, bits), rtol=1e-6, atol=1e-8)


@every_form
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_worse_than_by_mlx(bits: int, group_size: int, kind: str) -> None:
    weight = random_weight(kind, rows=12)
    for dtype in DTYPES:
        mlx = Packed(*mx.quantize(mx.array(weight).astype(dtype), group_size, bits))
        if not mx.isfinite(mlx.scales).all().item():
            continue
        ours = affine.quantize(mx.array(weight), group_size, bits, dtype)
        searched = affine.quantize(mx.array(weight), group_size, bits, dtype, search=True)
        errors = [squared_error(weight, packed, bits) for packed in (mlx, ours, searched)]
        noise = 1e-6 * errors[0]
        assert errors[1] <= errors[0] + noise
        assert errors[2] <= errors[1] + noise
        groups = weight.reshape(12, -1, group_size)
        by_group = [
            np.square(restored(packed, bits).reshape(groups.shape) - groups).sum(-1) for packed in (ours, searched)
        ]
        assert (by_group[1] <= by_group[0] * (1 + 1e-4) + 1e-12 * np.square(groups).sum(-1)).all()
        assert mx.all(searched.scales != 0).item()


@every_form
def test_scales_and_biases_are_those_of_mlx(bits: int, group_size: int) -> None:
    for kind in KINDS:
        weight = mx.array(random_weight(kind, rows=4))
        _, scales, biases = mx.quantize(weight, group_size, bits)
        ours = affine.quantize(weight, group_size, bits, mx.bfloat16)
        assert mx.array_equal(ours.scales, scales.astype(mx.bfloat16))
        assert mx.array_equal(ours.biases, biases.astype(mx.bfloat16))


@given(
    st.sampled_from(BITS),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(DTYPES),
    st.floats(1e-6, 1e3),
    st.floats(-2, 2),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_code_is_the_nearest_under_the_stored_scale(
    bits: int, group_size: int, dtype: mx.Dtype, spread: float, shift: float, seed: int, search: bool
) -> None:
    weight = (spread * (np.random.default_rng(seed).normal(shift, 1, (3, 256)))).astype(np.float32)
    packed = affine.quantize(mx.array(weight), group_size, bits, dtype, search=search)
    scales, biases = (np.array(part.astype(mx.float32)).astype(np.float64) for part in packed[1:])
    codes = unpack_words(np.array(packed.weight), bits, 256).reshape(3, -1, group_size)
    groups = weight.reshape(3, -1, group_size).astype(np.float64)
    chosen = np.abs(codes * scales[..., None] + biases[..., None] - groups)
    grid = np.arange(2**bits)
    best = np.abs(grid * scales[..., None, None] + biases[..., None, None] - groups[..., None]).min(axis=-1)
    assert (chosen <= best + 1e-5 * np.abs(scales[..., None]) + 1e-6 * np.abs(groups)).all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from(BITS), st.booleans())
@settings(max_examples=25, deadline=None)
def test_row_chunks_do_not_matter(chunks: list[int], bits: int, search: bool) -> None:
    weight = mx.array(random_weight("heavy-tailed", rows=sum(chunks), width=128))
    whole = affine.quantize(weight, 64, bits, mx.bfloat16, search=search)
    start = 0
    for rows in chunks:
        part = affine.quantize(weight[start : start + rows], 64, bits, mx.bfloat16, search=search)
        for ours, theirs in zip(part, whole, strict=True):
            assert mx.array_equal(ours, theirs[start : start + rows])
        start += rows


def test_fp8_keeps_its_precision_through_float32() -> None:
    """The error that 8 bits add to FP8: from float32 with codes rounded against what is stored, and all in bfloat16."""
    weight = np.random.default_rng(1).normal(0, 0.02, (256, 1024)).astype(np.float32)
    source = decode_fp8(*encode_fp8(weight), (128, 128))
    ours = relative_error(source, affine.quantize(mx.array(source), 64, 8, mx.bfloat16), 8)
    assert 0.0050 < ours <= 0.0056
    through_bf16 = mx.quantize(mx.array(source).astype(mx.bfloat16), 64, 8)
    read_in_bf16 = np.array(mx.dequantize(*through_bf16, 64, 8).astype(mx.float32))
    assert np.linalg.norm(read_in_bf16 - source) > 0.0080 * np.linalg.norm(source)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.12), (3, 0.08), (4, 0.06), (8, 0.01)])
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed"])
def test_search_gains(bits: int, gain: float, kind: str) -> None:
    weight = random_weight(kind)
    plain = affine.quantize(mx.array(weight), 64, bits, mx.bfloat16)
    searched = affine.quantize(mx.array(weight), 64, bits, mx.bfloat16, search=True)
    assert relative_error(weight, searched, bits) <= (1 - gain) * relative_error(weight, plain, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_trained_weights_gain_too(bits: int) -> None:
    checkpoint = Checkpoint.open(DEMO)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = arrays_of(checkpoint, [name])[name].astype(mx.float32)
    assert weight.shape[1] % 64 == 0
    mlx = Packed(*mx.quantize(weight.astype(mx.bfloat16), 64, bits))
    ours = affine.quantize(weight, 64, bits, mx.bfloat16)
    searched = affine.quantize(weight, 64, bits, mx.bfloat16, search=True)
    errors = [relative_error(np.array(weight), packed, bits) for packed in (mlx, ours, searched)]
    assert errors[2] < 0.98 * errors[1]
    assert errors[1] <= errors[0]


def test_sum_of_squares() -> None:
    weight = random_weight("gaussian")
    packed = affine.quantize(mx.array(weight), 64, 4, mx.bfloat16)
    error = affine.sum_of_squares(mx.array(weight) - affine.dequantize(packed, 64, 4))
    assert error.item() == pytest.approx(squared_error(weight, packed, 4), rel=1e-4)
    total = affine.sum_of_squares(mx.array(weight))
    assert total.item() == pytest.approx(float(np.square(weight.astype(np.float64)).sum()), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 77, 255])
def test_weights_that_are_not_finite_are_found(value: float, column: int) -> None:
    weight = random_weight("gaussian", rows=4, width=256)
    weight[2, column] = value
    packed = affine.quantize(mx.array(weight), 64, 4, mx.bfloat16)
    with pytest.raises(
        SourceError, match=rf"^x\.weight: row 102, group {column // 64} has weights that are not finite"
    ):
        affine.check(packed, "x.weight", row_offset=100)


def test_weights_too_large_for_float16_are_found() -> None:
    packed = affine.quantize(mx.full((1, 64), 1e6), 64, 4, mx.float16)
    with pytest.raises(SourceError, match="too large for float16"):
        affine.check(packed, "x.weight")
    affine.check(affine.quantize(mx.full((1, 64), 1e6), 64, 4, mx.float32), "x.weight")


@pytest.mark.parametrize(
    ("group_size", "expected"),
    [(32, 32), (64, 64), (128, 128), (256, 128), (4096, 128), (96, 32), (192, 64), (1056, 32), (16, None), (24, None)],
)
def test_repack_group_size(group_size: int, expected: int | None) -> None:
    assert affine.repack_group_size(group_size) == expected
