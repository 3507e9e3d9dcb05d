"""Schemas that others wrote: shown as they are given, judged as jsonschema judges them, broken ones named."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.chat.tools import call_tool, check_tool_schemas, schemas, tool_schema
from mlxqwen.errors import MessagesError, OptionError
from tests.tool_functions import ANNOTATIONS, SCALARS, Schema, annotated, checked, scale, values, weather


def test_given_schemas_come_back_as_they_are_and_bare_ones_wrapped() -> None:
    whole = tool_schema("weather", weather)
    bare = {"name": "clock", "description": None, "parameters": {"type": "object", "properties": {}}}
    checked = check_tool_schemas([whole, bare, {"type": "function", "name": "now"}])
    assert checked[0] == whole
    assert checked[0] is not whole
    assert checked[1:] == [
        {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
        {"type": "function", "function": {"name": "now"}},
    ]


def test_two_tools_of_one_name_are_shown_and_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    tools: list[dict[str, Any]] = [{"name": "twin"}, {"name": "b"}, {"name": "twin", "parameters": {}}]
    for _ in range(2):
        assert [tool["function"] for tool in check_tool_schemas(tools)] == tools
    assert [record.getMessage() for record in caplog.records] == [
        "tool 'twin': found 2 of this name; shown as given, and a call of it means the first"
    ]


def test_a_call_of_a_name_that_two_tools_have_is_checked_against_the_first() -> None:
    shown = [tool_schema("scale", scale), {"function": {"name": "scale", "parameters": {"required": ["x"]}}}]
    assert call_tool({"scale": scale}, shown, {"name": "scale", "arguments": {"n": 1}}) == "2"
    assert "'x' is a required" in call_tool({"scale": scale}, shown[::-1], {"name": "scale", "arguments": {"n": 1}})


def _deep() -> Schema:
    schema: Schema = {}
    for _ in range(100):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        ("x", "tools[0]: found text, expected a dict"),
        ({"type": "web_search"}, "tools[0]: type: found 'web_search', expected 'function'"),
        ({"type": "function"}, "tools[0]: name: found None"),
        ({"type": "function", "function": []}, "tools[0]: function: found [], expected an object"),
        ({"function": {"name": "a<b"}}, "tools[0]: function: name: found 'a<b'"),
        ({"name": "a", "parameters": []}, "tools[0].parameters: found [], expected a JSON schema, which is an object"),
        ({"function": {"name": "a", "parameters": "{}"}}, "tools[0].function.parameters: found '{}', expected a JSON"),
        ({"name": "a", "parameters": 0}, "tools[0].parameters: found 0, expected a JSON schema"),
        ({"name": "a", "parameters": {"type": "object", "default": {1}}}, "tools[0].parameters.default: found set"),
        ({"name": "a", "parameters": {"type": "object", "not": _deep()}}, "nested deeper than 64 levels"),
    ],
)
def test_a_broken_tool_is_named(tool: Any, told: str) -> None:
    with pytest.raises(MessagesError) as caught:
        check_tool_schemas([tool])
    assert told in caught.value.problem


_BROKEN: list[Schema] = [
    {"type": "text"},
    {"type": []},
    {"type": ["string", "string"]},
    {"type": 3},
    {"properties": []},
    {"properties": {"a": 3}},
    {"required": "a"},
    {"required": ["a", "a"]},
    {"required": [1]},
    {"items": 3},
    {"additionalProperties": "no"},
    {"anyOf": []},
    {"anyOf": {}},
    {"oneOf": [3]},
    {"description": 3},
    {"minimum": "0"},
    {"maximum": True},
    {"minLength": -1},
    {"maxItems": "2"},
    {"enum": "ab"},
    {"pattern": 3},
    {"$defs": {"a": []}},
]


@pytest.mark.parametrize("schema", _BROKEN, ids=json.dumps)
def test_what_is_no_json_schema_is_shown_and_noted_once(schema: Schema, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(jsonschema.SchemaError):
        jsonschema.Draft202012Validator.check_schema(schema)
    keyword = next(iter(schema))
    nested = {"type": "object", "properties": {"a": {"items": {"anyOf": [schema]}}}}
    for _ in range(2):
        assert check_tool_schemas([{"name": keyword, "parameters": nested}])[0]["function"]["parameters"] == nested
    (note,) = caplog.records
    start = f"tool {keyword!r}: parameters.properties.a.items.anyOf[0].{keyword}"
    assert note.getMessage().startswith(start)
    assert note.getMessage().endswith("; shown as given")
    with pytest.raises(OptionError, match="no arguments can be checked against it"):
        checked(nested, {})


def test_one_broken_schema_ends_no_other_tool() -> None:
    shown = [tool_schema("scale", scale), {"function": {"name": "f", "parameters": {"type": "int"}}}]
    functions = {"scale": scale, "f": scale}
    assert call_tool(functions, shown, {"name": "scale", "arguments": {"n": 1}}) == "2"
    with pytest.raises(OptionError, match=r"tool 'f': parameters\.type"):
        call_tool(functions, shown, {"name": "f", "arguments": {"n": 1}})


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        values(a={"type": "string"}) | {"type": None},
        {"properties": {"a": {"type": "string"}}},
        {"anyOf": [values(a={"type": "string"})]},
        values(a={"type": "int"}),
        values(a={"type": "float"}),
        values(a={"type": "any"}),
        values(a={"type": "number", "minimum": 0, "exclusiveMinimum": True}),
        values(a={"type": "string", "required": True}),
        {**values(), "required": None},
        {**values(), "required": ["b"]},
        values(a={"enum": []}),
        False,
    ],
    ids=json.dumps,
)
def test_parameters_are_shown_as_they_are_given(schema: Any) -> None:
    function = {"name": "f", "parameters": schema}
    assert check_tool_schemas([function]) == [{"type": "function", "function": function}]


_keywords = st.sampled_from([*(next(iter(schema)) for schema in _BROKEN), "enum", "not", "title", "prefixItems"])
_schemas = st.recursive(
    st.just({}) | st.sampled_from([True, {"type": "string"}, {"type": ["integer", "null"]}, *_BROKEN]),
    lambda inner: st.dictionaries(
        _keywords,
        inner | st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2) | SCALARS,
        max_size=3,
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(schema=_schemas.filter(lambda schema: isinstance(schema, dict)))
def test_a_schema_is_judged_as_jsonschema_judges_it(schema: Any) -> None:
    is_valid = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA).is_valid(schema)
    assert (schemas.schema_problem(json.dumps(schema)) is None) == is_valid


@settings(deadline=None)
@given(annotation=ANNOTATIONS)
def test_our_own_schemas_are_taken(annotation: Any) -> None:
    schema = tool_schema("f", annotated(annotation))
    assert check_tool_schemas([schema]) == [schema]
