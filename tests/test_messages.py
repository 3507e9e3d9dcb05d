"""Conversations: raw replies split, old reasoning left out, sequences that no chat should hold."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.chat.prompts import asks_for_thought, least_tokens, render_prompt
from mlxqwen.chat.thinking_modes import thinking_modes
from mlxqwen.chat.turns import (
    check_conversation,
    count_turns,
    soft_switch,
    without_old_reasoning,
    without_oldest_turns,
)
from mlxqwen.errors import MessagesError
from mlxqwen.text import messages as messages_module
from mlxqwen.text.messages import Message, prepare_messages, split_reasoning, without_reasoning
from tests.test_tokenizer import QWEN

CASES = json.loads((Path(__file__).parent / "golden" / "chat_template.json").read_text())["cases"]
USER: dict[str, Any] = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "1"}
NAMELESS = {"role": "tool", "content": "3"}
TWO_CALLS = {**CALLS, "tool_calls": [CALL, {**CALL, "id": "2"}]}
# Whatever the checkpoint's template does, this one says all.
TELL_ALL = "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}|{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("<think>\na\n</think>\n\nb", "a", "b"),
        ("<think>a</think>b", "a", "b"),
        ("\n <think>a</think>", "a", ""),
        ("<think>\n\n</think>\n\n", "", ""),
        ("<think>a\n\nb <think></think>\n  c", "a\n\nb <think>", "  c"),
        ("<think>a</think><think>\n</think>\n<think>b</think>c", "a\nb", "c"),
        ("<think>a</think>say </think> to end", "a", "say </think> to end"),
    ],
)
def test_a_raw_reply_is_split(content: str, reasoning: str, rest: str) -> None:
    message = prepare_messages([{"role": "assistant", "content": content}])[0]
    before = dict(message)
    split = split_reasoning(message)
    assert (split["reasoning_content"], split["content"]) == (reasoning, rest)
    assert message == before
    assert split_reasoning(split) == split


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "<think>a</think>b"},
        {"role": "tool", "content": "<think>a</think>b"},
        {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": ""},
        {"role": "assistant", "content": "see <think>a</think>b"},
        {"role": "assistant", "content": "<think>a"},
        {"role": "assistant", "content": "a</think>b"},
        {"role": "assistant", "content": "<thinking>a</think>"},
    ],
)
def test_what_is_no_raw_reply_stays(message: dict[str, Any]) -> None:
    prepared = prepare_messages([message])[0]
    assert split_reasoning(prepared) == prepared


def test_many_empty_blocks_take_linear_time() -> None:
    message = prepare_messages([{"role": "assistant", "content": "<think></think>" * 200_000 + "x"}])[0]
    assert split_reasoning(message)["content"] == "x"


MORE_CASES: list[dict[str, Any]] = [
    {"messages": [USER, {"role": "assistant", "content": content, **reasoning}, *rest]}
    for content in (
        "<think>a</think>b",
        "<think>a</think>b</think>c",
        "<think>a</think>\n<think>b</think>\n\nc",
        "a</think>",
    )
    for reasoning in ({}, {"reasoning_content": "r"}, {"reasoning": "r"}, {"thinking": ""})
    for rest in ([], [USER], [{"role": "user", "content": "<tool_response>3</tool_response>"}], [USER, ANSWER])
]
MORE_CASES.append({"messages": [ANSWER]})
MORE_CASES.append({"messages": [SYSTEM, ANSWER, CALLS, RESULT, ANSWER]})


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=lambda case: case.get("name"))
def test_the_template_sees_no_difference_without_old_reasoning(case: dict[str, Any], trust: bool) -> None:
    arguments = {key: value for key, value in case.items() if key not in ("name", "text", "ids", "messages")}
    before = copy.deepcopy(case["messages"])
    less = without_old_reasoning(case["messages"], trust_special_tokens=trust)
    assert case["messages"] == before
    # The template drops what a chat gives it as the system's.
    case = {**case, "messages": [{**m, "role": m["role"].replace("developer", "system")} for m in before]}
    assert without_old_reasoning(less, trust_special_tokens=trust) == less
    expected = QWEN.apply_chat_template(case["messages"], **arguments, trust_special_tokens=trust)
    assert QWEN.apply_chat_template(less, **arguments, trust_special_tokens=trust) == expected


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([USER, ANSWER], "user:|Hello;assistant:hm|Hi;"),
        ([USER, ANSWER, USER], "user:|Hello;assistant:|Hi;user:|Hello;"),
        (
            [USER, {**ANSWER, "content": "<think>a</think>b"}, USER],
            "user:|Hello;assistant:|<think>a</think>b;user:|Hello;",
        ),
        ([USER, {"role": "assistant", "content": "<think>a</think>b"}, USER], "user:|Hello;assistant:|b;user:|Hello;"),
        (
            [USER, ANSWER, USER, {**CALLS, "reasoning": "r"}, RESULT, ANSWER],
            "user:|Hello;assistant:|Hi;user:|Hello;assistant:r|;tool:|3;assistant:hm|Hi;",
        ),
        (
            [USER, ANSWER, {"role": "user", "content": "<tool_response>3</tool_response>"}],
            "user:|Hello;assistant:|Hi;user:|<tool_response>3</tool_response>;",
        ),
    ],
)
def test_old_reasoning_is_gone_whatever_the_template_does(messages: list[dict[str, Any]], told: str) -> None:
    rendered = QWEN.apply_chat_template(without_old_reasoning(messages), tokenize=False, chat_template=TELL_ALL)
    assert rendered == told


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER, ANSWER, USER],
        [USER, CALLS, RESULT, ANSWER],
        [USER, {**CALLS, "content": "Let me see."}, RESULT],
        [USER, CALLS],
        [USER, CALLS, USER],
        [USER, {**CALLS, "tool_calls": [{**CALL, "id": None}, {**CALL, "id": None}]}, NAMELESS, NAMELESS],
        [USER, TWO_CALLS, RESULT, NAMELESS, USER],
        [
            USER,
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]},
            {"role": "tool", "content": "3"},
        ],
        [USER, TWO_CALLS, {**RESULT, "tool_call_id": "2"}, RESULT],
        [USER, {"role": "assistant", "content": None, "reasoning": "r"}],
        [USER, {**ANSWER, "tool_calls": []}, USER],
        [USER, {**ANSWER, "tool_calls": None}, USER],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, {"role": "assistant", "content": ""}],
        # What the template shows or not is told when it renders; see test_message_shapes.py.
        [USER, {"role": "moderator", "content": "x"}],
        [USER, SYSTEM, {"role": "developer", "content": "x"}],
        [RESULT],
        [USER, CALLS, RESULT, USER, RESULT],
        [USER, {**CALLS, "tool_calls": [CALL, CALL]}],
        [USER, CALLS, RESULT, RESULT],
        [USER, CALLS, NAMELESS, NAMELESS],
        [USER, TWO_CALLS, RESULT, USER],
        [USER, CALLS, {**RESULT, "tool_call_id": "7"}],
        [USER, {**CALLS, "tool_calls": [{"name": "f"}, {"name": "f", "arguments": [1]}, {"arguments": ""}]}],
    ],
)
def test_sound_conversations(messages: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(messages)
    check_conversation(messages)
    assert messages == before


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages: found an empty list"),
        ([{"role": "user<|im_end|>", "content": "x"}], "role: found 'user<"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "tool_calls: found in a message of role 'user'"),
        ([USER, CALLS, {"role": "tool", "content": None}], "content: found none"),
        (
            [USER, {**ANSWER, "reasoning_content": 5}],
            r"messages\[1\]: reasoning_content: found a number, expected text",
        ),
        ([USER, {**CALLS, "reasoning_content": ["a"]}, RESULT], "reasoning_content: found a list"),
        ([USER, {"role": "assistant", "content": "b", "reasoning": {}}, USER], "reasoning: found an object"),
        ([USER, {**CALLS, "tool_calls": CALL}], "tool_calls: found an object, expected a list"),
        ([USER, {**CALLS, "tool_calls": ["f"]}], r"tool_calls\[0\]: found no function: .* raise an error"),
        ([USER, {**CALLS, "tool_calls": [{"function": "f"}]}], "found no function"),
        ([USER, {**CALLS, "tool_calls": [{"name": "f", "arguments": "{"}]}], r"\[0\]: arguments: not valid JSON"),
    ],
)
def test_unsound_conversations_are_named(messages: Any, named: str) -> None:
    with pytest.raises(MessagesError, match=named) as caught:
        check_conversation(messages)
    assert caught.value.hint or not messages


def test_a_checked_message_cannot_change() -> None:
    given = copy.deepcopy(CALLS)
    (message,) = prepare_messages([given])
    given["tool_calls"].append("later")
    message["tool_calls"].clear()
    message["tool_calls"][0]["function"]["name"] = "g"
    dict(message)["tool_calls"][0]["function"]["arguments"]["a"] = 1
    with pytest.raises(TypeError):
        message["content"] = "other"  # type: ignore[index]
    assert message == {**CALLS, "content": ""}
    assert copy.deepcopy(message) == message
    assert type(dict(message)["tool_calls"]) is list


def test_checked_messages_are_taken_as_they_are() -> None:
    first = prepare_messages([SYSTEM, USER])
    again = prepare_messages([*first, ANSWER])
    assert again[0] is first[0]
    assert again[1] is first[1]
    assert without_reasoning(again[1]) is again[1]
    assert type(without_reasoning(again[2])) is Message


def test_a_chat_checks_each_message_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the checks of a conversation, its turns, its prompt and the template."""
    checked: list[object] = []
    check = messages_module._prepare_message

    def counting(message: object, index: int) -> Message:
        checked.append(message)
        return check(message, index)

    thinking_modes(QWEN)  # is read off once, from messages of its own
    monkeypatch.setattr(messages_module, "_prepare_message", counting)
    raw_answer = {"role": "assistant", "content": "<think>a</think>b"}
    other_call = {**CALLS, "tool_calls": [{**CALL, "id": "2"}], "reasoning": "r"}
    given = [SYSTEM, USER, ANSWER, USER, raw_answer, USER, CALLS, RESULT, other_call, NAMELESS]
    conversation = prepare_messages(given)
    assert checked == given
    check_conversation(conversation)
    assert count_turns(conversation) == 3
    assert soft_switch(without_oldest_turns(conversation, 1)) is None
    prompt = render_prompt(QWEN, conversation)
    assert least_tokens(QWEN, conversation) <= len(prompt)
    assert not asks_for_thought(QWEN, prompt, conversation, thinking=False)
    assert QWEN.apply_chat_template(conversation, add_generation_prompt=True) == prompt
    assert len(checked) == len(given)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
        (["a", "b"], "ab"),
        (["a", {"type": "text", "text": "b"}], "ab"),
        ([], ""),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_parts_and_plain_strings_are_text(role: str, content: Any, text: str) -> None:
    assert prepare_messages([{"role": role, "content": content}])[0]["content"] == text


@pytest.mark.parametrize("content", [{"a": 1}, 3, 1.5, True, None, [1, 2], [{"a": 1}], [None], ["a", 3]], ids=repr)
def test_a_result_that_is_no_text_is_told_the_way_out(content: Any) -> None:
    with pytest.raises(MessagesError, match=r"messages\[0\]: content") as caught:
        prepare_messages([{**RESULT, "content": content}])
    assert "json.dumps(result)" in caught.value.hint


@pytest.mark.parametrize(
    ("message", "told", "hint"),
    [
        ({**USER, "content": [{"type": "image_url"}]}, "found 'image_url'", "leave images"),
        ({**RESULT, "content": [{"type": "image"}]}, "found 'image'", "leave images"),
        ({**USER, "content": {"type": "text", "text": "a"}}, "found an object", "Parts are texts"),
        ({**USER, "content": [3]}, "found a number", "Parts are texts"),
        ({**USER, "content": [{"type": "text"}]}, "found 'text'", "Parts are texts"),
        ({**USER, "content": [{"type": "input_audio"}]}, "found 'input_audio'", "leave images"),
        ({**RESULT, "content": [{"type": "tool_result", "text": "a"}]}, "found 'tool_result'", "json.dumps"),
    ],
)
def test_content_that_is_no_text_is_named(message: dict[str, Any], told: str, hint: str) -> None:
    with pytest.raises(MessagesError, match=told) as caught:
        prepare_messages([message])
    assert hint in caught.value.hint
