"""Arguments against the schema that was shown: what is checked, what is left to the function, and in which bounds."""

from __future__ import annotations

from typing import Any

import pytest

from mlxqwen.chat.tools import call_tool, check_tool_schemas, schemas
from mlxqwen.chat.tools.schemas import find_problem
from mlxqwen.errors import OptionError
from tests.tool_functions import DRAFT_2020, Adder, Schema, checked, values


@pytest.mark.parametrize(
    ("schema", "arguments", "told"),
    [
        (values(n={"enum": [1, 2]}), {"n": 3}, "arguments.n: 3 is not one of [1, 2]"),
        (values(n={"items": {"type": "string"}}), {"n": ["a", 3]}, "arguments.n[1]: 3 is not of type 'string'"),
        ({**values(), "required": ["n"]}, {}, "arguments: 'n' is a required property"),
        (
            values(n={"anyOf": [{"type": "string"}, {"type": "null"}]}),
            {"n": 3},
            "arguments.n: 3 is not of type 'string'; 3 is not of type 'null'",
        ),
        (values(n={"type": "integer"}), {"n": "x" * 999}, f"arguments.n: '{'x' * 58}… is not of type 'integer'"),
        (
            {"$defs": {"n": {"type": "null"}}, **values(n={"$ref": "#/$defs/n"})},
            {"n": 3},
            "arguments.n: 3 is not of type",
        ),
        (
            {
                "$schema": "http://json-schema.org/draft-04/schema#",
                **values(n={"minimum": 0, "exclusiveMinimum": True}),
            },
            {"n": 0},
            "arguments.n: 0 is less than or equal to the minimum of 0",
        ),
    ],
)
def test_arguments_are_checked_against_what_was_shown(schema: Any, arguments: Any, told: str) -> None:
    assert checked(schema, arguments).startswith(f"Error: {told}")


def test_a_wider_schema_does_not_widen_the_signature() -> None:
    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    text = call_tool({"f": Adder.double}, [schema], {"name": "f", "arguments": {"n": "ab"}})
    assert text == 'Error: arguments.n: found "ab", expected a valid integer'


@pytest.mark.parametrize(
    "rule",
    [
        {"pattern": "(a+)+$"},
        {"not": {"pattern": "(a+)+$"}},
        {"oneOf": [{"pattern": "(a+)+$"}, {"pattern": "b"}]},
        {"patternProperties": {"(a+)+$": False}, "additionalProperties": False},
        {"propertyNames": {"pattern": "(a+)+$"}},
        {"items": {"pattern": "(a+)+$"}},
        {"$schema": DRAFT_2020, "pattern": "(a+)+$"},
        {"unevaluatedProperties": False},
    ],
)
def test_patterns_are_left_to_the_function(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a pattern was matched")

    checked(values(n={"type": "integer"}), {"n": 1})  # imports and caches first
    find_problem({}, values(n=rule), "f")
    text = "a" * 40 + "!"
    with monkeypatch.context() as patch:
        patch.setattr("re.search", refuse)
        assert [find_problem({"n": n}, values(n=rule), "f") for n in (text, [text], {text: text})] == [None] * 3


def _doubling(depth: int) -> Schema:
    """A small schema of 2 ** depth references."""
    steps = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": {**steps, f"a{depth}": {}}, "$ref": "#/$defs/a0"}


def _deep_value(depth: int) -> Any:
    return {"d": _deep_value(depth - 1)} if depth else 0


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (_doubling(30), {}),
        ({"$ref": "#"}, {}),
        ({"allOf": [{"properties": {"d": {"$ref": "#"}}}] * 2}, _deep_value(30)),
        (values(n={"items": {"enum": list(range(10_000))}}), {"n": [9_999] * 1_000}),
        ({"$schema": DRAFT_2020, "allOf": [{"properties": {"d": {"$ref": "#"}}}] * 2}, _deep_value(30)),
        (values(n={"$id": "urn:n", "$anchor": "n", "items": {"$ref": "#n"}, "default": "x" * 9999}), {"n": [0] * 999}),
        (values(n={"uniqueItems": True}), {"n": [{"a": i} for i in range(10_000)]}),
        (values(n={"anyOf": [{"type": "integer"}] * 1_000}), {"n": "x" * 100_000}),
    ],
    ids=[
        "doubling references",
        "a loop",
        "doubling levels",
        "a long enum",
        "a draft within",
        "anchors",
        "unique objects",
        "long errors",
    ],
)
def test_a_bomb_ends_after_a_bounded_number_of_steps(
    schema: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = 0

    def count(value: Any) -> int:
        nonlocal counted
        counted += 1
        return SIZE(value)

    monkeypatch.setattr(schemas, "_size", count)
    assert "not checked: this takes more than" in checked(schema, arguments)
    assert counted <= 4 * schemas.MAX_STEPS  # two a step, for the schema itself and for the arguments


SIZE = schemas._size


def test_a_schema_without_end_is_noted_and_its_tool_refused(caplog: pytest.LogCaptureFixture) -> None:
    schema = values(n={"anyOf": [{"type": "integer"}] * 20_000})
    check_tool_schemas([{"name": "endless", "parameters": schema}])
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [" parameters"]
    with pytest.raises(OptionError, match=r"tool 'f': parameters: more than .* steps to check"):
        checked(schema, {})


@pytest.mark.parametrize("reference", ["https://example.org/s.json", "file:///etc/passwd", "other.json", "#/$defs/a"])
def test_no_reference_is_fetched(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    schema = values(a={"$ref": reference})
    assert check_tool_schemas([{"name": "f", "parameters": schema}])[0]["function"]["parameters"] == schema
    assert checked(schema, {}) == "[]"  # nothing that it would apply to
    with monkeypatch.context() as patch:
        for name in ("urllib.request.urlopen", "socket.socket.connect", "pathlib.Path.open", "builtins.open"):
            patch.setattr(name, lambda *arguments, **options: fetched.append(arguments))
        with pytest.raises(OptionError, match="tool 'f': parameters: no arguments can be checked against it"):
            checked(schema, {"a": 1})
    assert not fetched
