"""FP8 weights by NumPy: the same bits as by MLX, errors by an independent decoder, what is unusual left to MLX."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlxqwen_convert import affine, bfloat16, convert, fp8, fp8_rows
from mlxqwen_convert.affine import GROUP_SIZES, Packed
from mlxqwen_convert.bfloat16 import Quantized, Quantizer, Words
from mlxqwen_convert.buffers import Buffers
from mlxqwen_convert.errors import SourceError, VerificationError
from mlxqwen_convert.fp8_rows import Fp8Rows
from mlxqwen_convert.pipeline import NumpyRows
from tests.convert.checkpoints import make_source, plain_tensor
from tests.convert.encoders import decode_fp8, unpack_affine
from tests.convert.test_bfloat16 import every_form, same

Codes = NDArray[np.uint8]
Block = tuple[int, int] | None
# Of `fenv_t`, the word of the control register, and its bits for subnormals.
_FLUSHING = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}


@pytest.fixture(scope="module", params=[1 << 11, 1 << 18])
def pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Many blocks and pieces, and as large as they are."""
    with (
        patch.object(bfloat16, "_WEIGHTS_PER_BLOCK", request.param),
        patch.object(fp8_rows, "_PIECE", min(request.param, fp8_rows._PIECE)),
    ):
        yield


def quickly(
    codes: Codes, scale: mx.array, block: Block, row_offset: int, group_size: int, bits: int
) -> Quantized | None:
    buffers = Buffers()
    rows = Fp8Rows((len(codes), codes.shape[1]), group_size, scale, block, row_offset, buffers)
    rows.codes[:] = codes.reshape(-1)
    assert rows.are_usual
    found = rows.quantized(Quantizer(codes.size, group_size, bits, buffers))
    return None if found is None else rows.measured(found)


def by_mlx(codes: Codes, scale: mx.array, block: Block, row_offset: int, group_size: int, bits: int) -> Packed:
    floats = fp8.dequantize_rows(mx.array(codes), scale, block, row_offset)
    return affine.quantize(floats, group_size, bits, mx.bfloat16)


def finite(rng: np.random.Generator, shape: tuple[int, ...]) -> Codes:
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes


@pytest.mark.usefixtures("pieces")
@every_form
@pytest.mark.parametrize("kind", ["any", "gaussian", "alike", "one-sided", "subnormal", "nothing", "few"])
def test_the_same_bits_as_by_mlx(kind: str, bits: int, group_size: int) -> None:
    rng = np.random.default_rng(bits + group_size)
    codes = finite(rng, (96, 384))
    if kind == "gaussian":
        codes = np.array(mx.to_fp8(mx.array(np.clip(rng.normal(0, 100, codes.shape), -448, 448).astype(np.float32))))
    elif kind == "alike":  # a bias that is not exact is then thousands of steps from the weights
        codes = np.repeat(codes[:, ::group_size], group_size, axis=1)[:, :384]
    elif kind == "one-sided":
        codes = (codes & 0x07) + rng.integers(0, 14, (96, 1)).astype(np.uint8) * 8 + (rng.integers(0, 2, (96, 1)) << 7)
        codes = codes.astype(np.uint8)
    elif kind == "subnormal":
        codes &= 0x87
    elif kind == "nothing":
        codes &= 0x80
    elif kind == "few":
        codes[rng.random(codes.shape) < 0.97] = 0
    scale = mx.array((2.0 ** rng.uniform(-30, 7, (2, 3))).astype(np.float32))
    for block, offset, own in (((128, 128), 40, scale), (None, 0, scale[0, 0]), (None, 0, scale.mean())):
        same(quickly(codes, own, block, offset, group_size, bits), by_mlx(codes, own, block, offset, group_size, bits))


@pytest.mark.usefixtures("pieces")
@given(
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from([None, (1, 128), (128, 128), (16, 256)]),
    st.integers(0, 200),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from((4, 8)),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_any_blocks_and_rows(
    rows: int, groups: int, block: Block, offset: int, group_size: int, bits: int, seed: int
) -> None:
    """Ragged last blocks, rows that begin within a block, scales by row and for the whole tensor."""
    rng = np.random.default_rng(seed)
    codes = finite(rng, (rows, groups * group_size))
    shape: tuple[int, ...] = (rows, 1) if seed % 2 else (1,)
    if block is not None:
        needed = fp8.scale_rows(offset, offset + rows, block)
        shape = (needed.stop - needed.start, -(-codes.shape[1] // block[1]))
    scale = mx.array(rng.uniform(1e-4, 1e-2, shape).astype(np.float32))
    same(quickly(codes, scale, block, offset, group_size, bits), by_mlx(codes, scale, block, offset, group_size, bits))


@pytest.mark.usefixtures("pieces")
@every_form
def test_errors_are_those_of_an_independent_decoder(bits: int, group_size: int) -> None:
    rng = np.random.default_rng(bits)
    codes, scales = finite(rng, (64, 256)), rng.uniform(1e-4, 1e-2, (1, 2)).astype(np.float32)
    found = quickly(codes, mx.array(scales), (128, 128), 0, group_size, bits)
    assert found is not None
    meaning = decode_fp8(codes, scales, (128, 128)).astype(np.float64)
    words = found.weight.reshape(-1).view(np.uint32).reshape(64, -1)
    restored = unpack_affine(words, found.wide_scales.reshape(64, -1), found.wide_biases.reshape(64, -1), bits)
    assert found.squared_norm == pytest.approx(np.square(meaning).sum(), rel=1e-5)
    assert found.squared_error == pytest.approx(np.square(meaning - restored).sum(), rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3e-39, 127.5])
def test_every_code_is_widened_as_by_mlx(scale: float) -> None:
    """Both ways, the quantizer's and that of the comparison, which a group of one code sees alone."""
    codes = np.repeat(np.arange(256, dtype=np.uint8), 32).reshape(256, 32)
    expected = np.array(mx.from_fp8(mx.array(codes), mx.float32))
    rows = Fp8Rows((256, 32), 32, mx.array([scale]), None, 0, Buffers())
    rows.codes[:] = codes.reshape(-1)
    numbers = np.empty(codes.size, np.uint16)
    rows.widen(numbers, 0)
    widened = (numbers.astype(np.uint32) << 16).view(np.float32).reshape(codes.shape) * np.float32(2.0**120)
    is_number = ~np.isnan(expected)
    assert np.array_equal(widened[is_number].view(np.uint32), expected[is_number].view(np.uint32))
    for code in np.flatnonzero(is_number[:, 0]):
        alone = Fp8Rows((1, 32), 32, mx.array([scale]), None, 0, Buffers())
        alone.codes[:] = codes[code]
        nothing = np.zeros((1, 32), np.uint8), np.zeros(1, np.uint16), np.zeros(1, np.uint16)
        norm = np.square((expected[code] * np.float32(scale)).astype(np.float64)).sum()
        found = alone.measured(Quantized(32, 8, *nothing, np.ones(1, np.float32), np.zeros(1, np.float32), 0.0, 0.0))
        assert found.squared_norm == found.squared_error == pytest.approx(norm, rel=1e-6, abs=1e-44)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_what_is_no_number_is_left_to_mlx(code: int) -> None:
    for place in (0, 5, 64 * 77 + 31):
        codes = np.full(64 * 100, 0x38, np.uint8)
        codes[1::2] |= 0x80
        codes[place] = code
        assert quickly(codes.reshape(-1, 64), mx.array([1.0]), None, 0, 64, 8) is None


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 2.0**7])
def test_unusual_scales_are_left_to_mlx(scale: float) -> None:
    buffers = Buffers()
    rows = Fp8Rows((2, 64), 64, mx.array([[1.0], [scale]]), None, 0, buffers)
    rows.codes.fill(0x38)
    assert rows.quantized(Quantizer(128, 64, 8, buffers)) is None


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in _FLUSHING, reason="sets a register in glibc's layout"
)
def test_subnormals_that_are_taken_for_zeros_are_left_to_mlx() -> None:
    """As in programs that load a library compiled with -ffast-math."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    word, bits = _FLUSHING[platform.machine()]
    usual, flushing = ((ctypes.c_uint32 * 8)() for _ in range(2))
    libm.fegetenv(usual)
    ctypes.memmove(flushing, usual, ctypes.sizeof(usual))
    flushing[word] |= bits
    rows = Fp8Rows((1, 64), 64, mx.array([1.0]), None, 0, Buffers())
    libm.fesetenv(flushing)
    try:
        left_to_mlx = not rows.are_usual
    finally:
        libm.fesetenv(usual)
    assert left_to_mlx
    assert rows.are_usual


def test_zero_scales_over_zeros_are_converted_by_mlx(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8")
    name = "model.layers.0.mlp.up_proj"
    scale, codes = (source.stored[f"{name}.{word}"][1] for word in ("weight_scale_inv", "weight"))
    source.stored[f"{name}.weight_scale_inv"] = plain_tensor(np.zeros(scale.shape, np.float32), "BF16")[0]
    source.write()
    with pytest.raises(SourceError, match="zero over codes that are not"):
        convert(source.folder, tmp_path / "out")
    source.stored[f"{name}.weight"] = ("F8_E4M3", np.zeros_like(codes))
    source.write()
    assert convert(source.folder, tmp_path / "out").modules[name]["relative_error"] == 0


@pytest.mark.parametrize("step", ["widening", "factors", "packing", "some codes", "biases"])
def test_each_step_that_goes_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """What compares shares no step with what quantizes."""
    source = make_source(tmp_path / "in", "fp8").write()
    if step == "widening":
        widen = Fp8Rows.widen

        def negated(rows: Fp8Rows, weights: Words, start: int) -> None:
            widen(rows, weights, start)
            weights[::2] ^= 0x8000

        monkeypatch.setattr(Fp8Rows, "widen", negated)
    elif step == "factors":
        spread = Quantizer._spread
        monkeypatch.setattr(Quantizer, "_spread", lambda self, factors: spread(self, np.roll(factors, 1) * 1.2))
    elif step == "packing":
        quantize_block = Quantizer._quantize_block

        def exchanged(quantizer: Quantizer, block: int, **options: Any) -> None:
            quantize_block(quantizer, block, **options)
            quantizer._weight[block] = np.roll(quantizer._weight[block], 1, axis=-1)

        monkeypatch.setattr(Quantizer, "_quantize_block", exchanged)
    elif step == "some codes":
        quantized = Fp8Rows.quantized

        def flipped(rows: Fp8Rows, quantizer: Quantizer) -> Quantized | None:
            found = quantized(rows, quantizer)
            assert found is not None
            found.weight.reshape(-1).view(np.uint8)[77::1000] ^= 0x80
            return found

        monkeypatch.setattr(Fp8Rows, "quantized", flipped)
    else:
        repeat = bfloat16._repeat
        monkeypatch.setattr(bfloat16, "_repeat", lambda numbers, out: repeat(np.roll(numbers, 1), out))
    with pytest.raises(VerificationError, match="is off by"):
        convert(source.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fp8_goes_by_numpy(tmp_path: Path) -> None:
    """Not by MLX, but for bits, scales and searches that NumPy does not do."""
    source = make_source(tmp_path / "in", "fp8").write()
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"bits": 4}, True),
        ({"bits": 6}, False),
        ({"dtype": "float16"}, False),
        ({"quality": True}, False),
    ]
    for number, (options, by_numpy) in enumerate(cases):
        with patch.object(NumpyRows, "make", autospec=True, side_effect=NumpyRows.make) as made:
            convert(source.folder, tmp_path / f"out{number}", workers=1, **options)
        formats = [call.args[1].modules[call.args[2].module].source_label for call in made.call_args_list]
        assert ("FP8" in formats) == by_numpy


def test_working_bytes_are_those_of_the_buffers() -> None:
    for form, group_size in (((64, 1024), 32), ((333, 64), 64), ((1024, 512), 128)):
        buffers, weights = Buffers(), form[0] * form[1]
        rows = Fp8Rows(form, group_size, mx.array([0.5]), None, 0, buffers)
        rows.codes.fill(0x38)
        quantizer = Quantizer(weights, group_size, 8, buffers)
        found = rows.quantized(quantizer)
        assert found is not None
        rows.measured(found)
        kept = sum(array.nbytes for array in buffers._kept.values())
        expected = bfloat16.working_bytes(weights, group_size, 8) + fp8_rows.working_bytes(weights, group_size)
        assert kept < expected
