"""One conversation as a JSON value: its messages, and the tools that may be called in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from json import JSONDecodeError
from typing import Any

from mlxqwen.chat.turns import check_conversation
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import json_kind, parse_json

__all__ = [
    "CONVERSATION_FORMAT",
    "MessagesWithTools",
    "check_keys",
    "located",
    "parse_conversation",
    "parse_json_text",
    "parse_tools",
]

CONVERSATION_FORMAT = "mlxqwen-conversation-1"  # of files that `Conversation.save` writes

_FORM = 'A conversation is a list such as [{"role": "user", "content": "Hello"}], or {"messages": […], "tools": […]}.'


@dataclass(frozen=True, slots=True)
class MessagesWithTools:
    """Checked messages, and tools or None."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    def with_system(self, text: str | None) -> MessagesWithTools:
        """The same with a system message in front, if `text` is not None. Raises `OptionError` if it has one."""
        if text is None:
            return self
        if self.messages and self.messages[0]["role"] in ("system", "developer"):
            raise OptionError(
                "messages[0]: found a system message beside the one given apart, expected one of them",
                hint="Leave out --system, or the message.",
            )
        return replace(self, messages=({"role": "system", "content": text}, *self.messages))

    def with_tools(self, tools: tuple[Mapping[str, Any], ...]) -> MessagesWithTools:
        """The same with `tools`. Raises `OptionError` if it has tools."""
        if self.tools is not None:
            raise OptionError(
                "tools: found beside the messages and in a file of their own, expected one of them",
                hint="Leave out --tools, or the key.",
            )
        return replace(self, tools=tools)

    def with_user(self, text: str | None) -> MessagesWithTools:
        """The same with a user's message at the end, if `text` is not None."""
        return self if text is None else replace(self, messages=(*self.messages, {"role": "user", "content": text}))


def parse_conversation(text: str, source: str) -> MessagesWithTools:
    """The conversation that a JSON text holds: a list of messages, or an object with `messages` and perhaps `tools`.

    Of the options of a saved conversation, only the tools are used.

    Args:
        source: where the text is from, for errors.

    Raises:
        OptionError: it is no JSON, or no sound conversation.
    """
    with located(source):
        value = parse_json_text(text, hint=_FORM)
        if isinstance(value, list):
            return conversation_of({"messages": value})
        if not isinstance(value, dict):
            raise OptionError(f"found {json_kind(value)}, expected a list or an object", hint=_FORM)
        if "format" in value:
            return conversation_of(_saved(value))
        check_keys(value, {"messages", "tools"}, hint=_FORM)
        if "messages" not in value:
            raise OptionError("found no 'messages', expected a list of them", hint=_FORM)
        return conversation_of(value)


def _saved(value: Mapping[str, Any]) -> dict[str, Any]:
    """Messages and tools of what `Conversation.save` wrote."""
    if value["format"] != CONVERSATION_FORMAT:
        raise OptionError(f"format: found {value['format']!r:.80}, expected {CONVERSATION_FORMAT!r}", hint=_FORM)
    check_keys(value, {"format", "messages", "options"}, hint=_FORM)
    options = value.get("options", {})
    if not isinstance(options, dict):
        raise OptionError(f"options: found {json_kind(options)}, expected an object", hint=_FORM)
    return {"messages": value.get("messages"), "tools": options.get("tools")}


def conversation_of(value: Mapping[str, Any]) -> MessagesWithTools:
    """The checked `messages` and `tools` of an object; other keys play no part."""
    messages: Any = value.get("messages")  # what is no list, the check refuses
    check_conversation(messages)
    tools = value.get("tools")
    return MessagesWithTools(tuple(messages), None if tools is None else _checked(tools))


def parse_tools(text: str, source: str) -> tuple[Mapping[str, Any], ...]:
    """The function schemas that a JSON text holds, in a list; see `check_tool_schemas`. Raises `OptionError`."""
    hint = 'Tools are a list such as [{"name": "clock", "description": "Tells the time.", "parameters": {…}}].'
    with located(source):
        tools = parse_json_text(text, hint=hint)
        if not isinstance(tools, list) or not tools:
            found = json_kind(tools) if tools != [] else "an empty list"
            raise OptionError(f"found {found}, expected a list of function schemas", hint=hint)
        return _checked(tools)


def _checked(tools: Any) -> tuple[Mapping[str, Any], ...]:
    from mlxqwen.chat.tools import check_tool_schemas  # of no use without tools

    return tuple(check_tool_schemas(tools))


def parse_json_text(text: str, *, hint: str) -> Any:
    """The strict JSON value of a text. Raises `OptionError`."""
    if not text.strip():
        raise OptionError("found no text, expected JSON", hint=hint)
    try:
        return parse_json(text)
    except JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise OptionError(f"not valid JSON at {where}: {error.msg}", hint=hint) from None
    except ValueError as error:
        raise OptionError(str(error), hint=hint) from None


def check_keys(value: Mapping[str, Any], known: Collection[str], *, hint: str) -> None:
    """Check that all keys are known. Raises `OptionError`."""
    for key in value:
        if key not in known:
            raise OptionError(f"found {key!r}, expected {', '.join(sorted(known))}", hint=hint)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Let an `OptionError` say where its value is."""
    try:
        yield
    except OptionError as error:
        raise OptionError(f"{where}: {error.problem}", hint=error.hint) from None
