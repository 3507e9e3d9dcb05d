"""The turns of a conversation: where they begin, what the model should see of them, and their checks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlxqwen.errors import MessagesError
from mlxqwen.files.json_file import json_kind, parse_json
from mlxqwen.text.messages import Message, prepare_messages, without_reasoning

__all__ = [
    "check_conversation",
    "count_turns",
    "soft_switch",
    "without_old_reasoning",
    "without_oldest_turns",
]

# Not in a word or path; characters beyond ASCII do not count as a word, as Chinese is written without spaces.
_SOFT_SWITCH = re.compile(r"(?<![\w/])/(?:no_)?think(?![\w/])", re.ASCII)
_CALL_FORM = 'A call is {"id": …, "type": "function", "function": {"name": …, "arguments": {…}}}.'
_ROLES = ("system", "user", "assistant", "tool")


def soft_switch(messages: Sequence[Mapping[str, Any]]) -> bool | None:
    """The latest soft switch in user or system messages: True for `/think`, False for `/no_think`, None without one."""
    for message in reversed(prepare_messages(messages)):
        if message["role"] in ("user", "system") and (switches := _SOFT_SWITCH.findall(message["content"])):
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
    prepared = prepare_messages(messages)
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
    """The messages without the first `count` turns; a system message stays.

    Args:
        messages: a conversation as `check_conversation` takes it. Neither it nor its messages are copied or modified.
        count: from 0; the last turn always stays.
        trust_special_tokens: as for `without_old_reasoning`.
    """
    starts = _turn_starts(messages, trust_special_tokens)
    if count == 0:
        return list(messages)
    return [*messages[: starts[0]], *messages[starts[min(count, len(starts) - 1)] :]]


def _turn_starts(messages: Sequence[Mapping[str, Any]], trust_special_tokens: bool) -> list[int]:
    """Where turns begin. What comes before the first question belongs to the first turn, except the system message."""
    prepared = prepare_messages(messages)
    first = 1 if prepared[0]["role"] == "system" else 0
    questions = [i for i, message in enumerate(prepared) if _is_question(message, trust_special_tokens)]
    return [first, *questions[1:]] if questions[:1] == [first] or not questions else [first, *questions]


def check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check what `prepare_messages` allows for the sake of templates, but a chat must not contain.

    Roles are system (first only), user, assistant and tool. Only an assistant calls tools, and may then lack content;
    tools answer the calls of the assistant message before them, each call once. Either all calls have their results or
    none has, when the user continued without them.

    Raises:
        MessagesError: names the message, what is wrong with it and the way out.
    """
    calls: Sequence[Mapping[str, Any]] | None = None
    results: list[Mapping[str, Any]] = []
    for i, message in enumerate(prepare_messages(messages)):
        where = f"messages[{i}]"
        role = message["role"]
        _check_role(role, where, is_first=i == 0)
        if role == "tool":
            _check_tool_answer(message, calls, results, where)
            results.append(message)
            continue
        _check_results(calls, results, f"messages[{i - 1}]")
        results = []
        calls = _check_tool_calls(message, where)
    _check_results(calls, results, f"messages[{len(messages) - 1}]")


def _check_role(role: str, where: str, *, is_first: bool) -> None:
    if role not in _ROLES:
        known = {"developer": "system", "function": "tool"}
        raise MessagesError(
            f"{where}: role: found {role!r}, expected one of {', '.join(_ROLES)}",
            hint=f"Qwen3 calls it {known[role]!r}." if role in known else "Qwen3 knows no other role.",
        )
    if role == "system" and not is_first:
        raise MessagesError(
            f"{where}: role: found 'system', expected it in the first message only",
            hint="Put all instructions into messages[0], or say it as a user.",
        )


def _check_tool_calls(message: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]] | None:
    """The calls of a message; None if it has none."""
    calls = message.get("tool_calls")
    if not calls:
        return None
    if message["role"] != "assistant":
        raise MessagesError(
            f"{where}: tool_calls: found in a message of role {message['role']!r}, expected none",
            hint="Only an assistant calls tools; results are messages of role 'tool'.",
        )
    if not isinstance(calls, list):
        raise MessagesError(f"{where}: tool_calls: found {json_kind(calls)}, expected a list", hint=_CALL_FORM)
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise MessagesError(f"{where}: tool_calls[{i}]: found no function name", hint=_CALL_FORM)
        _check_arguments(function.get("arguments"), f"{where}: tool_calls[{i}]: arguments")
    ids = sorted(repr(call["id"]) for call in calls if call.get("id") is not None)
    if repeated := next((call_id for call_id, following in pairwise(ids) if call_id == following), None):
        raise MessagesError(
            f"{where}: tool_calls: found the id {repeated} twice, expected one of its own for each call",
            hint="Each result names the call that it answers by its id.",
        )
    return calls


def _check_arguments(arguments: object, where: str) -> None:
    found = "none" if arguments is None else json_kind(arguments)
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as cause:
            raise MessagesError(f"{where}: not valid JSON: {cause}", hint=_CALL_FORM) from None
        found = f"the JSON text of {json_kind(arguments)}"
    if not isinstance(arguments, dict):
        raise MessagesError(f"{where}: found {found}, expected an object or its JSON text", hint=_CALL_FORM)


def _check_tool_answer(
    message: Mapping[str, Any],
    calls: Sequence[Mapping[str, Any]] | None,
    before: Sequence[Mapping[str, Any]],
    where: str,
) -> None:
    """Check a result that follows the results `before`."""
    if calls is None:
        raise MessagesError(
            f"{where}: found a tool's result, expected a call of it before",
            hint="Keep the assistant message with its tool_calls in front of the results.",
        )
    call_id = message.get("tool_call_id")
    known = [call["id"] for call in calls if call.get("id") is not None]
    if call_id is not None and call_id not in known:
        expected = f"one of {known}" if known else "none, as the calls have no id"
        raise MessagesError(
            f"{where}: tool_call_id: found {call_id!r}, expected {expected}",
            hint="Give each result the id of the call that it answers.",
        )
    if call_id is not None and call_id in [result.get("tool_call_id") for result in before]:
        raise MessagesError(
            f"{where}: tool_call_id: found {call_id!r} for the second time, expected one result of each call",
            hint="Put all that the model is to know of a call into one message.",
        )
    if len(before) == len(calls):
        raise MessagesError(
            f"{where}: found more results than the {len(calls)} of the calls before, expected one of each call",
            hint="Put all that the model is to know of a call into one message.",
        )


def _check_results(calls: Sequence[Mapping[str, Any]] | None, results: Sequence[Mapping[str, Any]], where: str) -> None:
    """Check that all calls have results, or none. `where` is the last result."""
    if calls and results and len(results) < len(calls):
        raise MessagesError(
            f"{where}: found results of {len(results)} of {len(calls)} calls, expected one of each call",
            hint="Add a message of role 'tool' for each call, or leave all results out.",
        )


def _is_question(message: Mapping[str, Any], trust_special_tokens: bool) -> bool:
    content = message["content"]
    is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return message["role"] == "user" and not (trust_special_tokens and is_result)
