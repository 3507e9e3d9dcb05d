"""Conversations in, events out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen import Engine, make_cache, parse_reply, stream_generate
from mlxqwen.chat.reply import Delta
from mlxqwen.chat.turns import soft_switch
from mlxqwen.engine.engine import Done, Event
from mlxqwen.errors import (
    ContextLengthError,
    MessagesError,
    MlxqwenError,
    OptionError,
    TemplateError,
    TokenizerError,
)
from mlxqwen.files.hub import resolve_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import NON_THINKING, THINKING, SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model

QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Works out an expression.",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def engine(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Engine:
    return Engine(*demo)


def finished(events: list[Event]) -> tuple[list[Delta], Done]:
    *deltas, done = events
    assert isinstance(done, Done)
    assert all(isinstance(delta, Delta) for delta in deltas)
    return [delta for delta in deltas if isinstance(delta, Delta)], done


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("max_tokens", [3, 100])
def test_events_are_the_reply(engine: Engine, thinking: bool | None, max_tokens: int) -> None:
    options: dict[str, Any] = {"thinking": thinking, "seed": 1, "max_tokens": max_tokens}
    deltas, done = finished(list(engine.stream(QUESTION, **options)))
    assert "".join(delta.reasoning or "" for delta in deltas) == (done.reply.reasoning or "")
    assert "".join(delta.content or "" for delta in deltas) == done.reply.content
    assert engine.chat(QUESTION, **options) == done.reply

    prompt = engine.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, enable_thinking=thinking)
    assert engine.prompt(QUESTION, thinking=thinking) == prompt
    responses = list(
        stream_generate(engine.model, engine.tokenizer, prompt, max_tokens=max_tokens, sampling={"seed": 1})
    )
    text = "".join(response.text for response in responses)
    assert done.reply == parse_reply(text, thinking=thinking is not False)
    assert done.finish_reason == responses[-1].finish_reason

    tokens = [response.token for response in responses]
    opening, close = (engine.tokenizer.token_to_id(tag) for tag in ("<think>", "</think>"))
    end = tokens.index(close) if close in tokens else len(tokens)
    reasoning = end - tokens.index(opening) - 1 if opening in tokens else 0
    assert done.usage.prompt_tokens == len(prompt)
    assert done.usage.completion_tokens == len(tokens)
    assert done.usage.reasoning_tokens == (reasoning if done.reply.reasoning else 0)
    timings = done.timings
    assert timings.prefill_seconds > 0
    assert timings.prefill_tokens_per_second > 0
    assert timings.decode_seconds >= 0
    assert timings.decode_tokens_per_second >= 0


def test_finish_reasons(engine: Engine) -> None:
    end, letter = engine.tokenizer.eos_token_id, engine.tokenizer.encode("x")[0]
    assert end is not None
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("stop", end, {}),
        ("length", letter, {"max_tokens": 2}),
        ("stop", letter, {"stop": "xx"}),
    ]
    for reason, token, options in cases:
        sampling = SamplingParams(logit_bias={token: 100.0}, top_k=1)
        _, done = finished(list(engine.stream(QUESTION, thinking=False, sampling=sampling, **options)))
        assert done.finish_reason == reason
    deltas, done = finished(list(engine.stream(QUESTION, sampling=SamplingParams(logit_bias={end: 100.0}, top_k=1))))
    assert deltas == []
    assert (done.reply.reasoning, done.reply.content, done.usage.completion_tokens) == (None, "", 1)


def test_without_a_limit_the_context_is_the_end(tokenizer: Tokenizer) -> None:
    model = random_model(vocab_size=tokenizer.vocab_size, context=96)
    letter = tokenizer.encode("x")[0]
    sampling = SamplingParams(logit_bias={letter: 100.0}, top_k=1)
    _, done = finished(list(Engine(model, tokenizer).stream(QUESTION, sampling=sampling)))
    assert done.finish_reason == "length"
    assert done.usage.prompt_tokens + done.usage.completion_tokens == 96
    assert done.reply.content == "x" * done.usage.completion_tokens
    assert done.usage.reasoning_tokens == 0


def test_the_profile_follows_the_switches(engine: Engine) -> None:
    soft_off = [{"role": "user", "content": "Hello /no_think"}]
    for messages, thinking, expected in (
        (QUESTION, None, THINKING),
        (QUESTION, True, THINKING),
        (QUESTION, False, NON_THINKING),
        (soft_off, None, NON_THINKING),
        (soft_off, True, NON_THINKING),
        (soft_off, False, NON_THINKING),
        ([*soft_off, {"role": "user", "content": "Really? /think"}], None, THINKING),
        ([{"role": "user", "content": "Hello /think"}], False, NON_THINKING),
    ):
        assert engine.sampling_for(messages, thinking=thinking) == expected
    assert engine.sampling_for(QUESTION, sampling={"temperature": 0.2}).temperature == 0.2
    explicit = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0)
    seeded, spelled = (engine.chat(soft_off, sampling=one, seed=3, max_tokens=20) for one in (None, explicit))
    assert seeded == spelled


def test_a_template_that_never_lets_think(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    source = resolve_model(None)
    tokenizer = Tokenizer.from_folder(source)
    tokenizer.chat_templates["default"] = "{{ messages[0].content }}<think>\n\n</think>\n\n"
    letter = tokenizer.encode("x")[0]
    reply = Engine(demo[0], tokenizer).chat(
        QUESTION, max_tokens=3, sampling=SamplingParams(logit_bias={letter: 100.0}, top_k=1)
    )
    assert (reply.reasoning, reply.content) == (None, "xxx")


@pytest.mark.parametrize("thinking", [None, True, False])
def test_a_template_that_always_opens_a_think_block(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], thinking: bool | None
) -> None:
    model, tokenizer = demo[0], Tokenizer.from_folder(resolve_model(None))
    opening = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    tokenizer.chat_templates["default"] = opening
    engine = Engine(model, tokenizer)
    assert engine.sampling_for(QUESTION, thinking=thinking) == THINKING
    reply = engine.chat(QUESTION, thinking=thinking, sampling=SamplingParams(temperature=0), max_tokens=100)
    raw = tokenizer.decode(
        [r.token for r in stream_generate(model, tokenizer, engine.prompt(QUESTION), sampling={"temperature": 0})][:-1]
    )
    assert "</think>" in raw
    assert reply == parse_reply(raw, thinking=True)
    assert "think>" not in reply.content


def test_a_template_that_knows_no_think_block(tokenizer: Tokenizer) -> None:
    model = random_model(vocab_size=tokenizer.vocab_size, context=96)
    other = Tokenizer.from_folder(resolve_model(None))
    other.chat_templates["default"] = "{{ messages[0].content }}"
    engine = Engine(model, other)
    letter = tokenizer.encode("x")[0]
    sampling = SamplingParams(logit_bias={letter: 100.0}, top_k=1)
    assert engine.chat(QUESTION, sampling=sampling, max_tokens=5).content == "xxxxx"
    assert engine.sampling_for(QUESTION) == NON_THINKING


def test_stop_strings_end_the_content_and_not_the_reasoning(engine: Engine) -> None:
    greedy = SamplingParams(temperature=0)
    whole = engine.chat(QUESTION, sampling=greedy)
    assert whole.reasoning is not None
    assert " " in whole.reasoning
    first_word = whole.content.split(" ")[0]
    _, done = finished(list(engine.stream(QUESTION, sampling=greedy, stop=" ")))
    assert (done.reply.reasoning, done.reply.content) == (whole.reasoning, first_word)
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("thinking", [0, 1, "false", "no"])
def test_the_switch_is_a_switch(engine: Engine, thinking: Any) -> None:
    with pytest.raises(OptionError, match="thinking: found"):
        engine.chat(QUESTION, thinking=thinking)


def test_a_seed_gives_the_same_reply(engine: Engine) -> None:
    hot = {"temperature": 3.0, "top_k": 0, "top_p": 1.0}
    replies = [engine.chat(QUESTION, seed=seed, sampling=hot, max_tokens=20) for seed in (7, 7, 8)]
    assert replies[0] == replies[1] != replies[2]
    assert engine.chat(QUESTION, seed=7, sampling={**hot, "seed": 9}, max_tokens=20) == replies[0]
    assert engine.chat(QUESTION, sampling={**hot, "seed": 7}, max_tokens=20) == replies[0]


def test_tools_reach_the_template(engine: Engine) -> None:
    prompt = engine.prompt(QUESTION, tools=TOOLS)
    assert prompt == engine.tokenizer.apply_chat_template(QUESTION, tools=TOOLS, add_generation_prompt=True)
    assert "Works out an expression." in engine.tokenizer.decode(prompt)
    _, done = finished(list(engine.stream(QUESTION, tools=TOOLS, max_tokens=1)))
    assert done.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ([], {}, MessagesError),
        (["Hello"], {}, MessagesError),
        ([{"role": "user"}], {}, MessagesError),
        ([{"role": "user", "content": "\ud800"}], {}, MessagesError),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, MessagesError),
        (QUESTION, {"tools": "calculator"}, MessagesError),
        (QUESTION, {"seed": -1}, OptionError),
        (QUESTION, {"seed": 1.5}, OptionError),
        (QUESTION, {"max_tokens": 0}, OptionError),
        (QUESTION, {"stop": ""}, OptionError),
        (QUESTION, {"prefill_chunk": 0}, OptionError),
        (QUESTION, {"sampling": {"top_p": 0}}, OptionError),
        (QUESTION, {"sampling": {"heat": 1}}, OptionError),
        ([{"role": "user", "content": "word " * 2000}], {}, ContextLengthError),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_failed_call_leaves_nothing_half_done(
    engine: Engine, messages: Any, options: dict[str, Any], error: type[MlxqwenError]
) -> None:
    cache = make_cache(engine.model)
    with pytest.raises(error):
        engine.chat(messages, cache=cache, **options)
    assert (cache.offset, cache.nbytes) == (0, 0)


def test_no_chat_template(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    tokenizer = Tokenizer.from_folder(resolve_model(None))
    tokenizer.chat_templates.clear()
    with pytest.raises(TemplateError):
        Engine(demo[0], tokenizer).chat(QUESTION)


def test_after_an_abandoned_stream(engine: Engine) -> None:
    expected = engine.chat(QUESTION, seed=5, max_tokens=30)
    for ending in (None, KeyboardInterrupt, ValueError):
        events: Any = engine.stream(QUESTION, seed=6)
        list(islice(events, 2))
        if ending is None:
            events.close()
        else:
            with pytest.raises(ending):
                events.throw(ending)
        assert next(events, None) is None
        assert engine.chat(QUESTION, seed=5, max_tokens=30) == expected


def test_after_an_interrupt_during_prefill(engine: Engine) -> None:
    expected = engine.chat(QUESTION, seed=5, max_tokens=30)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.chat(QUESTION, prefill_chunk=4, on_prefill=interrupt)
    assert engine.chat(QUESTION, seed=5, max_tokens=30) == expected


def test_streams_side_by_side(engine: Engine) -> None:
    def stream(seed: int) -> Iterator[Event]:
        return engine.stream(QUESTION, seed=seed, max_tokens=12)

    alone = [finished(list(stream(seed)))[0] for seed in (1, 2)]
    one, two = stream(1), stream(2)
    mixed: list[list[Event]] = [[], []]
    for _ in range(40):
        mixed[0] += islice(one, 1)
        mixed[1] += islice(two, 2)
    assert [finished(events)[0] for events in mixed] == alone


def test_loading(tmp_path: Any) -> None:
    engine = Engine.load(yarn_factor=2.0, dtype="float32")
    assert engine.model.config.context_length == 2 * Engine.load().model.config.context_length
    with pytest.raises(MlxqwenError, match="no weight files"):
        Engine.load(tmp_path)
    for file in resolve_model(None).iterdir():
        if file.is_file() and not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Engine.load(tmp_path)


SWITCHES = {"/think": True, "/no_think": False}
NO_SWITCHES = ["think", "no_think", "/thinking", "/no_thinking", "/no-think", "/Think", "//think", "_/think"]
PATHS = ["a/think", "x/no_think", "/think/x"]
WORDS = st.lists(st.sampled_from([*SWITCHES, *NO_SWITCHES, *PATHS, "word", "?", "说"]), max_size=6)
MESSAGES = st.lists(st.tuples(st.sampled_from(["user", "system", "assistant", "tool"]), WORDS), min_size=1, max_size=5)


@settings(deadline=None)
@given(MESSAGES, st.sampled_from([" ", "\n", "\t "]))
def test_the_last_switch_of_the_latest_turn_wins(turns: list[tuple[str, list[str]]], space: str) -> None:
    messages: list[Mapping[str, Any]] = [{"role": role, "content": space.join(words)} for role, words in turns]
    switches = [
        SWITCHES[word] for role, words in turns if role in ("user", "system") for word in words if word in SWITCHES
    ]
    assert soft_switch(messages) == (switches[-1] if switches else None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/think", True),
        ("Hello./no_think", False),
        ("Hello /no_think.", False),
        ("(/think)", True),
        ("你好/no_think", False),
        ("/think吗", True),
        ('"/think"!', True),
        ("/think /no_think", False),
        ("/no_think, no: /think", True),
        ("https://example.org/think", None),
        ("~/think/notes", None),
    ],
)
def test_switches_beside_punctuation(text: str, expected: bool | None) -> None:
    assert soft_switch([{"role": "user", "content": text}]) is expected
    parts = [{"type": "text", "text": text[: len(text) // 2]}, {"type": "text", "text": text[len(text) // 2 :]}]
    assert soft_switch([{"role": "system", "content": parts}]) is expected
