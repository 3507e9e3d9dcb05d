"""What a chat template makes of a conversation's shape: shown as it is, unless it raises or drops in silence.

Templates differ: Qwen3's drops messages of roles that it does not know, Qwen3-Coder's shows them, others raise where a
system message is not the first. So the template itself is asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlxqwen.chat.turns import CALL_FORM, ROLES
from mlxqwen.chat.unrendered import words_of
from mlxqwen.errors import MessagesError, MlxqwenError, TemplateError
from mlxqwen.files.json_file import json_kind, parse_json
from mlxqwen.text.messages import Message, prepare_messages, to_plain_json

__all__ = ["check_shown", "fate_of_content"]

Render = Callable[[Sequence[Message]], str]
Odd = tuple[int, str, str]  # a message's index, what is odd about it, the way out

_ROLE_HINT = f"Expected are {', '.join(ROLES)}; developer is system."
_SYSTEM_HINT = "This model's chat template takes one system message: put all instructions into messages[0]."
_RESULT_HINT = "Keep the assistant's message with its tool_calls in front of the results."


def check_shown(messages: Sequence[Message], render: Render) -> None:
    """Check that the template shows the messages that not every template shows.

    Args:
        messages: as they are rendered.
        render: messages → the text that the template makes of them.

    Raises:
        MessagesError: names the first message that the template raises for, or would drop.
        TemplateError: it raises for another reason.
    """
    odd = sorted([*_odd_messages(messages), *_odd_calls(messages)])
    if not odd and all(message["content"] is not None for message in messages):
        return
    marks = {i: f"{secrets.token_hex(8)}-{i}." for i, _, _ in odd}
    marked = [
        Message({**message, "content": (message["content"] or "") + marks[i]}) if i in marks else message
        for i, message in enumerate(messages)
    ]
    text = ""
    # Last the marked ones; a content that is None is asked about as it is, too.
    for some in [messages, marked] if any(messages[i]["content"] is None for i in marks) else [marked]:
        try:
            text = render(some)
        except TemplateError as error:
            raise _why_raised(error, some, odd, render) from None
    for i, found, hint in odd:
        if marks[i] not in text:
            raise MessagesError(f"messages[{i}]: {found}: the chat template would drop it in silence", hint=hint)


def _why_raised(error: TemplateError, messages: Sequence[Message], odd: Sequence[Odd], render: Render) -> MlxqwenError:
    """The error of a template that raised, with the odd message that it raised for, if it is one."""
    first = odd[0][0]
    if first > 0 and _raises(render, messages[:first]):
        return error
    for i, found, hint in odd:
        if _raises(render, messages[: i + 1]):
            return MessagesError(
                f"messages[{i}]: {found}: the chat template raises an error: {words_of(error)}", hint=hint
            )
    return error


def fate_of_content(messages: Sequence[Mapping[str, Any]], index: int, render: Render) -> str | None:
    """What the template makes of a message whose content is no text, in words; None where other messages decide it."""
    before = prepare_messages(messages[:index]) if index else ()
    plain = to_plain_json(messages[index], f"messages[{index}]")
    try:
        without = render([*before, Message({**plain, "content": ""})])
    except TemplateError:
        return None
    try:
        text = render([*before, Message({"content": None, **plain})])
    except TemplateError as error:
        return f"the chat template raises an error: {words_of(error)}"
    if text == without:
        return "the chat template would drop it in silence"
    return "the chat template would write it as Python does, or a part of it alone"


def _raises(render: Render, messages: Sequence[Message]) -> bool:
    try:
        render(messages)
    except TemplateError:
        return True
    return False


def _odd_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[Odd]:
    """The messages that some templates do not show."""
    may_answer = False
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES:
            yield i, f"role: found {role!r}", "Qwen3 calls it 'tool'." if role == "function" else _ROLE_HINT
        elif role == "system" and i:
            yield i, "role: found 'system' behind the first message", _SYSTEM_HINT
        elif role == "tool" and not may_answer:
            yield i, "found a tool's result without a call of it before", _RESULT_HINT
        may_answer = bool(message.get("tool_calls")) or (role == "tool" and may_answer)


def _odd_calls(messages: Sequence[Mapping[str, Any]]) -> Iterator[Odd]:
    """The messages with calls that some templates raise for."""
    for i, message in enumerate(messages):
        for j, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") or call
            if not isinstance(function.get("name"), str) or not function["name"]:
                yield i, f"tool_calls[{j}]: found no function name", CALL_FORM
            if "arguments" not in function:
                yield i, f"tool_calls[{j}]: arguments: found none", CALL_FORM
            elif not isinstance(arguments := _value(function["arguments"]), dict):
                yield i, f"tool_calls[{j}]: arguments: found {json_kind(arguments)}, expected an object", CALL_FORM


def _value(arguments: Any) -> Any:
    """Arguments, or what their JSON text says."""
    return parse_json(arguments) if isinstance(arguments, str) and arguments.strip() else arguments
