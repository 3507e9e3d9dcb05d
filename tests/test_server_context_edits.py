"""Anthropic's context editing: which results and thoughts are cleared, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.anthropic_request import MessagesFields, as_chat, edited
from mlxqwen.server.bodies import form_of
from mlxqwen.text.tokenizer import Tokenizer
from tests.serving import Served, serving

PATH = "/v1/messages"
TOOL = {"name": "read", "input_schema": {"type": "object"}}
CLEAR = "clear_tool_uses_20250919"
FORGET = "clear_thinking_20251015"


@pytest.fixture(scope="module")
def served(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[Served]:
    with serving(Engine(*demo)) as made:
        yield made


def talk(count: int, result: str = "strawberry " * 6, tool: str = "read") -> list[dict[str, Any]]:
    """A question, and so many thoughts, calls and results."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Read all files."}]
    for n in range(count):
        use = {"type": "tool_use", "id": f"t{n}", "name": tool if n else "first", "input": {"path": f"file {n}"}}
        thought = {"type": "thinking", "thinking": f"I read {n}.", "signature": ""}
        answer = {"type": "tool_result", "tool_use_id": f"t{n}", "content": result}
        messages += [{"role": "assistant", "content": [thought, use]}, {"role": "user", "content": [answer]}]
    return messages


def fields_of(messages: list[dict[str, Any]], *edits: dict[str, Any]) -> MessagesFields:
    body = {"messages": messages, "max_tokens": 1, "tools": [TOOL], "context_management": {"edits": list(edits)}}
    return form_of(body, MessagesFields)


def length(fields: MessagesFields) -> int:
    """Characters of the chat completion's messages, for tokens."""
    return len(str(as_chat(fields, []).messages))


def results(fields: MessagesFields) -> list[bool]:
    """Of each result, whether it is there."""
    return ["strawberry" in block["content"] for block in blocks_of(fields, "tool_result")]


def blocks_of(fields: MessagesFields, kind: str) -> list[dict[str, Any]]:
    blocks = [block for one in fields.messages if isinstance(one.content, list) for block in one.content]
    return [block for block in blocks if block["type"] == kind]


def uses(count: int) -> dict[str, Any]:
    return {"type": "tool_uses", "value": count}


def tokens(count: int) -> dict[str, Any]:
    return {"type": "input_tokens", "value": count}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [True] * 6),  # there are no hundred thousand tokens
        ({"trigger": uses(6)}, [True] * 6),
        ({"trigger": uses(5)}, [False] * 3 + [True] * 3),
        ({"trigger": tokens(100), "keep": uses(1)}, [False] * 5 + [True]),
        ({"trigger": tokens(10**6)}, [True] * 6),
        ({"trigger": uses(1), "keep": uses(0)}, [False] * 6),
        ({"trigger": uses(1), "exclude_tools": ["first"]}, [True, False, False] + [True] * 3),
        ({"trigger": uses(1), "clear_at_least": tokens(10**6)}, [True] * 6),
        ({"trigger": uses(1), "clear_at_least": tokens(9)}, [False] * 3 + [True] * 3),
    ],
    ids=str,
)
def test_which_results_are_cleared(options: dict[str, Any], kept: list[bool]) -> None:
    fields = fields_of(talk(6), {"type": CLEAR, **options})
    after, applied = edited(fields, length, [])
    assert results(after) == kept
    cleared = kept.count(False)
    told = [{"type": CLEAR, "cleared_tool_uses": cleared, "cleared_input_tokens": length(fields) - length(after)}]
    assert applied == (told if cleared else [])
    assert results(fields) == [True] * 6


@pytest.mark.parametrize(("inputs", "emptied"), [(True, 3), (["read"], 2), (["other"], 0), (False, 0)])
def test_inputs_are_cleared_where_that_is_asked_for(inputs: object, emptied: int) -> None:
    edit = {"type": CLEAR, "trigger": {"type": "tool_uses", "value": 1}, "clear_tool_inputs": inputs}
    after, _ = edited(fields_of(talk(6), edit), length, [])
    calls = [call for one in as_chat(after, []).messages for call in one.get("tool_calls", ())]
    assert [call["function"]["arguments"] for call in calls].count("{}") == emptied


@pytest.mark.parametrize(
    ("keep", "cleared", "left"),
    [("all", 0, 3), (None, 2, 1), (0, 3, 0), (1, 2, 1), (2, 1, 2), (9, 0, 3)],
)
def test_which_thoughts_are_cleared(keep: object, cleared: int, left: int) -> None:
    """By turns: what the assistant says behind one question."""
    form = {"type": "thinking_turns", "value": keep} if isinstance(keep, int) else keep
    fields = fields_of([*talk(1), *talk(2), *talk(1)], {"type": FORGET, "keep": form})
    after, applied = edited(fields, length, [])
    thoughts = [one["reasoning_content"] for one in as_chat(after, []).messages if "reasoning_content" in one]
    assert applied is not None
    assert sum(one["cleared_thinking_turns"] for one in applied) == cleared
    assert len(thoughts) == {0: 0, 1: 1, 2: 3, 3: 4}[left]


@pytest.mark.parametrize("own", [1, ["t0"], {"t": 0}, None], ids=str)
def test_ids_that_are_no_texts(served: Served, own: object) -> None:
    """Their results are cleared, too."""
    messages = talk(2)
    messages[1]["content"][1]["id"] = messages[2]["content"][0]["tool_use_id"] = own
    edit = {"type": CLEAR, "trigger": uses(0), "keep": uses(1), "clear_tool_inputs": True}
    after, applied = edited(fields_of(messages, edit), length, [])
    assert results(after) == [False, True]
    assert [one["input"] for one in blocks_of(after, "tool_use")] == [{}, {"path": "file 1"}]
    assert applied is not None
    assert applied[0]["cleared_tool_uses"] == 1
    body = {"model": "demo", "messages": messages, "max_tokens": 1, "context_management": {"edits": [edit]}}
    assert served.client.post(PATH, json=body).status_code < 500


def test_each_prompt_is_counted_once() -> None:
    edit = {"type": CLEAR, "trigger": tokens(0), "clear_at_least": tokens(1)}
    edits = [{**edit, "keep": uses(8 - n)} for n in range(8)]
    counted: list[object] = []

    def count(fields: MessagesFields) -> int:
        counted.append(fields)
        return length(fields)

    _, applied = edited(fields_of(talk(9), *edits), count, [])
    assert applied is not None
    assert len(applied) == 8
    assert len(counted) == 1 + 8


def test_what_is_told(served: Served) -> None:
    edit = {"type": CLEAR, "trigger": {"type": "tool_uses", "value": 1}, "keep": {"type": "tool_uses", "value": 1}}
    other = {"type": "compact_20260112"}
    body = {"messages": talk(3), "tools": [TOOL], "model": "demo"}
    asked = {**body, "context_management": {"edits": [edit, other]}}
    before = served.post(body, f"{PATH}/count_tokens")["input_tokens"]
    counted = served.post(asked, f"{PATH}/count_tokens")
    assert counted["context_management"] == {"original_input_tokens": before}
    cleared = before - counted["input_tokens"]
    assert cleared > 10
    response = served.client.post(PATH, json={**asked, "max_tokens": 1})
    told = {"applied_edits": [{"type": CLEAR, "cleared_tool_uses": 2, "cleared_input_tokens": cleared}]}
    assert response.json()["context_management"] == told
    assert response.headers["x-mlxqwen-ignored"] == "context_management.edits[1]"
    usage = response.json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]
    events = served.stream({**asked, "max_tokens": 1}, PATH)
    (delta,) = [one for one in events if one["type"] == "message_delta"]
    assert delta["context_management"] == told
    assert "context_management" not in served.post({**body, "max_tokens": 1}, PATH)


@pytest.mark.parametrize(
    "edit",
    [
        {"type": CLEAR, "trigger": 5},
        {"type": CLEAR, "trigger": {"type": "input_tokens", "value": -1}},
        {"type": CLEAR, "keep": {"type": "hours", "value": 1}},
        {"type": CLEAR, "keep": {"type": "input_tokens", "value": 1}},
        {"type": CLEAR, "trigger": {"type": "thinking_turns", "value": 1}},
        {"type": CLEAR, "clear_at_least": {"type": "tool_uses", "value": 1}},
        {"type": FORGET, "keep": {"type": "tool_uses", "value": 1}},
        {"type": CLEAR, "exclude_tools": "read"},
        {"type": CLEAR, "clear_tool_inputs": 3},
        {"type": FORGET, "keep": "some"},
        "clear",
    ],
    ids=str,
)
def test_edits_of_another_form_are_refused(served: Served, edit: object) -> None:
    body = {"model": "demo", "messages": talk(1), "max_tokens": 1, "context_management": {"edits": [edit]}}
    refused = served.client.post(PATH, json=body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
