"""A reply's text as events: pieces, ends, warnings, and the message that it becomes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.chat.reply import Delta, Reply, ToolCall, join_deltas, parse_reply
from mlxqwen.engine.completion import GenerationResponse
from mlxqwen.engine.events import Done, Event, ReplyEvents, assistant_message, split_reply
from mlxqwen.engine.generation import FinishReason
from mlxqwen.errors import OptionError
from tests.test_tokenizer import QWEN

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "one stop two"}}\n</tool_call>'
WHOLE = f"<think>\nI stop to think.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
BROKEN = "<tool_call>\n{nothing}\n</tool_call>"


def responses_of(pieces: Sequence[str], finish_reason: FinishReason = "stop") -> list[GenerationResponse]:
    """One response a piece, as `stream_generate` tells them; `token` counts up."""
    last = len(pieces) - 1
    return [
        GenerationResponse(text, i, 5, 1.0, i + 1, 1.0, 0.0, finish_reason if i == last else None, i // 2, i == last, 2)
        for i, text in enumerate(pieces)
    ]


def events_of(text: str, finish_reason: FinishReason = "stop", **options: Any) -> list[Event]:
    return list(split_reply(iter(responses_of(list(text), finish_reason)), **{"thinking": None, **options}))


def done_of(events: Sequence[Event]) -> Done:
    assert isinstance(events[-1], Done)
    assert not any(isinstance(event, Done) for event in events[:-1])
    return events[-1]


def without_ids(reply: Reply) -> Reply:
    calls = (ToolCall("", call.name, call.arguments) for call in reply.tool_calls)
    return Reply(reply.reasoning, reply.content, tuple(calls))


@given(st.lists(st.integers(0, len(WHOLE)), max_size=8), st.booleans())
def test_any_cut_gives_the_whole_reply(cuts: list[int], tools: bool) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    pieces = [WHOLE[start:end] for start, end in pairwise(edges)]
    events = list(split_reply(iter(responses_of(pieces)), thinking=None, tools=tools))
    done = done_of(events)
    assert without_ids(done.reply) == without_ids(parse_reply(WHOLE, thinking=None, tools=tools))
    assert join_deltas(event for event in events if isinstance(event, Delta)) == done.reply
    assert done.finish_reason == ("tool_calls" if tools else "stop")


@pytest.mark.parametrize(
    ("text", "ended_by", "options", "expected"),
    [
        ("Hello", "stop", {}, "stop"),
        ("Hello", "length", {}, "length"),
        ("Hello", "loop", {}, "loop"),
        (CALL, "stop", {"tools": True}, "tool_calls"),
        (CALL, "length", {"tools": True}, "length"),
        (CALL, "loop", {"tools": True}, "loop"),
        (f"{CALL} and stop here", "stop", {"tools": True, "stop": "stop"}, "stop"),
        (CALL, "stop", {}, "stop"),
        (BROKEN, "stop", {"tools": True}, "stop"),
    ],
)
def test_finish_reasons(text: str, ended_by: FinishReason, options: dict[str, Any], expected: str) -> None:
    assert done_of(events_of(text, ended_by, **options)).finish_reason == expected


def test_stop_strings_are_of_the_content_alone() -> None:
    reply = done_of(events_of(WHOLE + "\nThen stop it.", tools=True, stop=["stop"])).reply
    assert reply.reasoning == "I stop to think."
    assert reply.content == "Let me see.\nThen "
    assert [call.arguments for call in reply.tool_calls] == ['{"a": "one stop two"}'] * 2


def test_nothing_follows_the_end() -> None:
    events = ReplyEvents(thinking=False, stop="b")
    responses = responses_of(["a", "b", "c"])
    assert [*events.feed(responses[0])] == [Delta(content="a")]
    assert [*events.feed(responses[1])] == [events.done]
    assert events.done is not None
    assert (events.done.reply.content, events.done.usage.completion_tokens) == ("a", 2)
    assert [*events.feed(responses[2])] == []


def test_what_is_held_back_as_a_stop_comes_out_at_the_end() -> None:
    events = events_of("say sto", stop="stop")
    assert "".join(event.content or "" for event in events if isinstance(event, Delta)) == "say sto"


@pytest.mark.parametrize(
    ("text", "stops", "shown", "finish_reason"),
    [
        (f"EN{CALL}D of it", ["END"], ["EN", "call", "D of it"], "tool_calls"),
        (f"EN{CALL}D of it END", ["END"], ["EN", "call", "D of it "], "stop"),
        (f"EN{CALL}EN{CALL}D", ["END"], ["EN", "call", "EN", "call", "D"], "tool_calls"),
        (f"a END{CALL}", ["END"], ["a "], "stop"),
        # The longer one began first and might have become the stop; at the call it is known that it does not.
        (f"abc{CALL}d", ["abcd", "bc"], ["a"], "stop"),
    ],
)
def test_no_stop_string_has_a_call_in_it(text: str, stops: list[str], shown: list[str], finish_reason: str) -> None:
    events = events_of(text, tools=True, stop=stops)
    pieces = ["call" if event.tool_call else event.content or "" for event in events if isinstance(event, Delta)]
    assert [piece for is_call, group in groupby(pieces, "call".__eq__) for piece in joined(is_call, group)] == shown
    assert done_of(events).finish_reason == finish_reason


def joined(is_call: bool, pieces: Iterable[str]) -> list[str]:
    return list(pieces) if is_call else ["".join(pieces)]


def test_usage_is_that_of_the_last_response() -> None:
    usage = done_of(events_of("abcdef")).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens) == (5, 6, 2)
    assert (usage.budget_exhausted, usage.cached_tokens) == (True, 2)


def test_warnings_are_logged_once_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mlxqwen"):
        done = done_of(events_of(f"{BROKEN} and {BROKEN}", tools=True))
    assert done.reply.content == f"{BROKEN} and {BROKEN}"
    assert [record.name for record in caplog.records] == ["mlxqwen"] * 2
    assert all("a tool call was kept as text" in record.message for record in caplog.records)


@pytest.mark.parametrize("stop", ["", [""], 3, [3]])
def test_bad_stops_are_errors_at_once(stop: Any) -> None:
    with pytest.raises(OptionError, match="stop: found"):
        split_reply(iter([]), thinking=None, stop=stop)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nHm.\n</think>\n\nHello!",
        "<think>\nHm.\n</think>\n\n" + CALL,
        f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}",
        "<think>\n\n</think>\n\nHello!",
    ],
)
def test_the_message_of_a_reply_is_rendered_as_it_was_written(text: str) -> None:
    question = {"role": "user", "content": "Hello"}
    message = assistant_message(parse_reply(text, thinking=None, tools=True))
    rendered = QWEN.apply_chat_template([question, message], tokenize=False)
    prompt = QWEN.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    assert rendered == f"{prompt}{text}<|im_end|>\n"
