"""A sampler that looks ahead and goes back: against one that never did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler

VOCAB_SIZE = 11
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 4]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 1000),
)


def logits(seed: int, rows: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal((rows, VOCAB_SIZE)).astype(np.float32))


def drawn(sampler: Sampler, seeds: Sequence[int], rows: int = 1) -> list[list[int]]:
    return [cast(list[int], sampler(logits(seed, rows)).tolist()) for seed in seeds]


@settings(max_examples=30, deadline=None)
@given(params=st.lists(PARAMS, min_size=1, max_size=3), before=st.integers(0, 12), ahead=st.integers(0, 12))
def test_draws_that_were_taken_back_leave_no_trace(params: list[SamplingParams], before: int, ahead: int) -> None:
    rows = len(params)
    sampler, expected = (Sampler(params, [[1, 2]] * rows, VOCAB_SIZE) for _ in range(2))
    assert drawn(sampler, range(before), rows) == drawn(expected, range(before), rows)
    state = sampler.state
    drawn(sampler, range(100, 100 + ahead), rows)
    sampler.restore(state)
    assert drawn(sampler, range(50, 60), rows) == drawn(expected, range(50, 60), rows)


@settings(max_examples=30, deadline=None)
@given(params=st.lists(PARAMS, min_size=1, max_size=3), tokens=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=14))
def test_what_is_to_be_remembered_takes_the_place_of_what_is_drawn(
    params: list[SamplingParams], tokens: list[int]
) -> None:
    rows = len(params)
    sampler, expected = (Sampler(params, [[1, 2]] * rows, VOCAB_SIZE) for _ in range(2))
    for place, token in enumerate(tokens):
        remembered = mx.array([(token + row) % VOCAB_SIZE for row in range(rows)], dtype=mx.int32)
        found, alone = sampler(logits(place, rows), remember=remembered), expected(logits(place, rows))
        expected.replace(alone, remembered)
        assert found.tolist() == alone.tolist()
    assert drawn(sampler, range(50, 60), rows) == drawn(expected, range(50, 60), rows)
