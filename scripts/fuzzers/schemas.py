"""Schemas of tools: those of any annotation are valid; those of strangers end in a verdict, or in an error of ours."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Literal, Union

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from mlxqwen.chat.tools import check_tool_schemas, tool_schema
from mlxqwen.chat.tools.schemas import find_problem
from mlxqwen.errors import MlxqwenError

_PLAIN: list[Any] = [int, float, str, bool, bytes, list, tuple, dict, set, Any, None, Literal["a", 1], Literal[None]]
_KEYWORDS = [
    *(
        "type",
        "properties",
        "items",
        "required",
        "enum",
        "anyOf",
        "oneOf",
        "not",
        "$ref",
        "minimum",
        "pattern",
        "const",
    ),
    *("additionalProperties", "$schema", "default", "uniqueItems", "if", "then", "contains", "format", "$defs"),
]
_VALUES: list[Any] = [
    *("object", "string", "int", "#", "#/properties/a", "http://json-schema.org/draft-04/schema#", "("),
    *(None, True, 0, -1, 1e308, [], ["a"], ["string", "null"], {}),
]


def make_annotation(draw: random.Random, depth: int = 3) -> Any:
    """A random annotation of a parameter."""
    if depth == 0 or draw.random() < 0.3:
        return draw.choice(_PLAIN)
    inner: Callable[[], Any] = lambda: make_annotation(draw, depth - 1)  # noqa: E731
    kind = draw.randrange(6)
    if kind == 0:
        return list[inner()]  # type: ignore[misc]
    if kind == 1:
        return dict[str, inner()]  # type: ignore[misc]
    if kind == 2:
        return tuple[inner(), inner()]  # type: ignore[misc]
    if kind == 3:
        return Union[inner(), None]  # noqa: UP007
    return Union[tuple(inner() for _ in range(draw.randrange(2, 5)))]  # noqa: UP007


def make_schema(draw: random.Random, depth: int = 3) -> Any:
    """A random value in a schema's place."""
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(_VALUES)
    schema: dict[str, Any] = {}
    for keyword in draw.choices(_KEYWORDS, k=draw.randrange(4)):
        value = make_schema(draw, depth - 1)
        schema[keyword] = {"a": value} if keyword in ("properties", "$defs") and draw.random() < 0.9 else value
        if keyword in ("anyOf", "oneOf") and draw.random() < 0.9:
            schema[keyword] = [value, make_schema(draw, depth - 1)]
    return schema


def check(seed: int) -> str | None:
    """What broke: a schema that is none, or an error that is none of ours. None if nothing."""
    draw = random.Random(seed)
    if seed % 2:
        annotation = make_annotation(draw)

        def tool(a: Any) -> None:
            """Does something."""

        tool.__annotations__ = {"a": annotation}
        try:
            schema = tool_schema("tool", tool)["function"]["parameters"]
            Draft202012Validator.check_schema(schema)
        except MlxqwenError:
            return None
        except SchemaError as error:
            return f"{annotation}: {error.message}"
        return None
    schema = make_schema(draw)
    try:
        check_tool_schemas([{"name": "tool", "parameters": schema}])
        find_problem({"a": draw.choice([1, "b", None, [1, 1], {"a": {}}])}, schema, "tool")
    except MlxqwenError:
        return None
    except Exception as error:
        return f"{json.dumps(schema)}: {error!r}"
    return None
