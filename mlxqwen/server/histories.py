"""Talks as clients send them → as the library takes them: bookkeeping in them, calls cut off, calls written as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxqwen.chat.tool_call_text import parse_tool_calls
from mlxqwen.chat.turns import check_conversation
from mlxqwen.errors import MlxqwenError
from mlxqwen.files.json_file import parse_json
from mlxqwen.server.event_stream import to_json

__all__ = ["kept_instructions", "with_kept_instructions", "with_whole_arguments", "with_written_calls"]

# Lines of Claude Code's that differ with every request, and would keep its instructions from being known: what is to be
# billed, at their beginning, and how many tokens are left of a budget that is not this server's.
_HEADER = re.compile(r"x-anthropic-[a-z-]+:[^\n]*\n*")
_TOKENS_LEFT = re.compile(r"(?:\A|\n)<total_tokens>\d{1,15} tokens left</total_tokens>(?=\n|\Z)")


def kept_instructions(text: str) -> str:
    """Instructions without the lines of a client's bookkeeping."""
    at = 0
    while header := _HEADER.match(text, at):
        at = header.end()
    rest, found = _TOKENS_LEFT.subn("", text[at:])
    return rest.rstrip("\n") if found else rest


def with_kept_instructions(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, those of the system and of developers without the lines of a client's bookkeeping."""
    kept: list[Mapping[str, Any]] = []
    for message in messages:
        text = _text(message.get("content")) if message.get("role") in ("system", "developer") else None
        rest = text if text is None else kept_instructions(text)
        if rest == text:
            kept.append(message)
        elif rest:
            kept.append({**message, "content": rest})
    return kept


def with_whole_arguments(messages: Sequence[Mapping[str, Any]], notes: list[str]) -> list[Mapping[str, Any]]:
    """The messages, in which arguments of calls that are no JSON are JSON strings: so the model is shown what it wrote.

    Models' calls may be cut off, and agents send them back. A note is taken of each. Calls of custom tools, which other
    models have made, are shown as calls with one argument, `input`.
    """
    return [_with_whole_arguments(message, f"messages[{place}]", notes) for place, message in enumerate(messages)]


def _with_whole_arguments(message: Mapping[str, Any], where: str, notes: list[str]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    whole = []
    for place, call in enumerate(calls):
        if isinstance(call, Mapping) and call.get("type") == "custom" and isinstance(call.get("custom"), Mapping):
            custom = call["custom"]  # of a tool without a schema, whose input is one text
            arguments = {"input": custom.get("input")}
            call = {**call, "type": "function", "function": {"name": custom.get("name"), "arguments": arguments}}
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and _is_cut(function.get("arguments")):
            notes.append(f"{where}.tool_calls[{place}].function.arguments")
            call = {**call, "function": {**function, "arguments": to_json(function["arguments"])}}
        whole.append(call)
    return {**message, "tool_calls": whole}


def _is_cut(arguments: object) -> bool:
    """Whether arguments are text that is no JSON."""
    if not isinstance(arguments, str) or not arguments.strip():
        return False
    try:
        parse_json(arguments)
    except ValueError:
        return True
    return False


def with_written_calls(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages of a client that gives its tools in texts, as Qwen-Agent does: with calls and results as such.

    The assistant's text that ends with `<tool_call>` blocks has made these calls; the user's next message, if it is
    nothing but `<tool_response>` blocks and no more than there were calls, is their results. All else is text.
    """
    read: list[Mapping[str, Any]] = []
    open_calls = 0
    for message in messages:
        role, text = message.get("role"), _text(message.get("content"))
        calling = _calling(message, text) if role == "assistant" and text and not message.get("tool_calls") else None
        results = list(_blocks(text, "tool_response")) if role == "user" and text and open_calls else []
        if results and len(results) <= open_calls:
            read += [{"role": "tool", "content": result} for result in results]
        else:
            read.append(calling or message)
        open_calls = len(calling["tool_calls"]) if calling is not None else 0
    return read


def _text(content: Any) -> str | None:
    """The text of a content; None for one that holds other things."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else ():
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _calling(message: Mapping[str, Any], text: str) -> dict[str, Any] | None:
    """The message with the calls that its text ends with; None if there are none."""
    begins = text.find("<tool_call>\n")
    if begins < 0:
        return None
    try:
        calls = [call for block in _blocks(text[begins:], "tool_call") for call in parse_tool_calls(block)]
        functions = [{"type": "function", "function": {"name": name, "arguments": source}} for name, source in calls]
        calling = {**message, "content": text[:begins].removesuffix("\n"), "tool_calls": functions}
        check_conversation([calling])
    except (ValueError, MlxqwenError):
        return None
    return calling if calls else None


def _blocks(text: str, tag: str) -> Iterator[str]:
    """What stands in the blocks of a text that is nothing else; nothing if it is not."""
    opening, closing = f"<{tag}>\n", f"\n</{tag}>"
    found, at = [], 0
    while text.startswith(opening, at):
        end = text.find(closing, at + len(opening) - 1)
        if end < 0:
            return
        found.append(text[at + len(opening) : end])
        at = end + len(closing)
        if at == len(text):
            yield from found
            return
        if not text.startswith("\n", at):
            return
        at += 1
