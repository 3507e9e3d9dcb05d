"""Whether a JSON value is what a schema asks for, for the part of JSON Schema that annotations need.

Written here rather than imported: nothing in this part refers to another place, matches a pattern or recurses without
end, so that no value can make a check expensive. A schema with any other keyword is refused, not half checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mlxqwen.errors import OptionError

__all__ = ["find_problem", "same_json"]

_CHECKED = {"type", "enum", "anyOf", "items", "prefixItems", "minItems", "maxItems"}
_CHECKED |= {"properties", "required", "additionalProperties"}
_ANNOTATIONS = {"title", "description", "default", "examples"}


def find_problem(value: Any, schema: Mapping[str, Any] | bool, where: str) -> str | None:
    """What is wrong with `value`, in words for whoever wrote it; None if nothing is.

    Raises:
        OptionError: a keyword that this version does not check.
    """
    if isinstance(schema, bool):
        return None if schema else f"{where}: no value is allowed here"
    if unknown := sorted(schema.keys() - _CHECKED - _ANNOTATIONS):
        raise OptionError(f"{where}: {unknown[0]}: arguments cannot be checked against this keyword of JSON Schema")
    wanted = _types(schema)
    if wanted and not any(_is_of_type(value, name) for name in wanted):
        return f"{where}: found {_shown(value)}, expected {' or '.join(wanted)}"
    if "enum" in schema and not any(same_json(value, allowed) for allowed in schema["enum"]):
        return f"{where}: found {_shown(value)}, expected one of {_shown(schema['enum'], 200)}"
    if "anyOf" in schema:
        problems = [find_problem(value, option, where) for option in schema["anyOf"]]
        if all(problems):
            return f"{where}: found {_shown(value)}, which none of the allowed forms fits"
    if isinstance(value, list):
        return _list_problem(value, schema, where)
    if isinstance(value, dict):
        return _object_problem(value, schema, where)
    return None


def same_json(first: Any, second: Any) -> bool:
    """Whether two JSON scalars are equal: 1 and 1.0 are, 1 and true are not."""
    return isinstance(first, bool) == isinstance(second, bool) and bool(first == second)


def _types(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("type", [])
    return [names] if isinstance(names, str) else list(names)


def _is_of_type(value: Any, name: str) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "integer": is_number and (isinstance(value, int) or value.is_integer()),
        "number": is_number and (isinstance(value, int) or math.isfinite(value)),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }[name]


def _list_problem(value: list[Any], schema: Mapping[str, Any], where: str) -> str | None:
    low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if not low <= len(value) <= high:
        expected = str(low) if low == high else f"from {low} to {high}"
        return f"{where}: found {len(value)} items, expected {expected}"
    first = schema.get("prefixItems", [])
    for i, item in enumerate(value):
        below = first[i] if i < len(first) else schema.get("items", True)
        if problem := find_problem(item, below, f"{where}[{i}]"):
            return problem
    return None


def _object_problem(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if missing := [name for name in schema.get("required", []) if name not in value]:
        return f"{where}: {missing[0]} is missing"
    for name, item in value.items():
        if name not in properties and others is False:
            known = f"only {', '.join(properties)}" if properties else "none"
            return f"{where}: found the unknown name {_shown(name)}, expected {known}"
        if problem := find_problem(item, properties.get(name, others), f"{where}.{name}"):
            return problem
    return None


def _shown(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
