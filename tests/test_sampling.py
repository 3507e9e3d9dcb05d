"""Sampling: against a float64 reference, hand-computed cases, and the statistics of what is drawn."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlxqwen.errors import GenerationError, OptionError
from mlxqwen.sampling.params import NON_THINKING, THINKING, SamplingParams, resolve_sampling
from mlxqwen.sampling.sampler import Sampler, check_token, token_logprobs
from tests.reference_sampling import assert_drawn_from, penalised, probabilities, total_variation

QWEN_VOCAB = 151_936
GREEDY = SamplingParams(temperature=0.0)
PENALTIES: dict[str, Any] = {
    "presence_penalty": 1.5,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {5: 3.3, 7: -100.0},
}


def distribution(
    logits: Sequence[float] | NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
) -> NDArray[np.float64]:
    logprobs = token_logprobs(mx.array(np.asarray(logits, dtype=np.float32)), params, prompt, generated)
    assert logprobs.dtype == mx.float32
    return np.exp(np.array(logprobs).astype(np.float64))


def ids(tokens: mx.array) -> list[int]:
    return [int(token) for token in np.array(tokens)]


def draws(logits: mx.array, params: SamplingParams, count: int) -> list[int]:
    """`count` tokens of one row, each from the same logits."""
    sampler = Sampler([params], [[]], logits.size)
    tokens: list[int] = []
    for start in range(0, count, 500):
        chunk = [sampler(logits[None]) for _ in range(min(500, count - start))]
        tokens += ids(mx.concatenate(chunk))
    return tokens


# Parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("temperature", "min_p", "top_p") for value in (-0.1, math.nan, math.inf, True)],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)],
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", -math.inf),
        ("top_k", -2),
        ("top_k", 2.0),
        ("top_k", False),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("logit_bias", [1, 2]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"five": 1.0}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: 101}),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(OptionError, match=rf"^{name}.*found .*, expected"):
        SamplingParams(**options)


def test_params_by_position_and_by_whole_numbers() -> None:
    params = SamplingParams(1, 5, 1, 0, 1, -1, 2, {3: 1}, 7)
    assert params == SamplingParams(
        temperature=1.0,
        top_k=5,
        top_p=1.0,
        min_p=0.0,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=2.0,
        logit_bias={3: 1.0},
        seed=7,
    )
    assert isinstance(params.temperature, float)
    assert hash(params) == hash(dataclasses.replace(params))


def test_logit_bias_is_a_copy() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = math.nan
    assert params.logit_bias == {1: 2.0}


# Resolving


def test_the_mode_decides_over_the_file_and_the_user_over_both() -> None:
    file = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "repetition_penalty": 1.05}
    params, notes = resolve_sampling(file, thinking=False, overrides={})
    assert params == dataclasses.replace(NON_THINKING, repetition_penalty=1.05)
    params, notes = resolve_sampling(file, thinking=True, overrides={"top_k": 5, "seed": 3, "min_p": None})
    assert params == dataclasses.replace(THINKING, top_k=5, seed=3, repetition_penalty=1.05)
    assert notes == ()


def test_greedy_only_by_the_users_word() -> None:
    file = {"do_sample": False, "temperature": 0.0}
    assert resolve_sampling(file, thinking=True, overrides={})[0] == THINKING
    assert resolve_sampling({}, thinking=True, overrides={"temperature": 0})[0].greedy


@pytest.mark.parametrize("junk", [None, [], "greedy", 7])
def test_a_file_that_is_no_object_is_noted(junk: object) -> None:
    params, notes = resolve_sampling(junk, thinking=True, overrides={})
    assert params == THINKING
    assert len(notes) == 1
    assert "expected an object" in notes[0]


def test_each_junk_value_of_the_file_is_noted_and_the_rest_kept() -> None:
    file = {
        "temperature": "warm",
        "top_k": [20],
        "min_p": None,
        "repetition_penalty": -1,
        "presence_penalty": 1.5,
        "eos_token_id": object(),
    }
    params, notes = resolve_sampling(file, thinking=False, overrides={})
    assert params == dataclasses.replace(NON_THINKING, presence_penalty=1.5)
    assert [note.split(": ")[1] for note in notes] == ["temperature", "top_k", "repetition_penalty"]


@pytest.mark.parametrize(
    ("bits", "file", "overrides", "presence_penalty"),
    [
        (None, {}, {}, 0.0),
        (8, {}, {}, 0.0),
        (5, {}, {}, 0.0),
        (4, {}, {}, 1.5),
        (2, {}, {"presence_penalty": None}, 1.5),
        (4, {"presence_penalty": 0.5}, {}, 0.5),
        (4, {"presence_penalty": 0}, {}, 0.0),
        (4, {"presence_penalty": "much"}, {}, 1.5),
        (4, {"presence_penalty": 0.5}, {"presence_penalty": 0.25}, 0.25),
        (4, {}, {"presence_penalty": 0}, 0.0),
    ],
)
def test_weights_of_few_bits_have_a_presence_penalty(
    bits: int | None, file: dict[str, Any], overrides: dict[str, Any], presence_penalty: float
) -> None:
    params, _ = resolve_sampling(file, thinking=True, overrides=overrides, bits=bits)
    assert params == dataclasses.replace(THINKING, presence_penalty=presence_penalty)


def test_bad_overrides_are_errors() -> None:
    with pytest.raises(OptionError, match="found 'temprature', expected one of temperature"):
        resolve_sampling({}, thinking=True, overrides={"temprature": 1.0})
    with pytest.raises(OptionError, match="top_p: found 2"):
        resolve_sampling({}, thinking=True, overrides={"top_p": 2})


# The distribution, by hand


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_reply() -> None:
    got = distribution([2.0, 2.0, -1.0, -1.0, 0.5], SamplingParams(repetition_penalty=2.0), [0, 2], [4])
    weights = np.exp([1.0, 2.0, -2.0, -1.0, 0.25])
    np.testing.assert_allclose(got, weights / weights.sum(), rtol=1e-6)


def test_presence_and_frequency_count_the_reply_alone() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    got = distribution([0.0, 0.0, 0.0, 0.0], params, [0, 0, 1], [1, 2, 2, 2])
    weights = np.exp([0.0, -1.5, -2.5, 0.0])
    np.testing.assert_allclose(got, weights / weights.sum(), rtol=1e-6)


def test_penalties_come_before_temperature_and_bias_before_penalties() -> None:
    params = SamplingParams(temperature=0.5, presence_penalty=1.0, repetition_penalty=2.0, logit_bias={0: 3.0})
    got = distribution([1.0, 1.0], params, [], [0])
    weights = np.exp([((1.0 + 3.0) / 2.0 - 1.0) / 0.5, 1.0 / 0.5])
    np.testing.assert_allclose(got, weights / weights.sum(), rtol=1e-6)


def test_top_p_measures_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    # Of the whole, 0.4 + 0.3 reaches 0.55 with two tokens; of the top two, 0.4 / 0.7 = 0.57 does with one.
    np.testing.assert_allclose(distribution(logits, SamplingParams(top_p=0.55)), [4 / 7, 3 / 7, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(distribution(logits, SamplingParams(top_p=0.55, top_k=2)), [1, 0, 0, 0])


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    np.testing.assert_allclose(distribution(logits, SamplingParams(min_p=0.4)), [4 / 9, 3 / 9, 2 / 9, 0], rtol=1e-6)


def test_ties_at_the_last_place_of_top_k_are_all_kept() -> None:
    got = distribution([1.0, 0.0, 3.0, 1.0, 1.0], SamplingParams(top_k=2))
    np.testing.assert_array_equal(got > 0, [True, False, True, True, True])


def test_ties_in_top_p_go_to_the_lower_ids() -> None:
    np.testing.assert_allclose(distribution([0.0] * 4, SamplingParams(top_p=0.5)), [0.5, 0.5, 0, 0])
    got = distribution([0.0] * 1000, SamplingParams(top_p=0.5, top_k=3))
    np.testing.assert_allclose(got, [1 / 500] * 500 + [0.0] * 500, rtol=1e-6)


def test_greedy_is_the_lowest_of_the_best_and_survives_what_softmax_would_not() -> None:
    logits = [-3e38, 3e38, 3e38, -math.inf]
    np.testing.assert_array_equal(
        np.array(token_logprobs(mx.array(logits), GREEDY, [], [])), [-math.inf, 0.0, -math.inf, -math.inf]
    )
    assert Sampler([GREEDY], [[]], 4)(mx.array([logits])).tolist() == [1]


def test_rows_of_a_batch_have_their_own_history() -> None:
    logits = mx.random.normal((3, 50), key=mx.random.key(0))
    params = SamplingParams(top_k=7, **PENALTIES)
    prompts, replies = [[1, 2], [3], []], [[4], [], [5, 5]]
    together = token_logprobs(logits, params, prompts, replies)
    for row in range(3):
        alone = token_logprobs(logits[row], params, prompts[row], replies[row])
        assert mx.array_equal(together[row], alone)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(OptionError, match="found shape"):
        token_logprobs(mx.zeros((1, 1, 4)), THINKING, [], [])
    with pytest.raises(OptionError, match="expected 2 of each"):
        token_logprobs(mx.zeros((2, 4)), THINKING, [[]], [[], []])
    with pytest.raises(OptionError, match="expected a sequence of ids per row"):
        token_logprobs(mx.zeros((2, 4)), THINKING, [1, 2], [1, 2])
    with pytest.raises(OptionError, match=r"found shape \(1, 4\), expected \(2, 4\)"):
        Sampler([THINKING, THINKING], [[], []], 4)(mx.zeros((1, 4)))
    with pytest.raises(OptionError, match="found 1 params and 2 prompts"):
        Sampler([THINKING], [[], []], 4)


@pytest.mark.parametrize("params", [SamplingParams(logit_bias={4: 1.0}), SamplingParams(repetition_penalty=1.1)])
def test_ids_outside_the_vocabulary_are_refused(params: SamplingParams) -> None:
    with pytest.raises(OptionError, match="found token 4, expected ids below the vocabulary size 4"):
        Sampler([params], [[4]], 4)
    with pytest.raises(OptionError, match="found token 9, expected ids below the vocabulary size 4"):
        token_logprobs(mx.zeros(4), SamplingParams(presence_penalty=1.0), [], [9])


# The distribution, against float64


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], SamplingParams, list[int], list[int]]:
    size = draw(st.integers(1, 400))
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 100.0, 1e4]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (generator.normal(size=size) * scale + draw(st.sampled_from([0.0, -1e4, 1e4]))).astype(np.float32)
    if draw(st.booleans()):
        logits = np.array(mx.array(logits).astype(mx.bfloat16).astype(mx.float32))
    logits[1:][generator.random(size - 1) < draw(st.sampled_from([0.0, 0.5]))] = -np.inf
    tokens = st.lists(st.integers(0, size - 1), max_size=12)
    # Values without coincidences: where two tokens tie only by rounding, either answer is right.
    biases = st.sampled_from([-100.0, -3.31, 0.0017, 2.718])
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.6, 1.0, 5.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 20, 10_000])),
        top_p=draw(st.sampled_from([1.0, 0.9531, 0.5123, 1e-9])),
        min_p=draw(st.sampled_from([0.0, 0.0517, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.37])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.1, 0.7])),
        logit_bias=draw(st.none() | st.dictionaries(st.integers(0, size - 1), biases)),
    )
    return logits, params, draw(tokens), draw(tokens)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_small_vocabularies_agree_with_float64(
    case: tuple[NDArray[np.float32], SamplingParams, list[int], list[int]],
) -> None:
    logits, params, prompt, generated = case
    expected = probabilities(logits.astype(np.float64), params, prompt, generated)
    assert total_variation(distribution(logits, params, prompt, generated), expected) <= 1e-5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=5.0, top_p=0.95),
        SamplingParams(temperature=0.01, min_p=0.05),
        SamplingParams(top_p=0.3, min_p=0.001, **PENALTIES),
        SamplingParams(top_k=1000, top_p=0.9),
        dataclasses.replace(THINKING, **PENALTIES),
    ],
)
@pytest.mark.parametrize("shape", ["peaked", "flat", "equal", "huge", "bfloat16"])
def test_the_real_vocabulary_agrees_with_float64(params: SamplingParams, shape: str) -> None:
    normal = np.random.default_rng(1).normal(size=QWEN_VOCAB)
    logits = {
        "peaked": normal * 4,
        "flat": normal * 0.01,
        "equal": normal * 0,
        "huge": normal + 1e4,
        "bfloat16": np.array(mx.array(normal * 4).astype(mx.bfloat16).astype(mx.float32)),
    }[shape].astype(np.float32)
    generated = [5, 5, 9, *np.argsort(-logits)[:20].tolist()]
    expected = probabilities(logits.astype(np.float64), params, [1, 2, 3], generated)
    assert total_variation(distribution(logits, params, [1, 2, 3], generated), expected) <= 1e-5


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.000003, 1.1, 0.7])
def test_penalties_on_huge_logits_lose_no_digits(repetition_penalty: float) -> None:
    # A float32 near 1e4 is right to 5e-4 only: rounding penalised logits would move them against each other.
    logits = (1e4 + np.random.default_rng(2).normal(size=60) / 5).astype(np.float32)
    params = SamplingParams(
        temperature=0.2,
        presence_penalty=0.04321,
        frequency_penalty=0.0123,
        repetition_penalty=repetition_penalty,
        logit_bias={1: 0.7},
    )
    expected = probabilities(logits.astype(np.float64), params, [0], range(30))
    assert total_variation(distribution(logits, params, [0], range(30)), expected) <= 1e-5


@pytest.mark.parametrize("temperature", [1e-10, 1e-40])
@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.3}, {"logit_bias": {0: -0.3}}],
)
def test_a_tiny_temperature_leaves_the_best_token(temperature: float, penalty: dict[str, Any]) -> None:
    logits = mx.array([5.1, 5.0, 1.0, 0.0])
    params = SamplingParams(temperature, **penalty)
    np.testing.assert_array_equal(distribution(np.array(logits), params, [], [0]), [0.0, 1.0, 0.0, 0.0])
    sampler = Sampler([params], [[]], 4)
    reply: list[int] = []
    for _ in range(12):
        best = penalised(np.array(logits).astype(np.float64), params, [], reply).argmax()
        reply += ids(sampler(logits[None]))
        assert reply[-1] == best


def test_min_p_keeps_a_penalised_best() -> None:
    for bias in (0.1, 0.2, 0.3, 0.7):
        got = distribution([5.0, 3.0], SamplingParams(min_p=1.0, logit_bias={0: bias}))
        np.testing.assert_array_equal(got, [1.0, 0.0])


def test_narrow_dtypes_are_computed_in_float32() -> None:
    logits = mx.random.normal((300,), key=mx.random.key(3)).astype(mx.bfloat16)
    narrow = token_logprobs(logits, THINKING, [], [])
    assert mx.array_equal(narrow, token_logprobs(logits.astype(mx.float32), THINKING, [], []))


# The draw


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(min_p=0.2, seed=2),
        SamplingParams(top_p=0.8, seed=3),
        SamplingParams(temperature=0.6, top_k=5, seed=4),
        SamplingParams(top_k=20, top_p=0.9, min_p=0.05, logit_bias={3: 2.0}, seed=5),
    ],
)
@pytest.mark.parametrize("vocab_size", [30, 1000])
def test_draws_follow_the_distribution(params: SamplingParams, vocab_size: int) -> None:
    logits = mx.random.normal((vocab_size,), key=mx.random.key(9)) * 2
    expected = np.exp(np.array(token_logprobs(logits, params, [], [])).astype(np.float64))
    assert_drawn_from(expected, draws(logits, params, 600))


def test_ties_beyond_top_k_are_drawn_as_often_as_those_inside() -> None:
    logits = mx.where(mx.arange(6000) % 100 == 7, 1.0, 0.0)
    params = SamplingParams(top_k=3, top_p=0.5, seed=0)
    expected = distribution(np.array(logits), params)
    assert (expected > 0).sum() == 30
    assert_drawn_from(expected, draws(logits, params, 600))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    levels=st.sampled_from([2, 20, 10**6]),
    top_k=st.sampled_from([0, 1, 7, 20]),
    top_p=st.sampled_from([0.3, 0.95, 1.0]),
)
def test_no_draw_leaves_the_distribution(seed: int, levels: int, top_k: int, top_p: float) -> None:
    logits = mx.random.randint(0, levels, (5000,), key=mx.random.key(seed)) * (10.0 / levels)
    params = SamplingParams(top_k=top_k, top_p=top_p, seed=seed)
    kept = distribution(np.array(logits), params) > 0
    assert kept[draws(logits, params, 10)].all()


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = mx.zeros(10_000)
    assert draws(logits, SamplingParams(seed=2**64 - 1), 20) == draws(logits, SamplingParams(seed=2**64 - 1), 20)
    assert draws(logits, SamplingParams(seed=0), 20) != draws(logits, SamplingParams(seed=1), 20)
    assert draws(logits, SamplingParams(), 20) != draws(logits, SamplingParams(), 20)


def test_draws_penalise_what_was_drawn() -> None:
    params = SamplingParams(presence_penalty=2.0, temperature=0.01, seed=0)
    assert sorted(draws(mx.zeros(50), params, 50)) == list(range(50))
    favourite = mx.where(mx.arange(4) == 2, 1.0, 0.0)
    greedy = dataclasses.replace(GREEDY, frequency_penalty=0.4)
    # 1.0, 0.6, 0.2 stay ahead of 0; at -0.2 the lowest unused id is next.
    assert draws(favourite, greedy, 4) == [2, 2, 2, 0]


def test_the_sampler_sees_the_prompt_in_the_repetition_penalty_only() -> None:
    logits = mx.array([[1.0, 0.9]])
    assert Sampler([dataclasses.replace(GREEDY, repetition_penalty=2.0)], [[0]], 2)(logits).item() == 1
    assert Sampler([dataclasses.replace(GREEDY, presence_penalty=2.0)], [[0]], 2)(logits).item() == 0


def test_long_replies_are_penalised_as_in_float64() -> None:
    params = SamplingParams(0.0, presence_penalty=0.7, frequency_penalty=0.13, repetition_penalty=1.3)
    logits = mx.random.normal((12,), key=mx.random.key(4))
    sampler = Sampler([params], [[3]], 12)
    reply: list[int] = []
    for _ in range(60):
        scores = penalised(np.array(logits).astype(np.float64), params, [3], reply)
        reply += ids(sampler(logits[None]))
        assert reply[-1] == scores.argmax()
    assert len(set(reply)) > 6


ROWS = [
    dataclasses.replace(THINKING, seed=1, presence_penalty=1.5),
    SamplingParams(seed=1),
    dataclasses.replace(NON_THINKING, seed=2, repetition_penalty=1.2),
    GREEDY,
    SamplingParams(top_p=0.9, seed=3),
]


def test_a_row_draws_what_it_would_alone_even_as_others_leave() -> None:
    rows = [*ROWS, *(dataclasses.replace(row, seed=8) for row in ROWS), dataclasses.replace(ROWS[2], seed=9)]
    prompts = [[1], [2], [3, 4], [5], [], [6, 6], [], [], [7], [8], [9, 10, 11]]
    steps = [mx.random.normal((11, 701), key=mx.random.key(step)) * 3 for step in range(6)]
    batch = Sampler(rows, prompts, 701)
    together = [ids(batch(logits)) for logits in steps[:3]]
    staying = [10, 4, 0, 2, 6]
    batch.keep_rows(staying)
    smaller = [ids(batch(logits[mx.array(staying)])) for logits in steps[3:]]
    for place, row in enumerate(staying):
        alone = Sampler([rows[row]], [prompts[row]], 701)
        expected = [step[row] for step in together] + [step[place] for step in smaller]
        assert [alone(logits[row][None]).item() for logits in steps] == expected


@pytest.mark.parametrize("params", ROWS)
def test_a_draw_is_lazy_and_only_greedy_needs_no_softmax(params: SamplingParams, tmp_path: Path) -> None:
    mx.compile(Sampler([params], [[1]], 700))(mx.zeros((1, 700)))  # tracing refuses whatever evaluates
    graph = tmp_path / "graph.dot"
    mx.export_to_dot(str(graph), Sampler([params], [[1]], 700)(mx.zeros((1, 700))))
    assert ('"Exp"' in graph.read_text()) == (not params.greedy)


def test_rows_without_penalties_hold_nothing() -> None:
    logits = mx.zeros((2, QWEN_VOCAB))
    mx.eval(logits)
    before = mx.get_active_memory()
    sampler = Sampler([THINKING, SamplingParams()], [[1], [2]], QWEN_VOCAB)
    mx.eval(sampler(logits))
    assert mx.get_active_memory() - before < 10_000


@pytest.mark.parametrize("params", ROWS)
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("place", [0, 150, 299])
def test_logits_without_a_distribution_stop_with_an_error(params: SamplingParams, bad: list[float], place: int) -> None:
    rest = 0.0 if bad[1] > -math.inf else -math.inf
    logits = mx.full((300,), rest)
    logits[place : place + 2] = mx.array(bad[: 300 - place])
    if place == 299 and bad[0] == 1.0:
        logits[place] = math.inf
    sampler = Sampler([params, SamplingParams()], [[], []], 300)
    tokens = ids(sampler(mx.stack([logits, mx.zeros(300)])))
    with pytest.raises(GenerationError, match=r"^logits: found NaN"):
        check_token(tokens[0])
    with pytest.raises(GenerationError, match=r"^logits of row 3: found NaN"):
        check_token(tokens[0], 3)
    assert check_token(tokens[1], 3) == tokens[1]
    with pytest.raises(GenerationError, match=r"^logits: found NaN"):
        token_logprobs(logits, params, [], [])
    with pytest.raises(GenerationError, match=r"^logits of row 1: found NaN"):
        token_logprobs(mx.stack([mx.zeros(300), logits]), params, [[], []], [[], []])


def test_minus_infinity_is_never_drawn() -> None:
    logits = mx.full((1000,), -math.inf)
    logits[417] = -5.0
    assert Counter(draws(logits, SamplingParams(seed=0), 20)) == {417: 20}
    assert Counter(draws(logits, SamplingParams(top_k=20, seed=0), 20)) == {417: 20}


@settings(max_examples=30, deadline=None)
@given(
    vocab_size=st.integers(2, 12),
    params=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.just(0.0),
            presence_penalty=st.sampled_from([0.0, 2.0]),
            frequency_penalty=st.sampled_from([0.0, 1.0]),
            repetition_penalty=st.sampled_from([1.0, 3.0]),
        ),
        min_size=1,
        max_size=3,
    ),
    data=st.data(),
)
def test_penalties_know_nothing_of_a_draw_that_was_replaced(
    vocab_size: int, params: list[SamplingParams], data: st.DataObject
) -> None:
    tokens = st.integers(0, vocab_size - 1)
    prompts = [data.draw(st.lists(tokens, max_size=3)) for _ in params]
    replies: list[list[int]] = [[] for _ in params]
    sampler = Sampler(params, prompts, vocab_size)
    keys = mx.random.split(mx.random.key(data.draw(st.integers(0, 99))), 12)
    for key in keys:
        logits = mx.random.normal((len(params), vocab_size), key=key)
        drawn = sampler(logits)
        expected = [
            cast(int, mx.argmax(token_logprobs(logits[row], one, prompts[row], replies[row])).item())
            for row, one in enumerate(params)
        ]
        assert ids(drawn) == expected
        chosen = [data.draw(st.one_of(st.just(token), tokens)) for token in expected]
        if chosen != expected:
            sampler.replace(drawn, mx.array(chosen, dtype=mx.int32))
        for reply, token in zip(replies, chosen, strict=True):
            reply.append(token)
        if len(params) > 1 and data.draw(st.booleans()):
            kept = data.draw(st.permutations(range(len(params))))[: data.draw(st.integers(1, len(params)))]
            sampler.keep_rows(kept)
            params, prompts = [params[row] for row in kept], [prompts[row] for row in kept]
            replies = [replies[row] for row in kept]


def test_random_streams_go_on_behind_a_draw_that_was_replaced() -> None:
    params = [SamplingParams(seed=seed, top_k=top_k) for seed, top_k in ((1, 0), (2, 40), (3, 0))]
    logits = mx.zeros((3, 1000))
    plain, replaced = Sampler(params, [[]] * 3, 1000), Sampler(params, [[]] * 3, 1000)
    for step in range(4):
        expected, drawn = plain(logits), replaced(logits)
        assert ids(drawn) == ids(expected)
        replaced.replace(drawn, mx.array([step, 7, 999], dtype=mx.int32))
