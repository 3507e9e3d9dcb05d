"""Schemas of tools as users give them: checked before a model is shown them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxqwen.chat.tools.functions import NAME_RULE, is_tool_name
from mlxqwen.errors import MessagesError
from mlxqwen.text.messages import prepare_tools

__all__ = ["check_tool_schemas"]

_TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}
_COMBINING = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "dependentSchemas", "if"}


def check_tool_schemas(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of tool schemas, each in the form `{"type": "function", "function": {"name": …}}`.

    Bare functions are wrapped, keys of None in a function dropped. `parameters` must be a JSON schema of an object; no
    reference leaves the schema, and nothing is fetched.

    Raises:
        MessagesError: names the tool, the place in it and what is wrong.
    """
    first_place: dict[str, int] = {}
    result = []
    for i, tool in enumerate(prepare_tools(tools) or []):
        function = _check_function(tool, f"tools[{i}]")
        name = function["name"]
        if name in first_place:
            raise MessagesError(f"tools[{i}]: name: {name!r} is already that of tools[{first_place[name]}]")
        first_place[name] = i
        result.append({"type": "function", "function": function})
    return result


def _check_function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type", "function")
    if kind != "function":
        raise _wrong(f"{where}: type", kind, "'function'")
    if "function" not in tool:
        function = {key: value for key, value in tool.items() if key != "type"}
    else:
        where, function = f"{where}: function", tool["function"]
    if not isinstance(function, dict):
        raise _wrong(where, function, "an object")
    function = {key: value for key, value in function.items() if value is not None}
    if not is_tool_name(function.get("name")):
        raise _wrong(f"{where}: name", function.get("name"), NAME_RULE)
    if not isinstance(function.get("description", ""), str):
        raise _wrong(f"{where}: description", function["description"], "text")
    if "parameters" in function:
        _check_parameters(function["parameters"], f"{where}: parameters")
    return function


def _check_parameters(schema: object, where: str) -> None:
    if not isinstance(schema, dict) or schema.get("type") != "object":
        found = schema.get("type") if isinstance(schema, dict) else schema
        raise _wrong(f"{where}: type" if isinstance(schema, dict) else where, found, "the schema of an 'object'")
    _check_schema(schema, where)
    if not _COMBINING & schema.keys():
        for name in schema.get("required", []):
            if name not in schema.get("properties", {}):
                raise MessagesError(f"{where}: required: found {name!r}, which properties does not have")


def _check_schema(schema: object, where: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _wrong(where, schema, "a JSON schema")
    for keyword, value in schema.items():
        if check := _CHECKS.get(keyword):
            check(value, f"{where}.{keyword}")


def _check_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise _wrong(where, value, "text")


def _check_reference(value: object, where: str) -> None:
    if not isinstance(value, str) or not value.startswith("#"):
        raise _wrong(where, value, "a reference within the schema, #/…: nothing is fetched")


def _check_type(value: object, where: str) -> None:
    names = value if isinstance(value, list) else [value]
    known = bool(names) and all(isinstance(name, str) and name in _TYPES for name in names)
    if not known or len(set(names)) != len(names):
        raise _wrong(where, value, f"one or more of {', '.join(sorted(_TYPES))}")


def _check_names(value: object, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _wrong(where, value, "a list of names")
    if len(set(value)) != len(value):
        raise _wrong(where, value, "each name once")


def _check_number(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(where, value, "a number")


def _check_count(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(where, value, "a whole number, 0 or more")


def _check_values(value: object, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise _wrong(where, value, "a list of values")


def _check_by_name(value: object, where: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object of JSON schemas")
    for name, schema in value.items():
        _check_schema(schema, f"{where}.{name}")


def _check_schemas(value: object, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise _wrong(where, value, "a list of JSON schemas")
    for i, schema in enumerate(value):
        _check_schema(schema, f"{where}[{i}]")


def _check_items(value: object, where: str) -> None:
    # Older drafts write a list here for what is now `prefixItems`.
    (_check_schemas if isinstance(value, list) else _check_schema)(value, where)


def _wrong(where: str, found: object, expected: str) -> MessagesError:
    return MessagesError(f"{where}: found {found!r:.80}, expected {expected}")


_CHECKS: dict[str, Callable[[object, str], None]] = {
    "type": _check_type,
    "enum": _check_values,
    "required": _check_names,
    "items": _check_items,
    **dict.fromkeys(("title", "description", "pattern", "format", "$comment"), _check_text),
    **dict.fromkeys(("$ref", "$dynamicRef"), _check_reference),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), _check_by_name),
    **dict.fromkeys(("anyOf", "allOf", "oneOf", "prefixItems"), _check_schemas),
    **dict.fromkeys(("additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"), _check_schema),
    **dict.fromkeys(("minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum"), _check_number),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _check_count),
    **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), _check_count),
}
