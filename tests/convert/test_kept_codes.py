"""Codes that were kept are compared as integers: the sums of an independent unpacker, and no wrong bit goes unseen."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlxqwen_convert import affine, awq, compressed_tensors, gptq
from mlxqwen_convert.affine import Packed
from mlxqwen_convert.awq_words import hold_the_same, mlx_words
from mlxqwen_convert.buffers import Buffers
from mlxqwen_convert.kept_codes import Found, SourceCodes, look_at, of_awq, of_compressed_tensors, of_gptq, of_mlx
from tests.convert.encoders import (
    Grouped,
    encode_awq,
    encode_compressed_tensors,
    encode_gptq,
    unpack_words,
)

FORMS = ("awq", "gptq4", "gptq8", "gptq-v2", "int4", "int8", "int4-asymmetric", "int8-asymmetric")


def random_grouped(bits: int, rows: int, groups: int, group_size: int, *, symmetric: bool, seed: int = 0) -> Grouped:
    """Codes over their whole range, scales of both signs and zero points of which the first format can say all."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, groups * group_size))
    zeros = np.full((rows, groups), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (rows, groups))
    scales = (rng.choice((-1, 1), (rows, groups)) * 2.0 ** rng.uniform(-12, -6, (rows, groups))).astype(np.float16)
    return Grouped(codes, zeros, scales, np.arange(groups * group_size) // group_size)


def kept(form: str, grouped: Grouped, dtype: mx.Dtype = mx.float16) -> tuple[SourceCodes, Packed, int]:
    """A source, what becomes of it, and its bits."""
    bits = 8 if "8" in form else 4
    if form == "awq":
        qweight, qzeros, scales = (mx.array(encode_awq(grouped)[word]) for word in ("qweight", "qzeros", "scales"))
        return of_awq(qweight, qzeros, scales), awq.repack(qweight, qzeros, scales, dtype), bits
    if form.startswith("gptq"):
        offset = 0 if form == "gptq-v2" else 1
        named = encode_gptq(grouped, bits, zero_offset=offset)
        qweight, qzeros, scales = (mx.array(named[word]) for word in ("qweight", "qzeros", "scales"))
        repacked = gptq.repack(qweight, qzeros, scales, bits, dtype, zero_offset=offset)
        return of_gptq(qweight, qzeros, scales, bits, offset), repacked, bits
    symmetric = "asymmetric" not in form
    named = encode_compressed_tensors(grouped, bits, symmetric=symmetric)
    packed, scale = mx.array(named["weight_packed"]), mx.array(named["weight_scale"])
    zeros = None if symmetric else mx.array(named["weight_zero_point"])
    made = compressed_tensors.repack(packed, scale, zeros, bits, grouped.codes.shape[1], dtype)
    return of_compressed_tensors(packed, scale, zeros, bits), made, bits


def looked_at(source: SourceCodes, written: Packed, bits: int) -> Found:
    group_size = written.weight.shape[1] * 32 // bits // written.scales.shape[1]
    return look_at(source, written, bits, group_size, Buffers())


def meaning(written: Packed, bits: int) -> NDArray[np.float64]:
    scales, biases = (np.array(part.astype(mx.float32)).astype(np.float64)[..., None] for part in written[1:])
    width = written.weight.shape[1] * 32 // bits
    codes = unpack_words(np.array(written.weight), bits, width).reshape(*scales.shape[:2], -1)
    return (codes * scales + biases).reshape(-1, width)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_sums_are_those_of_an_independent_unpacker(form: str, dtype: mx.Dtype, group_size: int) -> None:
    grouped = random_grouped(8 if "8" in form else 4, 24, 2, group_size, symmetric=form in ("int4", "int8"))
    source, written, bits = kept(form, grouped, dtype)
    found = looked_at(source, written, bits)
    scales = grouped.scales.astype(np.float64)
    exact = ((grouped.codes.reshape(*scales.shape, -1) - grouped.zeros[..., None]) * scales[..., None]).reshape(24, -1)
    assert found.codes_are_kept
    assert found.squared_norm == pytest.approx(np.square(exact).sum(), rel=1e-12)
    assert found.squared_error == pytest.approx(np.square(meaning(written, bits) - exact).sum(), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("form", FORMS)
def test_no_wrong_bit_goes_unseen(form: str) -> None:
    grouped = random_grouped(8 if "8" in form else 4, 8, 1, 32, symmetric=form in ("int4", "int8"))
    source, written, _ = kept(form, grouped)
    words = np.array(written.weight)
    for place in np.ndindex(words.shape):
        for bit in range(32):
            wrong = words.copy()
            wrong[place] ^= np.uint32(1 << bit)
            assert not source.are(wrong, Buffers())
    assert source.are(words, Buffers())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("word", ["scales", "biases"])
def test_scales_and_biases_are_held_to_the_sources(form: str, word: str) -> None:
    grouped = random_grouped(8 if "8" in form else 4, 16, 3, 64, symmetric=form in ("int4", "int8"))
    source, written, bits = kept(form, grouped)
    numbers = np.array(getattr(written, word))
    numbers[5, 1] = np.nextafter(numbers[5, 1], np.float16(np.inf))  # the least that can be wrong
    found = looked_at(source, written._replace(**{word: mx.array(numbers)}), bits)
    errors = found.scale_errors if word == "scales" else found.bias_errors
    others = np.abs(np.delete(errors.reshape(-1), np.ravel_multi_index((1, 5), errors.shape)))
    assert abs(errors[1, 5]) > 2.0**-12 * abs(numbers[5, 1])
    assert (others <= 2.0**-11 * np.abs(np.delete(np.array(getattr(written, word)).T.reshape(-1), 16 + 5))).all()


@pytest.mark.parametrize("seed", range(2))
def test_weights_that_are_all_zero_have_no_norm_below_zero(seed: int) -> None:
    """Scales of 24 bits and zero points of 8: what cancels out is rounded on the way."""
    scales = np.random.default_rng(seed).uniform(0.01, 1.0, (256, 1)).astype(np.float32)
    zeros = np.arange(256)[:, None]
    factors = scales.astype(np.float64).T
    source = SourceCodes(8, lambda weight, _: True, factors, -zeros.T * factors)
    codes, biases = mx.repeat(mx.array(zeros.astype(np.uint8)), 128, axis=1), (-zeros * scales).astype(np.float32)
    written = Packed(affine.pack(codes, 8), mx.array(scales), mx.array(biases))
    for row in range(256):
        own = source._replace(scales=source.scales[:, [row]], biases=source.biases[:, [row]])
        found = looked_at(own, Packed(*(part[row : row + 1] for part in written)), 8)
        assert 0 <= found.squared_norm < 1e-6
        assert 0 <= found.squared_error < 1e-6


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_awq_words_by_the_definition(columns: int, words: int, seed: int) -> None:
    """Nibble by nibble; and two ways that go wrong alike would have to be wrong on any data."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (8 * columns, 8 * words))
    grouped = Grouped(codes, codes[:, :1], np.ones((len(codes), 1), np.float16), np.zeros(8 * words, np.int64))
    qweight: NDArray[Any] = encode_awq(grouped)["qweight"].view(np.uint32)
    weight = mlx_words(qweight)
    assert np.array_equal(affine.unpack(mx.array(weight), 4), codes)
    assert hold_the_same(weight, qweight, Buffers())
    exchanged = weight.copy()
    exchanged[[0, 1]] = exchanged[[1, 0]]
    assert hold_the_same(exchanged, qweight, Buffers()) == np.array_equal(weight[0], weight[1])


@pytest.mark.parametrize(("own", "target"), [(4, 8), (3, 8), (6, 8), (3, 3), (5, 5), (6, 6), (2, 2), (4, 4), (8, 8)])
def test_codes_in_wider_words_and_of_all_bits(own: int, target: int) -> None:
    codes = mx.random.randint(0, 2**own, (6, 128), key=mx.random.key(own)).astype(mx.uint8)
    scales, biases = (mx.random.normal((6, 2), key=mx.random.key(seed)) for seed in (1, 2))
    source = of_mlx(Packed(affine.pack(codes, own), scales, biases), own)
    written = Packed(affine.pack(codes, target), mx.repeat(scales, 2, axis=1), mx.repeat(biases, 2, axis=1))
    found = look_at(source, written, target, 32, Buffers())
    assert found.codes_are_kept
    assert found.squared_error == 0
    assert found.squared_norm == pytest.approx(np.square(meaning(written, target)).sum(), rel=1e-12)
    for wrong in (1, 1 << (target - 1)):  # of the code's own bits, and of those beyond
        changed = mx.array(np.bitwise_xor(np.array(codes), np.array([[wrong] + [0] * 127], np.uint8)))
        assert not look_at(source, written._replace(weight=affine.pack(changed, target)), target, 32, Buffers())[0]
