"""`POST /v1/messages`: Anthropic's fields → those of a chat completion."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import Field

from mlxqwen.errors import MessagesError
from mlxqwen.files.json_file import shown
from mlxqwen.server.bodies import Form, check_aside, form_of, unknown_fields
from mlxqwen.server.chat_fields import ChatFields, Effort, Number
from mlxqwen.server.context_edits import ContextManagement, Messages, apply_edits
from mlxqwen.server.errors import ApiError
from mlxqwen.server.histories import kept_instructions
from mlxqwen.server.structured import missing_schema

__all__ = ["TOOL_NAMES", "CountFields", "MessagesFields", "as_chat", "edited"]

TOOL_NAMES = {
    "tools[].function.parameters": "tools[].input_schema",
    "tools[].function": "tools[]",
    "tools[]: function": "tools[]",
}
"""What an error says of the parts of a tool in a chat completion → what Anthropic calls them."""

_WITHOUT_TEXT = ("redacted_thinking", "server_tool_use", "web_search_tool_result", "mcp_tool_use", "mcp_tool_result")
_NOT_DONE = {
    "mcp_servers": "",
    "container": "",
    "compaction": "",
    "thread": ": give the whole conversation as messages",
}

Content = str | list[dict[str, Any]]
_CountT = TypeVar("_CountT", bound="CountFields")


class Thinking(Form):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class AnthropicMessage(Form):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Content


class AnthropicChoice(Form):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountFields(Form):
    """What `POST /v1/messages/count_tokens` counts."""

    aside: ClassVar[tuple[str, ...]] = ("cache_control",)

    model: Annotated[str, Field(max_length=512)] | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=100_000)]
    system: Content | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    cache_control: Any = None
    context_management: ContextManagement | None = None


class MessagesFields(CountFields):
    """A message to be answered."""

    aside: ClassVar[tuple[str, ...]] = ("metadata", "service_tier", "cache_control")

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    temperature: Annotated[Number, Field(ge=0.0, le=1.0)] | None = None
    top_p: Number | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[str], Field(max_length=64)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Any = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    # Asked for, these are refused.
    mcp_servers: Any = None
    container: Any = None
    compaction: Any = None
    thread: Any = None


def edited(
    fields: _CountT, count: Callable[[_CountT], int], notes: list[str]
) -> tuple[_CountT, list[dict[str, Any]] | None]:
    """The fields with the conversation as `context_management` leaves it, and what was applied; None if none is asked.

    Args:
        fields: the request's.
        count: how many tokens the prompt of such fields has.
        notes: what is left out of the request.
    """
    given = fields.context_management
    if given is None:
        return fields, None

    def with_messages(messages: Messages) -> _CountT:
        pairs = zip(fields.messages, messages, strict=True)  # no edit takes a message away
        made = [before.model_copy(update={"content": content}) for before, (_, content) in pairs]
        return fields.model_copy(update={"messages": made})

    talk = [(message.role, message.content) for message in fields.messages]
    messages, applied = apply_edits(given, talk, lambda some: count(with_messages(some)), notes)
    return with_messages(messages) if applied else fields, applied


def as_chat(fields: CountFields, notes: list[str]) -> ChatFields:
    """The chat completion that these fields ask for; what is left out of them is added to `notes`.

    Without `thinking` the model does not think, as with Anthropic.

    Raises:
        ApiError, MessagesError: content that a text model does not read, or what is not done.
    """
    notes += unknown_fields(fields)
    thinking, choice = fields.thinking, fields.tool_choice
    thinks = thinking is not None and thinking.type != "disabled"
    chat: dict[str, Any] = {
        "messages": [*_system(fields.system), *_messages(fields.messages, notes)],
        "tools": _tools(fields.tools or ()) or None,
        "chat_template_kwargs": {"enable_thinking": thinks},
        "thinking_budget": thinking.budget_tokens if thinking is not None and thinks else None,
    }
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        chat["tool_choice"] = {"auto": "auto", "none": "none", "any": "required", "tool": named}[choice.type]
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if isinstance(fields, MessagesFields):
        for name, way_out in _NOT_DONE.items():
            if getattr(fields, name):
                raise ApiError(400, f"{name}: found some, expected none: that is not done here{way_out}", param=name)
        for name in ("max_tokens", "temperature", "top_p", "top_k"):
            chat[name] = getattr(fields, name)
        chat["stop"] = fields.stop_sequences
        effort = (fields.output_config or {}).get("effort")
        if isinstance(effort, str) and effort in get_args(Effort):
            chat["reasoning_effort"] = effort if thinks else None
        elif effort is not None:
            notes.append("output_config.effort")
        form = fields.output_format or (fields.output_config or {}).get("format")
        chat["response_format"] = _response_format(
            form, "output_format" if fields.output_format else "output_config.format"
        )
    return form_of(chat, ChatFields)


def _response_format(given: object, where: str) -> dict[str, Any] | None:
    if not isinstance(given, Mapping):
        return None
    if given.get("schema") is None:
        raise missing_schema(where, '{"type": "json_schema", "schema": {…}}')
    return {"type": "json_schema", "json_schema": {"name": "output", "strict": True, "schema": given["schema"]}}


def _system(system: Content | None) -> Iterator[dict[str, Any]]:
    """The system message."""
    if system is None:
        return
    texts = [system] if isinstance(system, str) else list(_texts(system, "system"))
    kept = [text for text in map(kept_instructions, texts) if text]
    if kept:
        yield {"role": "system", "content": "\n\n".join(kept) if len(kept) > 1 else kept[0]}


def _messages(messages: Sequence[AnthropicMessage], notes: list[str]) -> Iterator[dict[str, Any]]:
    for place, message in enumerate(messages):
        where = f"messages[{place}].content"
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield _assistant(message.content, where, notes)
        else:
            results = [block for block in message.content if block.get("type") == "tool_result"]
            yield from (_result(block, where) for block in results)
            rest = [block for block in message.content if block.get("type") != "tool_result"]
            if rest or not results:
                yield {"role": message.role, "content": "".join(_texts(rest, where))}


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str, notes: list[str]) -> dict[str, Any]:
    thoughts: list[str] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            function = {
                "name": block.get("name"),
                "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False),
            }
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind in _WITHOUT_TEXT:
            notes.append(f"{where}[{place}]")
        else:
            texts += _texts([block], f"{where}[{place}]")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    text = content if isinstance(content, str) else "".join(_texts(content or (), where))
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _texts(blocks: Any, where: str) -> Iterator[str]:
    for place, block in enumerate(blocks if isinstance(blocks, list | tuple) else [blocks]):
        text = block.get("text") if isinstance(block, Mapping) and block.get("type") == "text" else None
        if not isinstance(text, str):
            found = block.get("type") if isinstance(block, Mapping) else block
            raise MessagesError(
                f"{where}[{place}]: found {shown(found)}, expected a text block",
                hint="Qwen3 reads text only: leave images and documents out.",
            )
        yield text


def _tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of a chat completion; of those that Anthropic's servers know no more than the type."""
    for place, tool in enumerate(tools):
        _refuse_openais(tool, f"tools[{place}]")
    foreign = [tool for tool in tools if tool.get("type", "custom") != "custom"]
    if foreign:
        check_aside("tools", foreign)
    return [_function(tool) if tool.get("type", "custom") == "custom" else {"type": "custom"} for tool in tools]


def _refuse_openais(tool: Mapping[str, Any], where: str) -> None:
    """Raise `ApiError` for a tool as OpenAI's chat completions or responses have it, whose function would be lost."""
    kind = tool.get("type", "custom")
    is_bare = kind == "custom" and tool.get("input_schema") is None and ("function" in tool or "parameters" in tool)
    if kind == "function" or is_bare:
        parts = [name for name in ("function", "parameters") if name in tool]
        found = f"OpenAI's form (type {shown(kind)})" if kind == "function" else f"OpenAI's form ({parts[0]})"
        expected = 'Anthropic\'s: {"name": …, "description": …, "input_schema": {…}}'
        raise ApiError(400, f"{where}: found {found}, expected {expected}", code="invalid_value", param=where)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("input_schema")
    function = {"name": tool.get("name"), "parameters": {"type": "object"} if schema in (None, {}) else schema}
    if tool.get("description"):
        function["description"] = tool["description"]
    if tool.get("strict") is True:
        function["strict"] = True
    return {"type": "function", "function": function}
