"""Conversations as callers write them → plain JSON values that any chat template can be trusted with.

The form is OpenAI's: dicts with `role`, `content`, `tool_calls`, `reasoning_content`. What comes out is a copy
made of exact `str`, `int`, `float`, `bool`, `None`, `list` and `dict`: a template meets no object with methods of
its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.json_file import find_lone_surrogate, json_kind, parse_json

__all__ = [
    "check_conversation",
    "check_unicode",
    "count_turns",
    "prepare_messages",
    "prepare_tools",
    "soft_switch",
    "split_reasoning",
    "to_plain_json",
    "without_old_reasoning",
    "without_oldest_turns",
]

MAX_DEPTH = 64

# Not in a word or path; characters beyond ASCII do not count as a word, as Chinese is written without spaces.
_SOFT_SWITCH = re.compile(r"(?<![\w/])/(?:no_)?think(?![\w/])", re.ASCII)
_THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
_CALL_FORM = 'A call is {"id": …, "type": "function", "function": {"name": …, "arguments": {…}}}.'
_ROLES = ("system", "user", "assistant", "tool")
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def check_unicode(text: str, where: str, *, error: type[OptionError] = OptionError) -> None:
    """Raise `error`, naming `where`, if `text` holds half of a surrogate pair."""
    position = find_lone_surrogate(text)
    if position is not None:
        raise error(
            f"{where}: found half of a surrogate pair, {text[position]!a}, at character {position}",
            hint='Such text is not Unicode; clean it with text.encode("utf-8", "replace").decode().',
        )


def to_plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` out of plain JSON types; tuples become lists.

    Raises:
        MessagesError: something else than JSON, nested deeper than 64 levels, or text that is not Unicode.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_string(value, where)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if depth >= MAX_DEPTH:
        raise MessagesError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return {_plain_key(key, where): to_plain_json(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise MessagesError(
        f"{where}: found {json_kind(value)}, expected text, a number, a bool, null, a list or a dict",
        hint="Convert it to plain JSON values first.",
    )


def prepare_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A checked copy of a conversation.

    Keys that are None are dropped, text parts of content are joined, missing content becomes "" beside tool calls
    or reasoning, and reasoning is found as `reasoning_content` whichever of its usual names it came under.

    Raises:
        MessagesError: names the message and what is wrong with it.
    """
    if not isinstance(messages, list | tuple):
        raise MessagesError(
            f"messages: found {json_kind(messages)}, expected a list of messages",
            hint='A message is a dict such as {"role": "user", "content": "Hello"}.',
        )
    if not messages:
        raise MessagesError("messages: found an empty list, expected at least one message")
    return [_prepare_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def soft_switch(messages: Sequence[Mapping[str, Any]]) -> bool | None:
    """What the latest `/think` (True) or `/no_think` (False) in user or system turns asks for; None without any."""
    for message in reversed(prepare_messages(messages)):
        if message["role"] in ("user", "system") and (switches := _SOFT_SWITCH.findall(message["content"])):
            return bool(switches[-1] == "/think")
    return None


def prepare_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A checked copy of a list of tools, each a JSON schema.

    Raises:
        MessagesError: not a list of dicts.
    """
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise MessagesError(f"tools: found {json_kind(tools)}, expected a list of JSON schemas")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise MessagesError(
                f"tools[{i}]: found {json_kind(tool)}, expected a dict",
                hint='Describe the function by its schema: {"type": "function", "function": {"name": …}}.',
            )
    return [to_plain_json(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def split_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A raw reply of an assistant → its reasoning and its content, as Qwen3's chat template would part them.

    Only closed think blocks that open the content count, and only where no reasoning is given beside it; tags further
    on are what the reply speaks of.

    Args:
        message: as `prepare_messages` returns it; never modified.
    """
    if message["role"] != "assistant" or "reasoning_content" in message:
        return dict(message)
    content = message["content"]
    thoughts = []
    end = 0
    while block := _THINK_BLOCK.match(content, end):
        thoughts.append(block[1].strip("\n"))
        end = block.end()
    if not thoughts:
        return dict(message)
    return _with_reasoning({**message, "content": content[end:]}, "\n".join(filter(None, thoughts)))


def without_old_reasoning(
    messages: Sequence[Mapping[str, Any]], *, trust_special_tokens: bool = False
) -> list[dict[str, Any]]:
    """A conversation without the reasoning behind answers already given: what follows the last question keeps it.

    Qwen3's chat template leaves it out as well: its ids are the same for what comes out as for what goes in.

    Args:
        messages: checked by `prepare_messages`, which also says what comes out.
        trust_special_tokens: as for the template: whether a user's message in `<tool_response>` tags is no question
            but a tool's result.
    """
    prepared = prepare_messages(messages)
    questions = [i for i, message in enumerate(prepared) if _is_question(message, trust_special_tokens)]
    # Without any question Qwen3's template leaves all reasoning out.
    old = questions[-1] if questions else len(prepared)
    return [*map(_without_reasoning, prepared[:old]), *prepared[old:]]


def count_turns(messages: Sequence[Mapping[str, Any]], *, trust_special_tokens: bool = False) -> int:
    """How many turns a conversation has: each begins with a question, and holds the calls and results behind it."""
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
    """Where turns begin; what stands before the first question belongs to the first turn, a system message to none."""
    prepared = prepare_messages(messages)
    first = 1 if prepared[0]["role"] == "system" else 0
    questions = [i for i, message in enumerate(prepared) if _is_question(message, trust_special_tokens)]
    return [first, *questions[1:]] if questions[:1] == [first] or not questions else [first, *questions]


def check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what `prepare_messages` lets pass for the template's sake, but no chat should hold.

    Roles are system (first only), user, assistant and tool. Only an assistant calls tools, and may then lack content;
    tools answer the calls of the assistant message before them, each call once. Either all calls have their results or
    none has, when the user went on without them.

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
        if role != "assistant" and messages[i].get("content") is None:
            raise MessagesError(
                f"{where}: content: found none, expected text", hint="Only an assistant may lack content."
            )
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
    """Check a result that comes behind the results `before`."""
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
    """Refuse calls of which but some have results; `where` is the last result."""
    if calls and results and len(results) < len(calls):
        raise MessagesError(
            f"{where}: found results of {len(results)} of {len(calls)} calls, expected one of each call",
            hint="Add a message of role 'tool' for each call, or leave all results out.",
        )


def _is_question(message: Mapping[str, Any], trust_special_tokens: bool) -> bool:
    content = message["content"]
    is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return message["role"] == "user" and not (trust_special_tokens and is_result)


def _without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in split_reasoning(message).items() if name not in _REASONING_NAMES}
    # Beside reasoning a think block is content, which it must not cease to be.
    is_text = "reasoning_content" in message and "</think>" in message["content"]
    return _with_reasoning(kept, "") if is_text else kept


def _with_reasoning(message: Mapping[str, Any], reasoning: object) -> dict[str, Any]:
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _prepare_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MessagesError(
            f"{where}: found {json_kind(message)}, expected a dict",
            hint='A message is a dict such as {"role": "user", "content": "Hello"}.',
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        found = f"{role!r}" if "role" in message else "none"
        raise MessagesError(f"{where}: role: found {found}, expected a string such as user, assistant, system or tool")
    plain = {key: value for key, value in to_plain_json(message, where).items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING_NAMES if name in plain), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            name = next(name for name in _REASONING_NAMES if name in plain)
            raise MessagesError(
                f"{where}: {name}: found {json_kind(reasoning)}, expected text", hint="Leave it out, or None."
            )
        plain = _with_reasoning(plain, reasoning)
    may_lack_content = bool(plain.get("tool_calls")) or reasoning is not None
    plain["content"] = _content_text(plain.get("content"), where, may_lack_content)
    return plain


def _content_text(content: object, where: str, may_be_missing: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if may_be_missing:
            return ""
        raise MessagesError(f"{where}: content: found none, expected text", hint="Only tool calls may stand alone.")
    if not isinstance(content, list):
        raise MessagesError(f"{where}: content: found {json_kind(content)}, expected text or a list of parts")
    return "".join(_part_text(part, f"{where}: content[{i}]") for i, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    found = repr(part.get("type")) if isinstance(part, dict) else json_kind(part)
    raise MessagesError(
        f'{where}: found {found}, expected {{"type": "text", "text": …}}',
        hint="Qwen3 reads text only: leave images, audio and files out.",
    )


def _plain_string(text: str, where: str) -> str:
    text = str.__str__(text)
    check_unicode(text, where, error=MessagesError)
    return text


def _plain_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise MessagesError(f"{where}: found a key that is {json_kind(key)}, expected text")
    return _plain_string(key, where)
