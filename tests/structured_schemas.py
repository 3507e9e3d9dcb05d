"""JSON schemas that tests of structured output share: all that a schema for an answer usually holds."""

from __future__ import annotations

from typing import Any

NAME: dict[str, Any] = {"type": "string", "maxLength": 12}


def record(**properties: Any) -> dict[str, Any]:
    """An object that needs all of these."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TREE = {
    "$defs": {
        "node": record(
            value={"type": "integer", "minimum": 0, "maximum": 9},
            next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        )
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "integer": {"type": "integer"},
    "integer in a range": {"type": "integer", "minimum": -20, "exclusiveMaximum": 1000},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "text": NAME,
    "text of a length": {"type": "string", "minLength": 3, "maxLength": 8},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern within": {"type": "string", "pattern": "b", "maxLength": 10},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "unknown format": {"type": "string", "format": "file-path", "maxLength": 10},
    "enum": {"enum": ["red", "green", 3, None, {"a": [1, 2]}]},
    "unicode": {"enum": ["Straße", "日本語", '🙂 "quoted"\n']},
    "unicode keys": record(größe={"type": "integer"}, 名前=NAME),
    "const": {"const": {"kind": "fixed", "list": [1, "two"]}},
    "record": record(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "nested": record(outer=record(inner=record(leaf={"type": "boolean"}))),
    "optional": {"type": "object", "properties": {"a": NAME, "b": {"type": "integer"}}, "required": ["a"]},
    "open": {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": {"type": "integer"}},
    "array": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 4},
    "array of records": {"type": "array", "items": record(x={"type": "boolean"}), "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [NAME, {"type": "integer"}], "items": False, "minItems": 2},
    "anyOf": {"anyOf": [{"type": "integer"}, record(a=NAME), {"type": "array", "items": NAME, "maxItems": 2}]},
    "oneOf": {"oneOf": [record(kind={"const": "a"}, x=NAME), record(kind={"const": "b"}, y={"type": "integer"})]},
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"properties": {"b": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    "types": {"type": ["integer", "boolean", "null"]},
    "definitions": {
        "definitions": {"color": {"enum": ["red", "blue"]}},
        "type": "object",
        "properties": {"c": {"$ref": "#/definitions/color"}, "d": {"$ref": "#/definitions/color"}},
        "required": ["c", "d"],
    },
    "recursive": TREE,
    "property named as a keyword": record(format={"enum": ["file-path"]}, properties={"type": "boolean"}),
}
# Texts of these have no longest one: integers without a range, numbers, properties of any name, recursion.
ENDLESS = {
    "integer",
    "number",
    "unicode keys",
    "optional",
    "open",
    "tuple",
    "anyOf",
    "oneOf",
    "types",
    "definitions",
    "recursive",
}
