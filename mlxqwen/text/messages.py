"""Conversations as callers write them → plain JSON values that any chat template can be trusted with.

The form is OpenAI's: dicts with `role`, `content`, `tool_calls`, `reasoning_content`. What comes out is a copy
made of exact `str`, `int`, `float`, `bool`, `None`, `list` and `dict`: a template meets no object with methods of
its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.files.json_file import find_lone_surrogate, json_kind

__all__ = [
    "check_unicode",
    "prepare_messages",
    "prepare_tools",
    "split_reasoning",
    "to_plain_json",
]

MAX_DEPTH = 64

_THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


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
    return with_reasoning({**message, "content": content[end:]}, "\n".join(filter(None, thoughts)))


def with_reasoning(message: Mapping[str, Any], reasoning: object) -> dict[str, Any]:
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
    reasoning = next((plain[name] for name in REASONING_NAMES if name in plain), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            name = next(name for name in REASONING_NAMES if name in plain)
            raise MessagesError(
                f"{where}: {name}: found {json_kind(reasoning)}, expected text", hint="Leave it out, or None."
            )
        plain = with_reasoning(plain, reasoning)
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
