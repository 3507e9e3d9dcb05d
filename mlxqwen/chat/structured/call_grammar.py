"""The grammar of calls of tools, in the form that Qwen3 writes them in."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mlxqwen.chat.structured.grammar import lark_text, with_options
from mlxqwen.chat.structured.json_schema import prepare_schema
from mlxqwen.errors import OptionError
from mlxqwen.text.messages import to_plain_json

__all__ = ["MAX_CONSTRAINED_TOOLS", "arguments_schema", "call_grammar"]

MAX_CONSTRAINED_TOOLS = 512
_ANY_ARGUMENTS = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    tags: tuple[int | None, int | None],
    *,
    most_one: bool,
    open_arguments: Collection[int] = (),
) -> str:
    """The Lark grammar of one or more calls of these tools.

    Args:
        tools: in OpenAI's form.
        tags: the tokens `<tool_call>` and `</tool_call>`; None for one that text spells.
        most_one: whether there is one call only.
        open_arguments: places of tools whose arguments are any object.

    Raises:
        OptionError: too many tools, one without a name, or parameters that are no schema or too large.
    """
    if len(tools) > MAX_CONSTRAINED_TOOLS:
        raise OptionError(
            f"tools: found {len(tools):,}, expected at most {MAX_CONSTRAINED_TOOLS} that calls are kept to"
        )
    opening, closing = (_tag(token, text) for token, text in zip(tags, ("<tool_call>", "</tool_call>"), strict=True))
    rules = [
        "start: call" if most_one else r'start: call ("\n" call)*',
        rf'call: {opening} "\n" ({" | ".join(f"call_{n}" for n in range(len(tools)))}) "\n" {closing}',
    ]
    for n, tool in enumerate(tools):
        function = tool["function"]
        name = function.get("name")
        if not isinstance(name, str):
            raise OptionError('tools: found one without a name, expected {"function": {"name": …}}')
        front = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
        given = {**function, "parameters": _ANY_ARGUMENTS} if n in open_arguments else function
        arguments = arguments_schema(given)
        rules.append(f'call_{n}: {lark_text(front)} arguments_{n} "}}"')
        rules.append(f"arguments_{n}: %json {arguments}")
    return "\n".join(rules) + "\n"


def arguments_schema(function: Mapping[str, Any]) -> str:
    """The JSON text of the schema for a tool's arguments. Raises `OptionError` for what is none, or is too large."""
    parameters = function.get("parameters")
    where = f"tool {function.get('name')!r:.80}: parameters"
    schema = prepare_schema(_NO_ARGUMENTS if parameters is None else to_plain_json(parameters, where), where)
    if not schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
        schema["type"] = "object"  # arguments are nothing else
    return json.dumps(with_options(schema))


def _tag(token: int | None, text: str) -> str:
    return lark_text(text) if token is None else f"<[{token}]>"
