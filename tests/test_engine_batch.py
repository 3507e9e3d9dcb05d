"""Many conversations at once: each answered as alone, never more at once than asked for, errors by number."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mlxqwen import ChatRequest, Engine, make_cache
from mlxqwen.engine.engine import Done
from mlxqwen.errors import ContextLengthError, MessagesError, MlxqwenError, OptionError
from mlxqwen.files.config import GenerationConfig
from mlxqwen.sampling.params import SamplingParams
from tests.conftest import random_model
from tests.test_engine import TOOLS

WORDS = ("strawberry", "blueberry", "letter", "banana", "tree")
QUESTIONS = [[{"role": "user", "content": f"How many e's in {word}?"}] for word in WORDS]


@pytest.fixture(scope="module")
def engine(demo: Any) -> Engine:
    return Engine(*demo)


def facts(done: Done) -> tuple[Any, ...]:
    calls = [(call.name, call.arguments) for call in done.reply.tool_calls]
    usage = replace(done.usage, cached_tokens=0)  # depends on what was asked before
    return done.reply.reasoning, done.reply.content, calls, done.finish_reason, usage


def alone(engine: Engine, messages: Any, **options: Any) -> Done:
    *_, done = engine.stream(messages, **options)
    assert isinstance(done, Done)
    return done


@pytest.mark.parametrize("thinking", [None, False])
def test_each_is_answered_as_alone(engine: Engine, thinking: bool | None) -> None:
    options: dict[str, Any] = {"thinking": thinking, "seed": 7, "max_tokens": 40}
    before = copy.deepcopy(QUESTIONS)
    expected = [facts(alone(engine, question, **options)) for question in QUESTIONS]
    for batch_size in (1, 2, 8):
        found = dict(engine.batch(QUESTIONS, batch_size=batch_size, **options))
        assert [facts(found[index]) for index in range(len(QUESTIONS))] == expected, batch_size
        assert len(found) == len(QUESTIONS)
    assert before == QUESTIONS


def test_options_of_their_own(engine: Engine) -> None:
    own: list[dict[str, Any]] = [
        {"seed": 1},
        {"thinking": False, "max_tokens": 3},
        {"thinking_budget": 5},
        {"tools": TOOLS, "sampling": {"temperature": 0}},
        {"sampling": {"temperature": 2.0}, "seed": 3},
    ]
    shared: dict[str, Any] = {"seed": 9, "max_tokens": 40}
    requests = [ChatRequest(messages, options) for messages, options in zip(QUESTIONS, own, strict=True)]
    expected = [
        facts(alone(engine, messages, **{**shared, **options}))
        for messages, options in zip(QUESTIONS, own, strict=True)
    ]
    for batch_size in (2, 8):
        found = dict(engine.batch(requests, batch_size=batch_size, **shared))
        assert [facts(found[index]) for index in range(len(own))] == expected, batch_size


def test_rows_come_as_they_end_and_the_next_takes_the_place(engine: Engine) -> None:
    letter = engine.tokenizer.encode("x")[0]
    sampling = SamplingParams(logit_bias={letter: 100.0}, top_k=1)
    limits = [24, 3, 14, 2, 1]  # none ends within a few steps of another
    taken: list[int] = []

    def requests() -> Iterator[ChatRequest]:
        for index, limit in enumerate(limits):
            taken.append(index)
            yield ChatRequest(QUESTIONS[index], {"max_tokens": limit})

    seen = []
    for index, done in engine.batch(requests(), batch_size=3, sampling=sampling, thinking=False):
        seen.append((index, done.usage.completion_tokens, len(taken)))
    assert seen == [(1, 3, 3), (3, 2, 4), (4, 1, 5), (2, 14, 5), (0, 24, 5)]


def test_a_row_that_stops_in_its_content_is_not_computed_on(engine: Engine) -> None:
    letter = engine.tokenizer.encode("x")[0]
    options: dict[str, Any] = {"sampling": SamplingParams(logit_bias={letter: 100.0}, top_k=1), "thinking": False}
    found = list(engine.batch(QUESTIONS[:3], stop="xxxx", max_tokens=400, **options))
    assert [(index, done.finish_reason, done.usage.completion_tokens) for index, done in found] == [
        (index, "stop", 4) for index in range(3)
    ]
    assert facts(found[0][1]) == facts(alone(engine, QUESTIONS[0], stop="xxxx", max_tokens=400, **options))


BAD = [QUESTIONS[0], [{"role": "user", "content": "word " * 2000}], [{"role": "x"}], QUESTIONS[1]]


def test_errors_name_the_conversation(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match=r"conversations\[1\]: prompt: ") as caught:
        list(engine.batch(BAD, max_tokens=1))
    assert "--max-kv-size" in caught.value.hint
    with pytest.raises(MessagesError, match=r"conversations\[0\]: messages: found an object"):
        list(engine.batch(QUESTIONS[0], max_tokens=1))  # type: ignore[arg-type]
    with pytest.raises(MessagesError, match="conversations: found null, expected a list"):
        engine.batch(None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"conversations\[0\]: option of one conversation: found 'cache'"):
        list(engine.batch([ChatRequest(QUESTIONS[0], {"cache": None})]))


def test_a_conversation_may_have_every_option_of_its_own(engine: Engine) -> None:
    shared: dict[str, Any] = {"max_tokens": 24, "seed": 5, "sampling": {"temperature": 1.0}, "thinking": False}
    told: list[tuple[int, int]] = []
    own: list[dict[str, Any]] = [
        {"stop": ["e", "a"]},
        {"kv_bits": 8},
        {"max_kv_size": 40},
        {"prefill_chunk": 3, "on_prefill": lambda done, total: told.append((done, total))},
        {"thinking": None, "thinking_budget": 3, "early_stop_text": "Enough."},
        {"stop_on_loop": True},
    ]
    alone = [engine.chat(QUESTIONS[0], **{**shared, **options}) for options in own]
    told.clear()
    engine.scheduler._prefixes.store.clear()  # so that the prompt is read, and told, again
    together = dict(engine.batch([ChatRequest(QUESTIONS[0], options) for options in own], batch_size=8, **shared))
    assert [together[row].reply for row in range(len(own))] == alone
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]


def test_conversations_that_cannot_be_answered_may_be_left_out(engine: Engine) -> None:
    errors: dict[int, MlxqwenError] = {}
    found = dict(engine.batch(BAD, batch_size=2, max_tokens=1, on_error=errors.__setitem__))
    assert sorted(found) == [0, 3]
    assert {index: type(error) for index, error in errors.items()} == {1: ContextLengthError, 2: MessagesError}
    assert errors[1].problem.startswith("prompt: ")


WRONG_OPTIONS: list[dict[str, Any]] = [
    {"thinking_budget": -1},
    {"thinking_budget": True},
    {"max_tokens": 0},
    {"max_tokens": "9"},
    {"sampling": {"logit_bias": {100_000: 1.0}}},
    {"sampling": {"heat": 1}},
    {"seed": -1},
    {"thinking": "yes"},
]


@pytest.mark.parametrize("wrong", WRONG_OPTIONS, ids=str)
def test_wrong_options_of_one_take_none_of_the_others_with_it(engine: Engine, wrong: dict[str, Any]) -> None:
    requests: list[Any] = [QUESTIONS[0], ChatRequest(QUESTIONS[1], wrong), QUESTIONS[2]]
    errors: dict[int, MlxqwenError] = {}
    assert sorted(dict(engine.batch(requests, max_tokens=1, on_error=errors.__setitem__))) == [0, 2]
    assert {index: type(error) for index, error in errors.items()} == {1: OptionError}
    with pytest.raises(OptionError, match=r"conversations\[1\]: "):
        list(engine.batch(requests, max_tokens=1))


def test_a_budget_for_one_where_no_thought_can_be_ended(demo: Any) -> None:
    model, tokenizer = demo
    plain = copy.copy(tokenizer)
    plain.token_to_id = lambda token: None if token == "</think>" else tokenizer.token_to_id(token)
    errors: dict[int, MlxqwenError] = {}
    requests: list[Any] = [QUESTIONS[0], ChatRequest(QUESTIONS[1], {"thinking_budget": 5})]
    assert sorted(dict(Engine(model, plain).batch(requests, max_tokens=1, on_error=errors.__setitem__))) == [0]
    assert "has no </think>" in errors[1].problem


@pytest.mark.parametrize("cache", [{"max_kv_size": 128}, {"kv_bits": 8}, {"max_kv_size": 64, "keep": 2, "kv_bits": 4}])
def test_options_of_the_caches(engine: Engine, cache: dict[str, Any]) -> None:
    options: dict[str, Any] = {"seed": 7, "max_tokens": 20, **cache}
    conversations = list(QUESTIONS[:2])
    if "max_kv_size" in cache:  # longer than the context, over which the window slides
        conversations.append([{"role": "user", "content": "word " * 520}])
    found = dict(engine.batch(conversations, batch_size=2, **options))
    if "max_kv_size" in cache:
        assert found[2].usage.prompt_tokens > engine.model.config.context_length
    for index, done in found.items():
        assert facts(done) == facts(alone(engine, conversations[index], **options))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"max_kv_size": 2}, "max_kv_size: found 2"),
        ({"kv_bits": 3}, "kv_bits: found 3"),
        ({"keep": -1}, "keep: found -1"),
    ],
)
def test_options_of_caches_that_cannot_be(engine: Engine, wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        engine.batch(QUESTIONS, **wrong)


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True])
def test_a_batch_size_is_a_count(engine: Engine, size: Any) -> None:
    with pytest.raises(OptionError, match="batch_size: found"):
        engine.batch(QUESTIONS, batch_size=size)


def test_what_cannot_be_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(OptionError, match="cache: found one"):
        engine.batch(QUESTIONS, cache=make_cache(engine.model))
    with pytest.raises(OptionError, match="stop: found"):
        engine.batch(QUESTIONS, stop="")


def test_junk_in_generation_config_is_noted_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(GenerationConfig({"temperature": "hot"}), vocab_size=engine.tokenizer.vocab_size)
    with caplog.at_level(logging.WARNING, "mlxqwen"):
        assert len(list(Engine(model, engine.tokenizer).batch(QUESTIONS, batch_size=2, max_tokens=1))) == len(QUESTIONS)
    assert len(caplog.records) == 1
    assert "temperature: found 'hot'" in caplog.text


def test_none_are_none(engine: Engine) -> None:
    assert list(engine.batch([])) == []


def test_abandoned_in_the_middle(engine: Engine) -> None:
    expected = engine.chat(QUESTIONS[0], seed=5, max_tokens=20)
    rows: Any = engine.batch(QUESTIONS, batch_size=2, seed=1, max_tokens=20)
    next(rows)
    rows.close()
    assert next(rows, None) is None
    assert engine.chat(QUESTIONS[0], seed=5, max_tokens=20) == expected
