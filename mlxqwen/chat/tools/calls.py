"""Calls of tools: a model's call → the text of its result, or of what went wrong."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxqwen.chat.tools.functions import read_arguments
from mlxqwen.chat.tools.schemas import find_problem
from mlxqwen.checks import check_integer
from mlxqwen.errors import MessagesError, one_line
from mlxqwen.files.json_file import json_kind, parse_json
from mlxqwen.text.messages import to_plain_json

__all__ = ["DEFAULT_RESULT_LIMIT", "call_tool"]

DEFAULT_RESULT_LIMIT = 16_000
MAX_ERROR = 400


def call_tool(
    functions: Mapping[str, Callable[..., Any]],
    schemas: Sequence[Mapping[str, Any]],
    call: Mapping[str, Any],
    *,
    limit: int = DEFAULT_RESULT_LIMIT,
) -> str:
    """Make a call, and return its result as text for the model.

    Only what stands in both `functions` and `schemas` is ever called, and only with arguments that fit the schema.

    Args:
        functions: callables by name.
        schemas: what the model was shown, from `tool_schema` or checked by `check_tool_schemas`; of several of one
            name a call means the first.
        call: `{"name": …, "arguments": …}`, or OpenAI's `{"function": {…}}` around it; the arguments are an object
            or its JSON text.
        limit: the most characters of a result that the model is to read.

    Returns:
        a result that is text as it is, any other as JSON; "Error: …", in one line, for a call that cannot be made, for
        an exception or `sys.exit`, and for a result that JSON cannot hold.

    Raises:
        OptionError: a limit below 1, a function that is no tool, or the called tool's schema is none: names the tool.
        KeyboardInterrupt and its like pass through. A tool has no time limit: only Ctrl-C ends it, so
            one that may hang has to bound itself.
    """
    limit = check_integer("limit", limit, 1)
    try:
        function, arguments = _prepare(functions, schemas, call)
    except MessagesError as problem:
        return _error(problem.problem)
    try:
        result = function(**arguments)
    except (Exception, SystemExit) as cause:
        return _error(f"{type(cause).__name__}: {_text_of(cause)}")
    try:
        return _bounded(result if isinstance(result, str) else _to_json(result), limit)
    except Exception:
        return _error(f"the tool gave a result of type {type(result).__name__}, which JSON cannot hold")


def _prepare(
    functions: Mapping[str, Callable[..., Any]], schemas: Sequence[Mapping[str, Any]], call: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    asked = call.get("function", call) if isinstance(call, Mapping) else None
    name = asked.get("name") if isinstance(asked, Mapping) else None
    if not isinstance(asked, Mapping) or not isinstance(name, str):
        raise MessagesError("found a call without the name of a tool")
    shown = {schema["function"]["name"]: schema["function"] for schema in reversed(schemas)}  # the first of a name
    offered = [known for known in functions if known in shown]
    if name not in offered:
        raise MessagesError(f"found no tool named {name[:64]!r}, expected one of: {', '.join(offered) or 'none'}")
    function = functions[name]
    arguments = _parse_arguments(asked.get("arguments", {}))
    taken = read_arguments(name, function)
    given = shown[name].get("parameters", {})
    if given != taken.schema and (problem := find_problem(arguments, given, name)):
        raise MessagesError(problem)
    try:
        return function, taken.convert(arguments)
    except MessagesError:
        raise
    except (Exception, SystemExit) as cause:  # a class in the arguments may refuse what it is made of
        raise MessagesError(f"arguments: {type(cause).__name__}: {_text_of(cause)}") from None


def _parse_arguments(arguments: object) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError as cause:
            raise MessagesError(f"arguments: not valid JSON: {cause}") from None
    if not isinstance(arguments, Mapping):
        raise MessagesError(f"arguments: found {json_kind(arguments)}, expected an object")
    plain: dict[str, Any] = to_plain_json(arguments, "arguments")
    return plain


def _to_json(result: object) -> str:
    if inspect.iscoroutine(result):
        result.close()
    return json.dumps(result, ensure_ascii=False, allow_nan=False)


def _bounded(text: str, limit: int) -> str:
    """`text` as Unicode that a tokenizer takes, its end left out beyond `limit` characters."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n[cut off: the first {limit:,} of {len(text):,} characters]"


def _error(text: str) -> str:
    return f"Error: {one_line(text, MAX_ERROR)}"


def _text_of(cause: Exception | SystemExit) -> str:
    try:
        return str(cause)
    except Exception:
        return "no message"
