"""A reply as events: pieces, ends, usage, warnings, and the message that it becomes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pytest

from mlxqwen import Engine
from mlxqwen.chat.reply import Delta, Reply, ToolCall, join_deltas
from mlxqwen.chat.reply_parser import parse_reply
from mlxqwen.engine.events import Done, Event, assistant_message
from mlxqwen.engine.request import CacheKind
from mlxqwen.engine.text_generation import text_request
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.scheduling import new_scheduler
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.test_tokenizer import QWEN

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "one stop two"}}\n</tool_call>'
WHOLE = f"<think>\nI stop to think.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
BROKEN = "<tool_call>\n{nothing}\n</tool_call>"
PROMPT = "Hello"


@pytest.fixture(scope="module")
def scripted(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> tuple[Engine, ScriptedModel]:
    return scripted_engine(*small)


@pytest.fixture
def events_of(scripted: tuple[Engine, ScriptedModel]) -> Any:
    """The events of a reply whose text is given; with `ends=False` it is cut off by `max_tokens`."""
    engine, model = scripted

    def events(text: str, *, ends: bool = True, **options: Any) -> list[Event]:
        tokens = engine.tokenizer.encode(f"{text}<|im_end|>")
        model.say(tokens)
        found = list(engine.reply(PROMPT, max_tokens=len(tokens) - (not ends), **options))
        model.say([])
        return found

    return events


def done_of(events: Sequence[Event]) -> Done:
    assert isinstance(events[-1], Done)
    assert not any(isinstance(event, Done) for event in events[:-1])
    return events[-1]


def deltas_of(events: Sequence[Event]) -> Iterator[Delta]:
    return (event for event in events if isinstance(event, Delta))


def without_ids(reply: Reply) -> Reply:
    calls = (ToolCall("", call.name, call.arguments) for call in reply.tool_calls)
    return Reply(reply.reasoning, reply.content, tuple(calls))


@pytest.mark.parametrize("tools", [False, True])
def test_the_pieces_are_the_whole_reply(events_of: Any, tools: bool) -> None:
    events = events_of(WHOLE, tools=tools)
    done = done_of(events)
    assert without_ids(done.reply) == without_ids(parse_reply(WHOLE, thinking=None, tools=tools))
    assert join_deltas(deltas_of(events)) == done.reply
    assert done.finish_reason == ("tool_calls" if tools else "stop")


def test_without_a_split_all_is_content(events_of: Any) -> None:
    done = done_of(events_of(WHOLE, split=False, tools=True))
    assert (done.reply, done.finish_reason) == (Reply(None, WHOLE), "stop")


@pytest.mark.parametrize(
    ("text", "ends", "options", "expected"),
    [
        ("Hello", True, {}, "stop"),
        ("Hello", False, {}, "length"),
        (" x" * 520, True, {"stop_on_loop": True, "cache": CacheKind(max_kv_size=64)}, "loop"),
        (CALL, True, {"tools": True}, "tool_calls"),
        (CALL, False, {"tools": True}, "length"),
        (f"{CALL} and stop here", True, {"tools": True, "stop": "stop"}, "stop"),
        (CALL, True, {}, "stop"),
        (BROKEN, True, {"tools": True}, "stop"),
    ],
)
def test_finish_reasons(events_of: Any, text: str, ends: bool, options: dict[str, Any], expected: str) -> None:
    assert done_of(events_of(text, ends=ends, **options)).finish_reason == expected


def test_stop_strings_are_of_the_content_alone(events_of: Any) -> None:
    done = done_of(events_of(WHOLE + "\nThen stop it.", tools=True, stop=["stop"]))
    assert done.reply.reasoning == "I stop to think."
    assert done.reply.content == "Let me see.\nThen "
    assert [call.arguments for call in done.reply.tool_calls] == ['{"a": "one stop two"}'] * 2


def test_what_was_not_taken_is_no_part_of_the_reply(scripted: tuple[Engine, ScriptedModel]) -> None:
    """The engine is ahead of those who read: a reply that they end is what they have seen."""
    engine, model = scripted
    tokens = engine.tokenizer.encode(f"One two {CALL}\nThen stop.<|im_end|>")
    model.say(tokens)
    scheduler = new_scheduler(engine.model)
    request = text_request(engine.model, engine.tokenizer, PROMPT, max_tokens=len(tokens), tools=True, stop=["stop"])
    handle = scheduler.submit(request)
    while scheduler.step():
        pass
    seen: list[Delta] = []
    while (token := handle.poll()) is not None:
        seen += token.deltas
        done = handle.done(token)
        assert without_ids(done.reply) == without_ids(join_deltas(seen))
        assert done.stop_string == (None if token.finish_reason is None else "stop")
        if not done.reply.tool_calls:
            assert done.finish_reason == "stop"
    assert done.reply.tool_calls
    model.say([])


def test_nothing_follows_the_end(events_of: Any, scripted: tuple[Engine, ScriptedModel]) -> None:
    events = events_of("a b c d e", stop="c")
    done = done_of(events)
    assert "".join(delta.content or "" for delta in deltas_of(events)) == done.reply.content == "a b "
    tokens = scripted[0].tokenizer.encode("a b c")
    assert (list(done.tokens), done.usage.completion_tokens) == (tokens, len(tokens))


def test_what_is_held_back_as_a_stop_comes_out_at_the_end(events_of: Any) -> None:
    for ends in (True, False):
        events = events_of("say sto", ends=ends, stop="stop")
        assert "".join(delta.content or "" for delta in deltas_of(events)) == "say sto"


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
def test_no_stop_string_has_a_call_in_it(
    events_of: Any, text: str, stops: list[str], shown: list[str], finish_reason: str
) -> None:
    events = events_of(text, tools=True, stop=stops)
    pieces = ["call" if delta.tool_call else delta.content or "" for delta in deltas_of(events)]
    assert [piece for is_call, group in groupby(pieces, "call".__eq__) for piece in joined(is_call, group)] == shown
    assert done_of(events).finish_reason == finish_reason


def joined(is_call: bool, pieces: Iterable[str]) -> list[str]:
    return list(pieces) if is_call else ["".join(pieces)]


def test_usage_counts_what_was_read_and_said(events_of: Any, scripted: tuple[Engine, ScriptedModel]) -> None:
    encode = scripted[0].tokenizer.encode
    usage = done_of(events_of(WHOLE, tools=True)).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(encode(PROMPT)), len(encode(WHOLE)) + 1)
    thought = WHOLE.removeprefix("<think>").partition("</think>")[0]
    assert (usage.reasoning_tokens, usage.budget_exhausted) == (len(encode(thought)), False)
    assert (usage.cached_tokens, usage.drafted_tokens, usage.accepted_tokens) == (0, 0, 0)


def test_warnings_are_logged_once_each(events_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mlxqwen"):
        done = done_of(events_of(f"{BROKEN} and {BROKEN}", tools=True))
    assert done.reply.content == f"{BROKEN} and {BROKEN}"
    assert [record.name for record in caplog.records] == ["mlxqwen"] * 2
    assert all("a tool call was kept as text" in record.message for record in caplog.records)


@pytest.mark.parametrize("stop", ["", [""], 3, [3]])
def test_bad_stops_are_errors_at_once(scripted: tuple[Engine, ScriptedModel], stop: Any) -> None:
    with pytest.raises(OptionError, match="stop: found"):
        scripted[0].reply(PROMPT, stop=stop)


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
