"""`POST /v1/responses`: its fields and items → a chat completion."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlxqwen.errors import MessagesError
from mlxqwen.files.json_file import shown
from mlxqwen.server.bodies import Form, check_aside, form_of, unknown_fields
from mlxqwen.server.chat_fields import BiasField, ChatFields, Effort, Number
from mlxqwen.server.errors import ApiError
from mlxqwen.server.responses_store import ResponseStore
from mlxqwen.server.structured import missing_schema
from mlxqwen.server.summaries import read_summary

__all__ = [
    "TOOL_NAMES",
    "Input",
    "ResponsesFields",
    "as_chat",
    "input_items",
    "messages_of",
    "previous_messages",
    "with_ids",
]

TOOL_NAMES = {"tools[].function": "tools[]", "tools[]: function": "tools[]"}
"""What an error says of the parts of a tool in a chat completion → what responses call them."""

_TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_NOT_DONE = {
    "conversation": "previous_response_id goes on from a response",
    "prompt": "give instructions and input",
    "moderation": "",
}
_SUMMARY_BEGINS = "Summary of the conversation so far:"

Input = str | Annotated[list[dict[str, Any]], Field(max_length=100_000)]
"""What is put in: a text, or items."""


class Reasoning(Form):
    """`reasoning`."""

    effort: Effort | None = None
    summary: str | None = None


class TextOptions(Form):
    """`text`."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesFields(Form):
    """A response that is asked for."""

    aside: ClassVar[tuple[str, ...]] = (
        *("metadata", "user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prompt_cache_options", "max_tool_calls", "include", "stream_options", "context_management"),
    )

    model: Annotated[str, Field(max_length=512)] | None = None
    input: Input | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    logit_bias: BiasField | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    response_format: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    max_tool_calls: Any = None
    background: bool | None = None
    # Asked for, these are refused.
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None
    # Without effect: the answer is as right without a summary, and what is too long is told.
    context_management: Annotated[list[dict[str, Any]], Field(max_length=16)] | None = None


def input_items(given: Input | None) -> list[dict[str, Any]]:
    """What was put in, as items."""
    if given is None:
        return []
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return list(given)


def with_ids(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items, those without an id with one."""
    return [{**item, "id": item.get("id") or f"item_{os.urandom(12).hex()}"} for item in items]


def as_chat(fields: ResponsesFields, before: Sequence[Mapping[str, Any]], notes: list[str]) -> ChatFields:
    """The chat completion that these fields ask for; what is left out of them is added to `notes`.

    Args:
        before: messages of the responses that this one follows.

    Raises:
        ApiError, MessagesError: items that a text model does not read, or what is not done.
    """
    for name, way_out in _NOT_DONE.items():
        if getattr(fields, name):
            rest = f", but {way_out}" if way_out else ""
            raise ApiError(
                400,
                f"{name}: found one, expected none: it is not done here{rest}",
                code="unsupported_parameter",
                param=name,
            )
    if fields.background and fields.store is False:
        raise ApiError(
            400,
            "store: found false beside background, expected true: it is asked for once it is over",
            code="invalid_value",
            param="store",
        )
    notes += [*unknown_fields(fields), *(["context_management"] if fields.context_management else [])]
    instructions = [{"role": "system", "content": fields.instructions}] if fields.instructions else []
    messages = [*instructions, *before, *messages_of(input_items(fields.input), notes)]
    if len(messages) == len(instructions):
        raise ApiError(
            400, "input: is missing, expected text or items", code="missing_required_parameter", param="input"
        )
    tells = "message.output_text.logprobs" in (fields.include or ())
    chat: dict[str, Any] = {
        "messages": messages,
        "max_completion_tokens": fields.max_output_tokens,
        "tools": _tools(fields.tools or ()) or None,
        "tool_choice": _choice(fields.tool_choice),
        "reasoning_effort": None if fields.reasoning is None else fields.reasoning.effort,
        "response_format": _response_format(fields),
        "logprobs": True if tells or fields.top_logprobs else None,
        "top_logprobs": fields.top_logprobs,
    }
    names = (
        *("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed", "logit_bias"),
        *("parallel_tool_calls", "chat_template_kwargs", "cache_salt"),
    )
    return form_of({**chat, **{name: getattr(fields, name) for name in names}}, ChatFields)


def messages_of(items: Sequence[Mapping[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """Items as messages: what an assistant thought, said and called in a row is one message.

    Raises:
        ApiError, MessagesError: an item that is not what its type says, or that a text model does not read.
    """
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input[{place}]"
        if kind == "message":
            role = item.get("role")
            text = _text(item.get("content"), where)
            if role == "assistant":
                message = _assistants(messages, "tool_calls")
                message["content"] = (message.get("content") or "") + text
            else:
                messages.append({"role": role, "content": text})
        elif kind == "reasoning":
            thought = _text(item.get("content") or item.get("summary") or [], where)
            if thought:
                message = _assistants(messages, "content", "tool_calls")
                message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind in ("function_call", "custom_tool_call"):
            if not isinstance(item.get("name"), str) or not item["name"]:
                raise ApiError(
                    400,
                    f"{where}: name: found {shown(item.get('name'))}, expected that of the function that was called",
                    code="invalid_value",
                    param=f"{where}.name",
                )
            # The input of a custom tool, which has no schema, is one text.
            custom = {"input": item.get("input")} if kind == "custom_tool_call" else "{}"
            function = {"name": item["name"], "arguments": item.get("arguments") or custom}
            call = {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}
            message = _assistants(messages)
            message.setdefault("content", "")
            message.setdefault("tool_calls", []).append(call)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = _text(item.get("output"), where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "compaction":
            summary = read_summary(item.get("encrypted_content"), where)
            messages.append({"role": "assistant", "content": f"{_SUMMARY_BEGINS}\n\n{summary}"})
        else:
            notes.append(where)
    return messages


def _assistants(messages: list[dict[str, Any]], *without: str) -> dict[str, Any]:
    """The assistant's message that is going on, unless it has one of these parts already; else a new one."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or any(name in last for name in without):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_parts(content, where))


def _parts(parts: Any, where: str) -> Iterator[str]:
    if not isinstance(parts, list):
        raise MessagesError(f"{where}: content: found {shown(parts)}, expected text or a list of parts")
    for place, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else part
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in _TEXTS or not isinstance(text, str):
            raise MessagesError(
                f"{where}: content[{place}]: found {shown(kind)}, expected a part of text such as input_text",
                hint="Qwen3 reads text only: leave images, audio and files out.",
            )
        yield text


def _tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of a chat completion; of those that are no functions no more than that."""
    foreign = [tool for tool in tools if tool.get("type") != "function"]
    if foreign:
        check_aside("tools", foreign)
    return [_function(tool) if tool.get("type") == "function" else {"type": "custom"} for tool in tools]


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    own = tool.get("function")
    function = own if isinstance(own, Mapping) else {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": dict(function)}


def _choice(choice: str | dict[str, Any] | None) -> Any:
    """A choice of one function in the form of chat completions."""
    if isinstance(choice, dict) and choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(fields: ResponsesFields) -> dict[str, Any] | None:
    """`text.format`, or chat completions' own field, in the form of chat completions."""
    given = None if fields.text is None else fields.text.format
    if given is not None and fields.response_format is not None:
        raise ApiError(
            400,
            "response_format: found one beside text.format, expected one of them",
            code="invalid_value",
            param="response_format",
        )
    if given is None or given.get("type") != "json_schema":
        return given or fields.response_format
    if given.get("schema") is None:
        raise missing_schema("text.format", '{"type": "json_schema", "name": …, "schema": {…}}')
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def previous_messages(response_id: str | None, store: ResponseStore) -> list[dict[str, Any]]:
    """The messages of the response that another one follows. Raises `ApiError` if it is not kept."""
    if response_id is None:
        return []
    stored = store.find(response_id)
    if stored is None:
        found = "one that is on its way" if response_id in store.running else "one that is not kept"
        raise ApiError(
            400,
            f"previous_response_id: found {found}, expected the id of a response that is over",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return stored.messages
