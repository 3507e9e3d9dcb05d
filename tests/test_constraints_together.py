"""Constraints of several replies at once: only digits beside free rows, with guesses, behind a thinking budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen import Engine
from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.engine.request import CacheKind
from mlxqwen.engine.text_generation import text_request
from mlxqwen.errors import GenerationError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.constraint import pack_mask
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scheduling import Only, alone, asked, constrained, ids, machine, new_scheduler, run, taken

SEEDED = SamplingParams(seed=3, temperature=2.0)
DIGITS = range(10)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=512)


class KnowsTheReply:
    """Guesses what will be said."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)

    def propose(self, text: Sequence[int], count: int, sampler: object) -> list[int]:
        return self._text[len(text) : len(text) + count]


class OnlyDigits:
    """A constraint of text: behind a thought, nothing but digits."""

    def __init__(self, pipeline: ReplyPipeline | None, tokenizer: Tokenizer, vocab_size: int) -> None:
        assert pipeline is not None
        digits = [tokenizer.encode(digit)[0] for digit in "0123456789"]
        self._mask = pack_mask(digits, vocab_size)
        self._pipeline = pipeline
        self._is_open = False

    def mask(self) -> mx.array | None:
        return self._mask if self._is_open else None

    def settle(self, drawn: int) -> int:
        return drawn

    def advance(self, token: int) -> None:
        self._is_open = not self._pipeline.in_reasoning

    def fork(self) -> OnlyDigits:
        raise AssertionError("nothing guesses here")


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", [CacheKind(), CacheKind(kv_bits=8, kv_group_size=32)])
def test_digits_beside_free_rows(model: Qwen3ForCausalLM, kind: CacheKind, is_gpu: bool) -> None:
    requests = [
        asked([n], 20, sampling=SEEDED, cache=kind, constraints=constrained(lambda: Only(DIGITS)) if n % 2 else ())
        for n in range(4)
    ]
    expected = [alone(model, request) for request in requests]
    with machine(model, 1 << 32, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        found = run(scheduler, [scheduler.submit(request) for request in requests])
    assert found == expected
    for place, tokens in enumerate(found):
        assert (set(tokens) <= set(DIGITS)) == bool(place % 2)
        assert len(set(tokens)) > 3


def test_two_constraints_allow_what_both_allow(model: Qwen3ForCausalLM) -> None:
    both = (*constrained(lambda: Only(range(20))), *constrained(lambda: Only(range(0, 97, 3))))
    assert set(alone(model, asked([1], 30, sampling=SEEDED, constraints=both))) <= set(range(0, 20, 3))


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SEEDED])
@pytest.mark.parametrize("kind", [CacheKind(), CacheKind(max_kv_size=12, keep=2)])
def test_digits_with_guesses(model: Qwen3ForCausalLM, kind: CacheKind, params: SamplingParams) -> None:
    """Right ones, and some that the constraint forbids."""
    options: dict[str, Any] = {"sampling": params, "cache": kind, "constraints": constrained(lambda: Only(DIGITS))}
    expected = alone(model, asked([1], 30, **options))
    assert set(expected) <= set(DIGITS)
    forbidden = [token if place % 5 else 50 for place, token in enumerate(expected)]
    for guessed in (expected, forbidden):
        scheduler = new_scheduler(model)
        handle = scheduler.submit(asked([1], 30, drafter=KnowsTheReply([1, *guessed]), **options))
        tokens = []
        while scheduler.step():
            tokens += taken(handle)
        assert ids(tokens) == expected
        assert tokens[-1].accepted_tokens > 0
        if guessed is expected:
            assert tokens[-1].accepted_tokens == tokens[-1].drafted_tokens


@pytest.mark.parametrize("is_gpu", [False, True])
def test_digits_behind_a_budget_of_thought(demo: tuple[Qwen3ForCausalLM, Tokenizer], is_gpu: bool) -> None:
    """The budget ends the thought by tokens of its own; behind it stands nothing but digits."""
    model, tokenizer = demo
    question = Engine(model, tokenizer).prompt([{"role": "user", "content": "How many r's in strawberry?"}])
    prompt = [*question, *tokenizer.encode("<think>\n")]

    def digits(pipeline: ReplyPipeline | None) -> OnlyDigits:
        return OnlyDigits(pipeline, tokenizer, model.config.vocab_size)

    common: dict[str, Any] = {"max_tokens": 120, "sampling": {"seed": 1}}
    free = text_request(model, tokenizer, prompt, **common)
    bound = text_request(model, tokenizer, prompt, thinking_budget=6, constraints=(digits,), **common)
    lone = alone(model, bound)
    with machine(model, 1 << 32, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(request) for request in (free, bound)]
        while scheduler.step():
            pass
        ends = [handle.poll_done() for handle in handles]
    assert ends[0] is not None
    assert ends[1] is not None
    assert list(ends[0].tokens) == alone(model, free)
    assert list(ends[1].tokens) == lone
    assert ends[1].usage.budget_exhausted
    content = ends[1].reply.content.strip()
    assert content.isdigit()
    assert len(content) > 3


def test_a_constraint_that_allows_nothing_is_named(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    free = scheduler.submit(asked([1], 4))
    stuck = scheduler.submit(asked([2], 4, constraints=constrained(lambda: Only([]))))
    found = run(scheduler, [free, stuck])
    assert found == [alone(model, free.request), []]
    with pytest.raises(GenerationError, match=r"^constraint: found no token that it allows"):
        stuck.next_token()
