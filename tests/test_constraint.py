"""Masks against NumPy's `unpackbits`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.errors import GenerationError
from mlxqwen.sampling.constraint import Constraint, Unconstrained, apply_masks, check_mask, pack_mask
from mlxqwen.sampling.sampler import BAD_TOKEN, Sampler, SamplingParams


@given(st.integers(1, 100), st.lists(st.none() | st.integers(0, 2**128 - 1), min_size=1, max_size=4), st.data())
def test_what_is_not_allowed_is_minus_infinity(vocab: int, rows: list[int | None], data: st.DataObject) -> None:
    words = -(-vocab // 32)
    packed = [None if bits is None else np.frombuffer(bits.to_bytes(16, "little"), np.uint32)[:words] for bits in rows]
    logits = np.random.default_rng(0).normal(size=(len(rows), vocab)).astype(np.float32)
    expected = logits.copy()
    for row, mask in zip(expected, packed, strict=True):
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab)
            row[allowed == 0] = -np.inf
    masks = [None if mask is None else mx.array(mask) for mask in packed]
    for dtype in (mx.float32, mx.bfloat16):
        given_logits = mx.array(logits).astype(dtype)
        masked = apply_masks(given_logits, masks)
        assert masked.dtype == dtype
        finite = np.array(masked.astype(mx.float32))
        assert np.array_equal(np.isinf(finite), np.isinf(expected))
        kept = ~np.isinf(expected)
        assert np.array_equal(finite[kept], np.array(given_logits.astype(mx.float32))[kept])


@given(st.integers(1, 100), st.data())
def test_packed_tokens_are_those_allowed(vocab: int, data: st.DataObject) -> None:
    tokens = data.draw(st.sets(st.integers(0, vocab - 1)))
    mask = pack_mask(tokens, vocab)
    bits = np.unpackbits(np.array(mask).view(np.uint8), bitorder="little")
    assert set(np.flatnonzero(bits).tolist()) == tokens
    if tokens:
        check_mask(mask, vocab)
    else:
        with pytest.raises(GenerationError, match="constraint: found no token"):
            check_mask(mask, vocab)


def test_bits_beyond_the_vocabulary_allow_nothing() -> None:
    with pytest.raises(GenerationError, match="constraint: found no token"):
        check_mask(pack_mask([40, 63], 64), 40)


def test_a_row_that_allows_nothing_fails_alone() -> None:
    logits = mx.zeros((3, 40))
    masked = apply_masks(logits, [pack_mask([], 40), None, pack_mask([7], 40)])
    sampler = Sampler([SamplingParams(temperature=0.0)] * 3, [[1]] * 3, 40)
    drawn = np.array(sampler(masked))
    assert (drawn[0], drawn[2]) == (BAD_TOKEN, 7)
    assert drawn[1] != BAD_TOKEN


def test_without_masks_the_logits_are_the_same_array() -> None:
    logits = mx.zeros((2, 40))
    assert apply_masks(logits, [None, None]) is logits


def test_unconstrained() -> None:
    free: Constraint = Unconstrained()
    assert free.mask() is None
    assert free.settle(5) == 5
    free.advance(5)
    assert free.fork().settle(6) == 6
