"""Log-probabilities of the tokens of a reply: those of the raw logits, whatever bends the draw."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen import Engine, SamplingParams, make_cache, stream_generate
from mlxqwen.engine.engine import Done
from mlxqwen.engine.request import CacheKind, Request
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.sampler import token_logprobs
from mlxqwen.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
BENT: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "presence_penalty": 1.5, "logit_bias": {40: 3.0}}


@pytest.fixture(scope="module")
def engine(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Engine:
    return Engine(*demo)


def last(engine: Engine, **options: Any) -> Done:
    done = [event for event in engine.stream(QUESTION, **options) if isinstance(event, Done)]
    return done[0]


def raw(engine: Engine, prompt: list[int], tokens: tuple[int, ...]) -> np.ndarray:
    """Log-softmax of the logits that each token was drawn from, by one pass without a cache."""
    logits = engine.model(mx.array([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :]
    empty: list[list[int]] = [[] for _ in tokens]
    return np.array(token_logprobs(logits, SamplingParams(), empty, empty))


@pytest.mark.parametrize("options", [{}, {"thinking_budget": 3}], ids=str)
def test_they_are_the_models_own(engine: Engine, options: dict[str, Any]) -> None:
    done = last(engine, seed=1, sampling=BENT, max_tokens=40, logprobs=5, **options)
    expected = raw(engine, engine.prompt(QUESTION), done.tokens)
    assert len(done.logprobs) == len(done.tokens)
    for place, told in enumerate(done.logprobs):
        assert told.token == done.tokens[place]  # also where a budget put it in the place of another
        assert told.logprob == pytest.approx(expected[place, told.token], abs=2e-5)
        order = np.argsort(-expected[place], kind="stable")[:5]
        assert [value for _, value in told.likeliest] == pytest.approx(list(expected[place, order]), abs=2e-5)
    assert math.fsum(math.exp(value) for _, value in done.logprobs[0].likeliest) <= 1 + 1e-6


def test_asking_changes_no_token_and_not_asking_tells_nothing(engine: Engine) -> None:
    plain = last(engine, seed=1, max_tokens=20)
    assert plain.logprobs == ()
    told = last(engine, seed=1, max_tokens=20, logprobs=0)
    assert told.tokens == plain.tokens
    assert all(one.likeliest == () for one in told.logprobs)


def test_rows_of_a_batch_are_told_each_their_own(engine: Engine) -> None:
    options: dict[str, Any] = {"seed": 1, "max_tokens": 12}
    alone = last(engine, logprobs=2, **options)
    streams = [engine.stream(QUESTION, logprobs=asked, **options) for asked in (None, 2, None)]
    first = [next(stream) for stream in streams]
    done = [next(event for event in stream if isinstance(event, Done)) for stream in streams]
    assert len(first) == 3
    assert done[0].logprobs == done[2].logprobs == ()
    for one, other in zip(done[1].logprobs, alone.logprobs, strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_guesses_are_not_made_beside_them(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine = Engine(*demo, speculative="lookup")
    done = last(engine, seed=1, max_tokens=30, logprobs=1)
    assert done.usage.drafted_tokens == 0
    assert len(done.logprobs) == len(done.tokens)


def test_streams_of_text_have_them(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    for response in stream_generate(*demo, "strawberry", max_tokens=3, logprobs=1):
        assert response.logprobs is not None
        assert response.logprobs.token == response.token


@pytest.mark.parametrize("value", [-1, 21, True, "1"])
def test_values_out_of_range(engine: Engine, value: Any) -> None:
    with pytest.raises(OptionError, match="logprobs"):
        engine.stream(QUESTION, logprobs=value)


def one_by_one(model: Qwen3ForCausalLM, kind: CacheKind, prompt: tuple[int, ...]) -> np.ndarray:
    """Log-softmax behind each token of a prompt, read one by one."""
    cache = kind.make(model)
    rows = [model(mx.array([[token]]), cache)[0, -1] for token in prompt]
    return np.array([row - mx.logsumexp(row) for row in rows])


@pytest.mark.parametrize("cache", [CacheKind(), CacheKind(max_kv_size=24)], ids=["linear", "ring"])
def test_those_of_a_prompt_are_the_models_own(tiny: Qwen3ForCausalLM, cache: CacheKind) -> None:
    """Read in chunks, also where the prompt is known, beside others, and without a change of the reply."""
    scheduler = Scheduler(tiny)
    prompt = tuple(range(3, 43))
    plain = Request(prompt, SamplingParams(seed=1), max_tokens=6, cache=cache, prefill_chunk=7)
    asking = replace(plain, prompt_logprobs=3)
    first = scheduler.submit(plain).result()
    handles = [scheduler.submit(request) for request in (asking, plain, asking)]
    assert handles[0].prompt_logprobs is None
    assert [handle.result().tokens for handle in handles] == [first.tokens] * 3
    assert handles[1].prompt_logprobs is None
    expected = one_by_one(tiny, cache, prompt)
    for handle in (handles[0], handles[2]):
        told = handle.prompt_logprobs
        assert told is not None
        assert handle.cached_tokens == 0
        assert [one.token for one in told] == list(prompt[1:])
        for place, one in enumerate(told):
            assert one.logprob == pytest.approx(expected[place, one.token], abs=2e-5)
            best = sorted(expected[place], reverse=True)[:3]
            assert [value for _, value in one.likeliest] == pytest.approx(best, abs=2e-5)


def test_what_a_callers_cache_holds_is_not_told(tiny: Qwen3ForCausalLM) -> None:
    with pytest.raises(OptionError, match="prompt_logprobs: found beside a cache"):
        Request((1, 2), cache=make_cache(tiny), prompt_logprobs=1)
    assert Scheduler(tiny).submit(Request((1,), max_tokens=1, prompt_logprobs=1)).prompt_logprobs == ()
