"""Functions of any kind as tools: their schemas, against transformers' and by hand."""

from __future__ import annotations

import datetime
import functools
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import Field
from transformers.utils import get_json_schema

from mlxqwen.chat.tools import call_tool, check_tool_schemas, tool_schema
from mlxqwen.errors import MessagesError, OptionError
from tests.tool_functions import (
    Adder,
    Color,
    Level,
    Loose,
    Node,
    Place,
    Point,
    Schema,
    UserId,
    annotated,
    asynchronous,
    call,
    converted,
    parameters,
    scale,
    value_schema,
    weather,
)


def test_the_common_subset_is_what_transformers_makes() -> None:
    ours, theirs = tool_schema("weather", weather), get_json_schema(weather)
    ours_parameters = ours["function"]["parameters"]
    assert ours_parameters.pop("additionalProperties") is False
    defaults = {name: schema.pop("default", None) for name, schema in ours_parameters["properties"].items()}
    assert defaults == dict.fromkeys(("city", "days", "unit", "hours", "offsets")) | {
        "detailed": False,
        "limit": 3,
        "anything": "x",
    }
    theirs["function"].pop("return", None)
    assert ours == theirs


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (str, {"type": "string"}),
        (bool, {"type": "boolean"}),
        (None, {"type": "null"}),
        (Any, {}),
        (object, {}),
        (list, {"type": "array", "items": {}}),
        (list[Any], {"type": "array", "items": {}}),
        (Sequence[int], {"type": "array", "items": {"type": "integer"}}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (
            tuple[int, str],
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
        ),
        (tuple[()], {"type": "array", "minItems": 0, "maxItems": 0}),
        (dict, {"type": "object", "additionalProperties": True}),
        (Mapping[str, bool], {"type": "object", "additionalProperties": {"type": "boolean"}}),
        (Optional[int], {"type": ["integer", "null"]}),  # noqa: UP045
        (int | None, {"type": ["integer", "null"]}),
        (int | str | None, {"type": ["integer", "string", "null"]}),
        (list[int] | None, {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}),
        (list | tuple, {"type": "array", "items": {}}),
        (
            list | tuple | dict | None,
            {
                "anyOf": [
                    {"type": "array", "items": {}},
                    {"type": "object", "additionalProperties": True},
                    {"type": "null"},
                ]
            },
        ),
        (list[int] | str, {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Color, {"type": "string", "enum": ["red", "deep blue"]}),
        (Level, {"type": "integer", "enum": [1, 2]}),
        (UserId, {"type": "integer"}),
        (Annotated[int, 5, "how many"], {"type": "integer", "description": "how many"}),
        (Annotated[int, Field(ge=1, description="from 1")], {"type": "integer", "minimum": 1, "description": "from 1"}),
        ("Optional[Color]", {"anyOf": [{"type": "string", "enum": ["red", "deep blue"]}, {"type": "null"}]}),
        (set[int], {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}),
        (datetime.date, {"type": "string", "format": "date"}),
        (dict[int, str], {"type": "object", "additionalProperties": {"type": "string"}}),
        (
            Point,
            {
                "type": "object",
                "description": "A place.",
                "properties": {
                    "x": {"type": "number"},
                    "y": {"type": "number", "default": 0.0},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["x"],
                "additionalProperties": False,
            },
        ),
        (
            Loose,
            {
                "type": "object",
                "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
                "required": ["name"],
                "additionalProperties": False,
            },
        ),
    ],
)
def test_annotations_as_schemas(annotation: Any, schema: Schema) -> None:
    assert value_schema(annotation) == schema


def test_wrappers_of_a_typed_dict_are_read_even_as_text() -> None:
    assert value_schema(Place)["required"] == ["city", "point"]


def test_a_default_of_none_allows_null() -> None:
    def f(limit: int = None, *, exact: bool) -> None:  # type: ignore[assignment]  # noqa: RUF013
        """Do it."""

    assert parameters(f) == {
        "type": "object",
        "properties": {"limit": {"type": ["integer", "null"], "default": None}, "exact": {"type": "boolean"}},
        "required": ["exact"],
        "additionalProperties": False,
    }


def test_a_default_that_json_cannot_hold_is_not_shown() -> None:
    def f(a: Any = math.nan, b: Any = print, c: Color = Color.RED, d: tuple[int, int] = (1, 2)) -> None: ...

    shown = {name: schema.get("default", "none") for name, schema in parameters(f)["properties"].items()}
    assert shown == {"a": "none", "b": "none", "c": "red", "d": [1, 2]}
    assert "required" not in parameters(f)


def test_further_names_are_additional_properties() -> None:
    def typed(a: int, **others: int) -> None: ...
    def untyped(**others) -> None: ...  # type: ignore[no-untyped-def]

    assert parameters(typed)["additionalProperties"] == {"type": "integer"}
    assert parameters(untyped) == {"type": "object", "properties": {}}


def google(a: int, b: str = "x", **others: int) -> None:
    """Do one thing.

    And another: twice.

    Args:
        a (int): the first,
            which goes on
        b (str, optional): the second: with a colon
        **others: not a parameter of its own

    Raises:
        a: not a parameter either
    """


def sphinx(a: int, b: str = "x") -> None:
    """Do one thing.

    And another: twice.

    :param a: the first,
        which goes on
    :param str b: the second: with a colon
    :type a: int
    :returns: nothing
    """


@pytest.mark.parametrize("function", [google, sphinx])
def test_descriptions_from_docstrings(function: Callable[..., Any]) -> None:
    schema = tool_schema("f", function)["function"]
    assert schema["description"] == "Do one thing.\n\nAnd another: twice."
    described = {name: schema["description"] for name, schema in schema["parameters"]["properties"].items()}
    assert described == {"a": "the first, which goes on", "b": "the second: with a colon"}


def test_what_annotated_says_goes_before_the_docstring() -> None:
    def f(a: Annotated[int, "from the annotation"]) -> None:
        """Do.

        Args:
            a: from the docstring
        """

    f.__annotations__ = {"a": Annotated[int, "from the annotation"]}
    assert parameters(f)["properties"]["a"]["description"] == "from the annotation"


@pytest.mark.parametrize(
    ("function", "description", "result"),
    [
        (Adder(5).add, "Add once.", "8"),
        (Adder.make, None, "3"),
        (Adder.double, None, "6"),
        (Adder(7), "Adds.", "10"),
        (functools.partial(scale, by=10), "Scale a number.", "30"),
        (functools.partial(Adder(1).add), "Add once.", "4"),
        (functools.lru_cache(Adder.double), None, "6"),
        (lambda n: n + 1, None, "4"),
    ],
)
def test_anything_that_can_be_called(function: Callable[..., Any], description: str | None, result: str) -> None:
    schema = tool_schema("f", function)["function"]
    assert schema.get("description") == description
    assert list(schema["parameters"]["properties"]) == ["n"]
    assert call(function, {"n": 3}) == result


def test_what_partial_has_bound_is_neither_seen_nor_changed() -> None:
    bound = functools.partial(scale, by=10)
    assert "by" not in json.dumps(tool_schema("f", bound))
    assert call(bound, {"n": 1, "by": 3}) == 'Error: arguments: found the unknown name "by"'
    assert call(bound, {"n": 1, "more": 3}) == "13"


async def asynchronous_steps(n: int) -> AsyncIterator[int]:
    yield n


def steps(n: int) -> Iterator[int]:
    yield n


class AsynchronousCall:
    async def __call__(self, n: int) -> int:
        return n


def positional(n: int, /) -> int:
    return n


def many(*numbers: int) -> int:
    return sum(numbers)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (asynchronous, "asynchronous"),
        (asynchronous_steps, "asynchronous"),
        (functools.partial(asynchronous, 1), "asynchronous"),
        (AsynchronousCall(), "asynchronous"),
        (steps, "generator"),
        (positional, "parameter n: found a positional-only parameter"),
        (many, r"parameter numbers: found \*numbers, expected one that can be given by name"),
        (math.sqrt, "positional-only"),
        (max, "has no signature"),
        (3, "found int, expected a function"),
        (annotated(Adder), "parameter value: no JSON schema: .*Adder"),
        (annotated(Callable[[int], int]), "parameter value: no JSON schema: .*Callable"),
        (annotated("Missing"), "cannot be resolved: NameError"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(function: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        tool_schema("f", function)


@pytest.mark.parametrize(
    "name", ["", " a", "x" * 129, "a\n", "</tools>", "a>", 'a"', "a\\", "{a}", "a\u202eb", "a\x00", "\ud800", None, 3]
)
def test_names_that_no_model_can_call(name: Any) -> None:
    with pytest.raises(OptionError, match="found a name"):
        tool_schema(name, scale)
    with pytest.raises(MessagesError, match=r"name: found|surrogate"):
        check_tool_schemas([{"name": name}])


@pytest.mark.parametrize("name", ["calendar.read", "admin/list", "天气", "मौसम", "a" * 128, "server:get-it", "get it"])
def test_names_that_servers_have(name: str) -> None:
    asked = {"name": name, "arguments": {"n": 2}}
    assert call_tool({name: scale}, check_tool_schemas([tool_schema(name, scale)]), asked) == "4"


def test_a_class_that_refers_to_itself_is_referred_to() -> None:
    schema = value_schema(Node)
    assert schema == {"$ref": "#/$defs/Node"}
    assert parameters(annotated(Node))["$defs"].keys() == {"Node"}
    assert converted(Node, {"below": [{"below": []}]}) == Node([Node([])])


def test_a_set_as_a_default_is_shown_in_order() -> None:
    def f(a: set[str] = {"c", "a", "b"}) -> None: ...  # noqa: B006

    assert parameters(f)["properties"]["a"]["default"] == ["a", "b", "c"]


def test_a_default_is_left_to_the_function() -> None:
    names: list[str] = []

    def f(a: list[str] = names) -> bool:
        return a is names

    assert call(f, {}) == "true"


def test_a_docstring_that_is_not_unicode_is_refused() -> None:
    def f() -> None: ...

    f.__doc__ = "half \ud800"
    with pytest.raises(OptionError, match="surrogate"):
        tool_schema("f", f)
