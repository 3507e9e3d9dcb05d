"""Chat templates: a conversation → the text that a template makes of it, as Hugging Face transformers does."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mlxqwen.errors import MessagesError, TemplateError, one_line
from mlxqwen.files.json_file import parse_json
from mlxqwen.text.sandbox import render

__all__ = ["render_chat"]

_SPECIAL_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
_LONGEST_WORDS = 200
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    replacements: Mapping[str, str] | None = None,
) -> str:
    """Render a conversation.

    Arguments of calls that are the JSON text of an object, as in OpenAI's form, are given to the template as an object
    where it needs one.

    Args:
        source: the template.
        messages: as `mlxqwen.text.messages.prepare_messages` returns them.
        tools: as `mlxqwen.text.messages.prepare_tools` returns them.
        add_generation_prompt: passed to the template.
        continue_final_message: cut the text after the last message's content.
        variables: further variables of the template.
        replacements: texts in the template's own literals → what stands in their place.

    Raises:
        TemplateError: the template is broken, forbidden or too expensive.
        MessagesError: the template raises for a message without content, or drops or changes the last message's, so
            that it cannot be continued.
    """
    marker = f"continues-{secrets.token_hex(8)} " if continue_final_message else ""
    literals = tuple((replacements or {}).items())
    if any(message.get("tool_calls") for message in messages):
        with_objects = [_with_objects(message) for message in messages]
        if with_objects != list(messages) and _needs_objects(source, literals):
            messages = with_objects
    last = dict(messages[-1])
    final_content = last["content"]
    if continue_final_message:
        if final_content is None:
            raise MessagesError(
                f"messages[{len(messages) - 1}]: content: found none, expected the beginning of the answer",
                hint="Leave the message out, or give the text that the answer goes on with.",
            )
        last["content"] = final_content + marker

    def rendered(shown: Sequence[Mapping[str, Any]]) -> str:
        values = {"messages": shown, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        return render(source, {**values, **(variables or {})}, replacements=replacements)

    shown = [*messages[:-1], last]
    try:
        text = rendered(shown)
    except TemplateError as error:
        raise _for_lack_of_content(error, shown, rendered) from error
    return _cut_at(text, marker, final_content) if continue_final_message else text


def _for_lack_of_content(
    error: TemplateError, messages: Sequence[Mapping[str, Any]], rendered: Callable[[Sequence[Mapping[str, Any]]], str]
) -> MessagesError | TemplateError:
    """The error that names the first message without content, if the template raises for that alone; else `error`."""
    lacking = [i for i, message in enumerate(messages) if message.get("content", "") is None]
    if not lacking:
        return error
    try:
        rendered(
            [message if message.get("content", "") is not None else {**message, "content": ""} for message in messages]
        )
    except TemplateError:
        return error
    words = one_line(error.problem.removeprefix("chat template: "), _LONGEST_WORDS)
    return MessagesError(
        f"messages[{lacking[0]}]: content: found none, expected text: the chat template raises an error: {words}",
        hint='Give text; "" is an empty turn. Only an assistant that calls tools or thinks may lack content.',
    )


@lru_cache(maxsize=16)
def _needs_objects(source: str, literals: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template needs the arguments of a call as an object rather than as JSON text.

    It does if it renders an object, and not as it renders the object's JSON text: it walks through the object, or
    writes JSON itself. A template that prints an object as Python spells it was written for text.
    """

    def rendered(arguments: object) -> str | None:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "b", "name": "f", "tool_call_id": "abcdefghi"},
        ]
        variables = {**_SPECIAL_TOKENS, "messages": messages, "tools": [_TOOL], "add_generation_prompt": False}
        try:
            return render(source, variables, replacements=dict(literals))
        except TemplateError:
            return None

    as_object = rendered({"b": 1})
    return as_object is not None and as_object != rendered('{"b": 1}') and "{'b': 1}" not in as_object


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if isinstance(calls, list) else message


def _with_object(call: Any) -> Any:
    """A call, or its function, with arguments that are the JSON text of an object as that object."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    text = call.get("arguments")
    try:
        arguments = parse_json(text) if isinstance(text, str) else None
    except ValueError:
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _cut_at(text: str, marker: str, final_content: str) -> str:
    """`text` up to `marker`, without white space before it if the template stripped the blank after it."""
    cut = text.rfind(marker.strip())
    if cut < 0 or final_content.strip() not in text:
        raise MessagesError(
            "continue_final_message: the last message's content does not appear in the rendered conversation",
            hint="The chat template drops or changes it: such a message cannot be continued.",
        )
    kept = text[:cut]
    return kept if text.startswith(marker, cut) else kept.rstrip()
