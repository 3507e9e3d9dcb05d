"""JSON schemas made ready to be compiled: bounded in size, and narrowed where a schema leaves more open than is meant.

Each document that fits the narrowed schema fits the one that was given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import json_kind

__all__ = ["prepare_schema"]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 48
MAX_VALUES = 20_000
MAX_PROPERTIES = 1_000
MAX_OPTIONAL = 1_000_000
"""Of the squares of the numbers of optional properties: any of them may be left out, which takes as many rules."""
LARGEST_INTEGER = 2**53 - 1
"""Beyond, JSON's readers differ in what an integer is."""

_ANY_NAME = "mlxqwen-any-value"
_ANY: dict[str, Any] = {"$ref": f"#/$defs/{_ANY_NAME}"}
_ANY_VALUE = {
    "anyOf": [
        {"type": "string"},
        {"type": "number", "minimum": -LARGEST_INTEGER, "maximum": LARGEST_INTEGER},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "array", "items": _ANY},
        {"type": "object", "additionalProperties": _ANY},
    ]
}
"""Of JSON; its numbers can be read."""
_OF_NAMES = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_DATA = {"const", "enum", "default", "examples", "example", "required", "x-guidance"}
_FORMATS = {"duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
# What does not say what an object may hold; beside these, a schema of properties is whole.
_NOTES = {
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("$schema", "$id", "$anchor", "$defs", "definitions", "discriminator", "nullable"),
}
_OF_CLOSED = _NOTES | {"type", "properties", "required"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum"}


def _date_patterns() -> dict[str, str]:
    """Patterns of RFC 3339's dates and times: days that there are, no leap seconds, at most six digits of a second."""
    day_31 = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    day_30 = "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    year = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
    fourth = "(?:0[48]|[2468][048]|[13579][26])"
    date = f"(?:{year}-(?:{day_31}|{day_30}|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{{2}}{fourth}|{fourth}00)-02-29)"
    clock = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
    time = f"{clock}:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{clock})"
    return {"date": f"^{date}$", "time": f"^{time}$", "date-time": f"^{date}T{time}$"}


_DATE_PATTERNS = _date_patterns()


def prepare_schema(schema: object, where: str) -> dict[str, Any]:
    """A copy of a schema of plain JSON values, ready to be compiled.

    - The formats of dates and times become patterns of those that exist. Formats that are not enforced are left out, as
      JSON Schema has formats be notes.
    - Where no part of the schema combines several, objects that list their properties, and say nothing of others, have
      no others; and numbers without bounds are at most 2⁵³ - 1 in size, also those in values that may be anything.
    - An `x-guidance` is left out: it would unbind white space.

    Args:
        where: what errors name.

    Raises:
        OptionError: no schema, or one that is too large or too deep.
    """
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise OptionError(f"{where}: found {json_kind(schema)}, expected a JSON schema")
    _check_size(schema, where)
    _, *below = _subschemas(schema)
    definitions = schema.get("$defs", {})
    narrows = isinstance(definitions, dict) and not _combines(schema)
    narrows = narrows and not any(_combines(one) or "$id" in one for one in below)
    prepared: dict[str, Any] = _prepared(schema, narrows=narrows)
    if _ANY["$ref"] in json.dumps(prepared):
        prepared["$defs"] = {**prepared.get("$defs", {}), _ANY_NAME: _ANY_VALUE}
    return prepared


def _check_size(schema: Mapping[str, Any], where: str) -> None:
    level: list[Any] = [schema]
    depth = values = 0
    while level:
        depth += 1
        values += len(level)
        if depth > MAX_DEPTH or values > MAX_VALUES:
            found = f"more than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
            raise OptionError(f"{where}: found a schema of {found}, expected a smaller one")
        nested = (value for value in level if isinstance(value, dict | list))
        level = [inner for value in nested for inner in (value.values() if isinstance(value, dict) else value)]
    if (size := len(json.dumps(schema))) > MAX_BYTES:
        raise OptionError(f"{where}: found a schema of {size:,} bytes, expected at most {MAX_BYTES:,}")
    optional = 0
    for one in _subschemas(schema):
        properties, required = one.get("properties"), one.get("required")
        count = len(properties) if isinstance(properties, dict) else 0
        if count > MAX_PROPERTIES:
            raise OptionError(f"{where}: found {count:,} properties in an object, expected at most {MAX_PROPERTIES:,}")
        optional += max(0, count - (len(required) if isinstance(required, list) else 0)) ** 2
    if optional > MAX_OPTIONAL:
        raise OptionError(
            f"{where}: found too many optional properties, expected fewer",
            hint="Require them, or let fewer objects have them.",
        )


def _subschemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema and all below it."""
    waiting: list[Any] = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            yield one
            for key, value in one.items():
                if key in _OF_NAMES and isinstance(value, dict):
                    waiting += value.values()
                elif key not in _DATA:
                    waiting.append(value)


def _combines(schema: Mapping[str, Any]) -> bool:
    """Whether a value is judged by several schemas at once, of which one must not be narrowed apart from the others."""
    keys = schema.keys() - _NOTES
    return bool(keys & {"allOf", "oneOf"}) or (len(keys) > 1 and bool(keys & {"$ref", "anyOf"}))


def _prepared(value: Any, *, narrows: bool) -> Any:
    if isinstance(value, list):
        return [_prepared(item, narrows=narrows) for item in value]
    if not isinstance(value, dict):
        return value
    result: dict[str, Any] = {}
    dated = None
    for key, inner in value.items():
        if key == "format" and isinstance(inner, str) and inner in _DATE_PATTERNS:
            dated = _DATE_PATTERNS[inner]
            continue
        if key == "x-guidance" or (key == "format" and isinstance(inner, str) and inner not in _FORMATS):
            continue
        if key in _OF_NAMES and isinstance(inner, dict):
            result[key] = {name: _prepared(one, narrows=narrows) for name, one in inner.items()}
        else:
            result[key] = inner if key in _DATA else _prepared(inner, narrows=narrows)
    if dated is not None:
        if "pattern" in result:
            result["allOf"] = [*result.get("allOf", []), {"pattern": dated}]
        else:
            result["pattern"] = dated
    return _narrowed(result) if narrows else result


def _narrowed(schema: dict[str, Any]) -> dict[str, Any]:
    if not schema.keys() - _NOTES:
        return {**schema, **_ANY}
    properties, required = schema.get("properties"), schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list) and schema.keys() <= _OF_CLOSED:
        lists_all = all(isinstance(name, str) and name in properties for name in required)
        schema.update({"additionalProperties": False} if lists_all else {})
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if not schema.keys() & {"const", "enum"}:
        for container, others in (("object", "additionalProperties"), ("array", "items")):
            if container in kinds and schema.get(others, True) is True:
                schema[others] = dict(_ANY)
    if ("integer" in kinds or "number" in kinds) and not schema.keys() & _BOUNDS:
        schema.update(minimum=-LARGEST_INTEGER, maximum=LARGEST_INTEGER)
    return schema
