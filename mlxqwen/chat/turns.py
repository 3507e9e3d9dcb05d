"""The turns of a conversation: where they begin, what the model should see of them, and their checks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlxqwen.errors import MessagesError
from mlxqwen.files.json_file import json_kind, parse_json
from mlxqwen.text.messages import Message, prepare_messages, without_reasoning

__all__ = [
    "check_conversation",
    "count_turns",
    "prepare_conversation",
    "soft_switch",
    "without_old_reasoning",
    "without_oldest_turns",
]

# Not in a word or path; characters beyond ASCII do not count as a word, as Chinese is written without spaces.
_SOFT_SWITCH = re.compile(r"(?<![\w/])/(?:no_)?think(?![\w/])", re.ASCII)
_ROLE = re.compile(r"[\w-]{1,64}")
_SAFE = re.compile(r'[^"\\<>]*')
CALL_FORM = 'A call is {"id": …, "type": "function", "function": {"name": …, "arguments": {…}}}.'
ROLES = ("system", "user", "assistant", "tool")


def prepare_conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """The messages as `prepare_messages` checks them, where a `developer`, as OpenAI calls it, is the `system`."""
    return tuple(
        Message({**message, "role": "system"}) if message["role"] == "developer" else message
        for message in prepare_messages(messages)
    )


def soft_switch(messages: Sequence[Mapping[str, Any]]) -> bool | None:
    """The latest soft switch in user or system messages: True for `/think`, False for `/no_think`, None without one."""
    for message in reversed(prepare_conversation(messages)):
        if message["role"] in ("user", "system") and (switches := _SOFT_SWITCH.findall(message["content"] or "")):
            return bool(switches[-1] == "/think")
    return None


def without_old_reasoning(
    messages: Sequence[Mapping[str, Any]], *, trust_special_tokens: bool = False
) -> list[Message]:
    """The conversation without the reasoning before its last question; reasoning after it stays.

    Qwen3's chat template leaves the same reasoning out, so the ids do not change.

    Args:
        messages: checked by `prepare_messages`, which also describes the result.
        trust_special_tokens: as for the template: whether a user's message in `<tool_response>` tags is a tool's result
            rather than a question.
    """
    prepared = prepare_conversation(messages)
    questions = [i for i, message in enumerate(prepared) if _is_question(message, trust_special_tokens)]
    # Without any question Qwen3's template leaves all reasoning out.
    old = questions[-1] if questions else len(prepared)
    return [*map(without_reasoning, prepared[:old]), *prepared[old:]]


def count_turns(messages: Sequence[Mapping[str, Any]], *, trust_special_tokens: bool = False) -> int:
    """The number of turns; each begins with a question and contains the calls and results after it."""
    return len(_turn_starts(messages, trust_special_tokens))


def without_oldest_turns(
    messages: Sequence[Mapping[str, Any]], count: int, *, trust_special_tokens: bool = False
) -> list[Mapping[str, Any]]:
    """The messages without the first `count` turns; the system messages in them stay.

    Args:
        messages: a conversation as `check_conversation` takes it. Neither it nor its messages are copied or modified.
        count: from 0; the last turn always stays.
        trust_special_tokens: as for `without_old_reasoning`.
    """
    starts = _turn_starts(messages, trust_special_tokens)
    if count == 0:
        return list(messages)
    kept = starts[min(count, len(starts) - 1)]
    older = zip(messages, prepare_conversation(messages)[:kept], strict=False)
    return [*(message for message, prepared in older if prepared["role"] == "system"), *messages[kept:]]


def _turn_starts(messages: Sequence[Mapping[str, Any]], trust_special_tokens: bool) -> list[int]:
    """Where turns begin. What comes before the first question belongs to the first turn, but for system messages."""
    prepared = prepare_conversation(messages)
    first = next((i for i, message in enumerate(prepared) if message["role"] != "system"), len(prepared))
    questions = [i for i, message in enumerate(prepared) if _is_question(message, trust_special_tokens)]
    return [first, *questions[1:]] if questions[:1] == [first] or not questions else [first, *questions]


def check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check what no chat template can show of a conversation, or what would forge its text.

    What some templates show and others do not, such as other roles than system, user, assistant and tool, is told
    when the prompt is rendered; see `mlxqwen.chat.shown`.

    Raises:
        MessagesError: names the message, what is wrong with it, what a template would do with it, and the way out.
    """
    for i, message in enumerate(prepare_conversation(messages)):
        if not _ROLE.fullmatch(message["role"]):
            raise MessagesError(
                f"messages[{i}]: role: found {message['role']!r:.80}, expected one of {', '.join(ROLES)}: "
                "others may be letters, digits, _ and - alone, as they could forge a turn",
                hint="What a message says belongs into its content.",
            )
        _check_tool_calls(message, f"messages[{i}]")


def _check_tool_calls(message: Mapping[str, Any], where: str) -> None:
    calls = message.get("tool_calls")
    if not calls:
        return
    if message["role"] != "assistant":
        raise MessagesError(
            f"{where}: tool_calls: found in a message of role {message['role']!r}, expected none: "
            "the chat template would drop them in silence",
            hint="Only an assistant calls tools; results are messages of role 'tool'.",
        )
    if not isinstance(calls, list):
        raise MessagesError(
            f"{where}: tool_calls: found {json_kind(calls)}, expected a list: the chat template would raise an error",
            hint=CALL_FORM,
        )
    for i, call in enumerate(calls):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise MessagesError(
                f"{where}: tool_calls[{i}]: found no function: the chat template would raise an error", hint=CALL_FORM
            )
        _check_name(function.get("name"), f"{where}: tool_calls[{i}]: name")
        _check_arguments(function.get("arguments"), f"{where}: tool_calls[{i}]: arguments")


def _check_name(name: object, where: str) -> None:
    """Check that a name cannot end the place where a template writes it."""
    if isinstance(name, dict | list) or (isinstance(name, str) and not (name.isprintable() and _SAFE.fullmatch(name))):
        raise MessagesError(
            f'{where}: found {name!r:.80}, expected printable text without ", \\, < and >: it would forge the call',
            hint=CALL_FORM,
        )


def _check_arguments(arguments: object, where: str) -> None:
    """Check that arguments given as text cannot end the place where a template writes them."""
    if isinstance(arguments, str) and arguments.strip():
        try:
            parse_json(arguments)
        except ValueError as cause:
            raise MessagesError(
                f"{where}: not valid JSON: {cause}: written as it is, it would forge the call", hint=CALL_FORM
            ) from None


def _is_question(message: Mapping[str, Any], trust_special_tokens: bool) -> bool:
    content = message["content"]
    if content is None:  # of which no template of Qwen3's makes a question
        return False
    is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return message["role"] == "user" and not (trust_special_tokens and is_result)
