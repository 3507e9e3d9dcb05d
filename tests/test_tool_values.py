"""Values of a call, against jsonschema: what fits reaches the function as its annotation asks, all else is told."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from mlxqwen.chat.tools.schemas import find_problem
from tests.tool_functions import (
    ANNOTATIONS,
    JSON_VALUES,
    Color,
    Explosive,
    Level,
    Node,
    Place,
    Point,
    Positive,
    Schema,
    converted,
    value_schema,
    values,
)


def _fitting(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema of ours allows, written from JSON Schema's rules alone."""
    if schema is True or not schema.keys() - {"description", "default"}:
        return JSON_VALUES
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if "anyOf" in schema:
        return st.one_of([_fitting(option) for option in schema["anyOf"]])
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_fitting_type(name, schema) for name in names])


def _fitting_type(name: str, schema: Schema) -> st.SearchStrategy[Any]:
    if name == "array":
        if "prefixItems" in schema:
            return st.tuples(*map(_fitting, schema["prefixItems"])).map(list)
        return st.just([]) if schema.get("maxItems") == 0 else st.lists(_fitting(schema.get("items", True)), max_size=3)
    if name == "object":
        if schema.get("additionalProperties") is not False:
            return st.dictionaries(st.sampled_from("ab"), _fitting(schema["additionalProperties"]), max_size=2)
        members = {key: _fitting(member) for key, member in schema["properties"].items()}
        required = {key: members.pop(key) for key in schema.get("required", [])}
        return st.fixed_dictionaries(required, optional=members)
    return {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(-3, 3) | st.just(2.0),
        "number": st.floats(-3, 3) | st.integers(-3, 3),
        "string": st.text(max_size=3),
    }[name]


@settings(max_examples=120, deadline=None)
@given(data=st.data(), annotation=ANNOTATIONS)
def test_values_are_judged_as_jsonschema_judges_them(data: st.DataObject, annotation: Any) -> None:
    """`parameters` checks each schema against the meta-schema."""
    schema = value_schema(annotation)
    validator = jsonschema.Draft202012Validator(schema)
    for value in (data.draw(JSON_VALUES), data.draw(_fitting(schema))):
        found, problem = converted(annotation, value), find_problem({"value": value}, values(value=schema), "f")
        assert (isinstance(found, str) and found.startswith("Error")) != validator.is_valid(value)
        assert (problem is None) == validator.is_valid(value)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), annotation=ANNOTATIONS)
def test_every_value_that_fits_reaches_the_function(data: st.DataObject, annotation: Any) -> None:
    value = data.draw(_fitting(value_schema(annotation)))
    found = converted(annotation, value)
    assert not (isinstance(found, str) and found.startswith("Error"))
    if value_schema(annotation).get("type") == "integer":
        assert type(found) in (int, Level)
    if value_schema(annotation).get("type") == "number":
        assert type(found) is float


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (int, 3.0, 3),
        (float, 3, 3.0),
        (int | float, 3.0, 3.0),
        (float | None, 3, 3.0),
        (Color, "deep blue", Color.DEEP_BLUE),
        (Level, 2.0, Level.HIGH),
        (str | Color, "red", "red"),
        (Color | None, None, None),
        (Literal[1, "a"], 1.0, 1),
        (tuple[int, str], [1.0, "a"], (1, "a")),
        (tuple[int, ...], [1, 2], (1, 2)),
        (list[tuple[int, ...]], [[1], []], [(1,), ()]),
        (dict[str, Color], {"a": "red"}, {"a": Color.RED}),
        (Point, {"x": 1, "tags": ["a"]}, Point(1.0, 0.0, ("a",))),
        (list[Point | str], [{"x": 1}, "x"], [Point(1.0), "x"]),
        (Place, {"city": "Rome", "point": {"x": 1}}, {"city": "Rome", "point": Point(1.0)}),
        (Any, {"a": [1.0, None]}, {"a": [1.0, None]}),
    ],
)
def test_json_becomes_what_the_annotation_asks_for(annotation: Any, value: Any, expected: Any) -> None:
    found = converted(annotation, value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "value", "told"),
    [
        (int, "3", 'arguments.value: found "3", expected a valid integer'),
        (int, True, "arguments.value: found true, expected a valid integer"),
        (int, 3.5, "arguments.value: found 3.5, expected a valid integer"),
        (float, math.nan, "arguments.value: found NaN, expected a finite number"),
        (float, 10**400, f"arguments.value: found 1{'0' * 58}…, expected a finite number"),
        (str, [0] * 99, f"arguments.value: found [{'0, ' * 19}0…, expected a valid string"),
        (Color, "RED", "arguments.value: found \"RED\", expected 'red' or 'deep blue'"),
        (tuple[int, str], [1], "arguments.value: 1 is missing"),
        (list[int], [1, "x"], 'arguments.value[1]: found "x", expected a valid integer'),
        (Point, {"x": 1, "z": 2}, 'arguments.value: found the unknown name "z"'),
        (Point, {}, "arguments.value: x is missing"),
        (Positive, {"value": 0}, 'arguments.value: found {"value": 0}: Value error, not positive'),
        (Explosive, {"value": 0}, "arguments: ZeroDivisionError: integer division or modulo by zero"),
        (list[int] | Point, "x", 'arguments.value: found "x", expected a valid array or an object'),
        (list[Node], [{"below": [{"below": 3}]}], "arguments.value[0].below[0].below: found 3, expected a valid array"),
        (Annotated[int, Field(ge=1)], 0, "arguments.value: found 0, expected greater than or equal to 1"),
        (dict[str, int], {"a": "b"}, 'arguments.value.a: found "b", expected a valid integer'),
    ],
)
def test_what_does_not_fit_is_told_and_never_reaches_the_function(annotation: Any, value: Any, told: str) -> None:
    assert converted(annotation, value) == f"Error: {told}"


def test_many_problems_are_told_shortly() -> None:
    told = converted(list[int], ["x"] * 10_000)
    assert told.count("expected") == 3
    assert len(told) < 500
