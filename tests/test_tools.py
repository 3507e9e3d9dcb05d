"""Tools: schemas against transformers' and jsonschema's, and calls that can only end in text."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, Required, Union

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from transformers.utils import get_json_schema
from typing_extensions import TypedDict

from mlxqwen.chat.tools import call_tool, check_tool_schemas, schemas, tool_schema
from mlxqwen.chat.tools.schemas import find_problem
from mlxqwen.errors import MessagesError, OptionError

Schema = dict[str, Any]


class Color(enum.Enum):
    RED = "red"
    DEEP_BLUE = "deep blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass(frozen=True)
class Point:
    """A place."""

    x: float
    y: float = 0.0
    tags: tuple[str, ...] = dataclasses.field(default_factory=tuple)


@dataclasses.dataclass
class Positive:
    value: int

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ValueError("not positive")


@dataclasses.dataclass
class Explosive:
    value: int

    def __post_init__(self) -> None:
        self.value //= self.value


@dataclasses.dataclass
class Node:
    below: list[Node]


class Place(TypedDict):
    city: str
    country: NotRequired[str]
    point: Point


class Loose(TypedDict, total=False):
    name: Required[str]
    size: int


UserId = NewType("UserId", int)


DRAFT_4, DRAFT_2020 = "http://json-schema.org/draft-04/schema#", "https://json-schema.org/draft/2020-12/schema"


def values(**properties: Any) -> Schema:
    return {"type": "object", "properties": properties}


def parameters(function: Callable[..., Any]) -> Schema:
    found: Schema = tool_schema("f", function)["function"]["parameters"]
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def annotated(annotation: Any) -> Callable[..., Any]:
    """A function of one parameter, which it returns."""

    def identity(value: Any) -> Any:
        return value

    identity.__annotations__ = {"value": annotation}
    return identity


def value_schema(annotation: Any) -> Schema:
    schema: Schema = parameters(annotated(annotation))["properties"]["value"]
    return schema


def converted(annotation: Any, value: Any) -> Any:
    """What the function got as its argument; the text of the refusal if it got none."""
    got: list[Any] = []

    def keep(value: Any) -> str:
        got.append(value)
        return "kept"

    keep.__annotations__ = {"value": annotation}
    text = call_tool({"f": keep}, [tool_schema("f", keep)], {"name": "f", "arguments": {"value": value}})
    return got[0] if got else text


def call(function: Callable[..., Any], arguments: Any, **options: Any) -> str:
    return call_tool({"f": function}, [tool_schema("f", function)], {"name": "f", "arguments": arguments}, **options)


# Schemas


def weather(
    city: str,
    days: int,
    unit: Literal["celsius", "fahrenheit"],
    hours: list[int],
    offsets: dict[str, float],
    detailed: bool = False,
    limit: int | str = 3,
    anything: Any = "x",
) -> str:
    """Tell the weather.

    It may be wrong.

    Args:
        city: where, for example
            Paris
        days: how many (from today)
        unit: of the temperature
        hours: of the day
        offsets: by name
        detailed: at length
        limit: of lines
        anything: else

    Returns:
        str: a sentence
    """
    return f"{city} {days} {unit} {hours} {offsets} {detailed} {limit} {anything}"


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


class Adder:
    """Adds."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def add(self, n: int) -> int:
        """Add once."""
        return self.start + n

    @classmethod
    def make(cls, n: int) -> int:
        return n

    @staticmethod
    def double(n: int) -> int:
        return 2 * n

    def __call__(self, n: int) -> int:
        return self.start + n


def scale(n: int, by: int = 2, **others: int) -> int:
    """Scale a number."""
    return n * by + sum(others.values())


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


async def asynchronous(n: int) -> int:
    return n


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


# Values

_annotations = st.recursive(
    st.sampled_from([str, int, float, bool, None, Any, list, tuple, dict, Literal["a", "b"]])
    | st.sampled_from([Color, Level, Point, Loose, Place]),
    lambda inner: st.one_of(
        inner.map(lambda a: list[a]),  # type: ignore[valid-type]
        inner.map(lambda a: dict[str, a]),  # type: ignore[valid-type]
        inner.map(lambda a: tuple[a, ...]),  # type: ignore[valid-type]
        st.tuples(inner, inner).map(lambda pair: tuple[pair]),  # type: ignore[valid-type]
        inner.map(lambda a: Optional[a]),  # noqa: UP045
        st.tuples(inner, inner).map(lambda pair: Union[pair]),  # noqa: UP007
        inner.map(lambda a: Annotated[a, "described"]),
    ),
    max_leaves=4,
)
_scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 2.5, "a", "red", "", 1e300])
_names = st.sampled_from(["x", "y", "tags", "name", "size", "city", "point", "a"])
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=6,
)


def _fitting(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema of ours allows, written from JSON Schema's rules alone."""
    if schema is True or not schema.keys() - {"description", "default"}:
        return _json
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
@given(data=st.data(), annotation=_annotations)
def test_values_are_judged_as_jsonschema_judges_them(data: st.DataObject, annotation: Any) -> None:
    """`parameters` checks each schema against the meta-schema."""
    schema = value_schema(annotation)
    validator = jsonschema.Draft202012Validator(schema)
    for value in (data.draw(_json), data.draw(_fitting(schema))):
        found, problem = converted(annotation, value), find_problem({"value": value}, values(value=schema), "f")
        assert (isinstance(found, str) and found.startswith("Error")) != validator.is_valid(value)
        assert (problem is None) == validator.is_valid(value)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), annotation=_annotations)
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


def checked(schema: Any, arguments: Mapping[str, Any]) -> str:
    """What a call is told whose tool was shown with another schema than its function's."""
    shown = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return call_tool({"f": lambda **names: sorted(names)}, [shown], {"name": "f", "arguments": arguments})


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


# Calls


@pytest.mark.parametrize(
    "arguments", [{"n": 3}, '{"n": 3}', ' {"n" : 3.0}\n'], ids=["object", "text", "text with spaces"]
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_call_in_any_of_its_forms(arguments: Any, wrapped: bool) -> None:
    function = {"name": "double", "arguments": arguments}
    asked = {"id": "call_1", "type": "function", "function": function} if wrapped else function
    assert call_tool({"double": Adder.double}, [tool_schema("double", Adder.double)], asked) == "6"


@pytest.mark.parametrize("arguments", [{}, "", "{}", " "])
def test_a_call_without_arguments(arguments: Any) -> None:
    assert call(lambda: "14:32", arguments) == "14:32"
    assert call_tool({"f": lambda: "14:32"}, [tool_schema("f", lambda: 0)], {"name": "f"}) == "14:32"


def test_a_tool_without_parameters_knows_no_names() -> None:
    told = call(lambda: "14:32", {"zone": "UTC"})
    assert told == 'Error: arguments: found the unknown name "zone", expected none'
    assert call(Adder.double, {"n": 1, "m": 2}) == 'Error: arguments: found the unknown name "m", expected n'


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("{", "arguments: not valid JSON"),
        ('{"n": 1, "n": 2}', "arguments: not valid JSON: the key 'n' appears twice"),
        ('{"n": NaN}', "arguments: not valid JSON: NaN"),
        ("[1]", "arguments: found a list, expected an object"),
        ("null", "arguments: found null, expected an object"),
        (None, "arguments: found null, expected an object"),
        (f'{{"n": {"[" * 100}{"]" * 100}}}', "arguments: not valid JSON: nested deeper"),
        ({"n": "\ud800"}, "arguments.n: found half of a surrogate pair"),
        ({"n": {1}}, "arguments.n: found set"),
        ("{}", "arguments: n is missing"),
    ],
)
def test_arguments_that_are_none(arguments: Any, told: str) -> None:
    assert call(Adder.double, arguments).startswith(f"Error: {told}")


@pytest.mark.parametrize("name", ["other", "__class__", "f.__call__", "eval", "print", "\x1b[2J"])
def test_only_the_callables_given_are_ever_called(name: str) -> None:
    text = call_tool({"f": scale}, [tool_schema("f", scale)], {"name": name, "arguments": {"n": 1}})
    assert text.startswith("Error: found no tool named ")
    assert text.endswith(", expected one of: f")
    assert text.isprintable()


def test_a_callable_that_was_not_shown_is_not_called() -> None:
    text = call_tool({"f": scale, "g": scale}, [tool_schema("f", scale)], {"name": "g", "arguments": {"n": 1}})
    assert text == "Error: found no tool named 'g', expected one of: f"


@pytest.mark.parametrize("asked", [{}, {"name": 3}, {"function": None}, {"function": {"arguments": {}}}, [], None])
def test_a_call_that_is_none(asked: Any) -> None:
    assert call_tool({"f": scale}, [tool_schema("f", scale)], asked) == "Error: found a call without the name of a tool"


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (ZeroDivisionError("division by zero"), "Error: ZeroDivisionError: division by zero"),
        (ValueError("two\nlines \x1b[2J"), r"Error: ValueError: two\nlines \x1b[2J"),
        (OptionError("of our own", hint="not told"), "Error: OptionError: of our own"),
        (UnspeakableError(), "Error: UnspeakableError: no message"),
    ],
)
def test_an_exception_becomes_a_line_of_text(cause: Exception, text: str) -> None:
    def fail() -> None:
        raise cause

    assert call(fail, {}).startswith(text)
    assert call(fail, {}).isprintable()


def test_the_text_of_an_exception_is_bounded() -> None:
    def fail() -> None:
        raise ValueError("x" * 100_000)

    assert len(call(fail, {})) < 500


@pytest.mark.parametrize("cause", [KeyboardInterrupt, GeneratorExit])
def test_what_ends_the_program_passes_through(cause: type[BaseException]) -> None:
    def stop() -> None:
        raise cause

    with pytest.raises(cause):
        call(stop, {})


def test_a_tool_does_not_end_the_program() -> None:
    assert call(lambda: sys.exit("no disk"), {}) == "Error: SystemExit: no disk"
    assert call(lambda: sys.exit(3), {}) == "Error: SystemExit: 3"


GAVE = "the tool gave a result of type"


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize("result", [{1, 2}, b"x", math.inf, _circle(), {(1, 2): 3}, object(), asynchronous])
def test_a_result_that_json_cannot_hold(result: Any) -> None:
    assert call(lambda: result, {}) == f"Error: {GAVE} {type(result).__name__}, which JSON cannot hold"


def test_a_coroutine_as_a_result_is_closed() -> None:
    assert call(lambda: asynchronous(1), {}) == f"Error: {GAVE} coroutine, which JSON cannot hold"


@settings(deadline=None)
@given(result=_json)
def test_results_come_as_json_and_text_as_it_is(result: Any) -> None:
    text = call(lambda: result, {})
    assert text == result if isinstance(result, str) else json.loads(text) == result


def test_results_keep_their_characters() -> None:
    assert call(lambda: {"städte": ["北京"]}, {}) == '{"städte": ["北京"]}'
    assert call(lambda: "half \ud800", {}) == "half \\ud800"


def test_a_long_result_is_cut_and_says_so() -> None:
    assert call(lambda: "x" * 12, {}, limit=10) == "x" * 10 + "\n[cut off: the first 10 of 12 characters]"
    assert call(lambda: "x" * 10, {}, limit=10) == "x" * 10
    assert call(lambda: list(range(100)), {}, limit=5) == "[0, 1\n[cut off: the first 5 of 390 characters]"


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, None])
def test_a_limit_that_is_none(limit: Any) -> None:
    with pytest.raises(OptionError, match="limit"):
        call(scale, {"n": 1}, limit=limit)


# Schemas from others


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


def test_two_tools_of_one_name() -> None:
    with pytest.raises(MessagesError, match=r"tools\[2\]: name: 'a' is already that of tools\[0\]"):
        check_tool_schemas([{"name": "a"}, {"name": "b"}, {"name": "a"}])


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
        [],
        "string",
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
        inner | st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2) | _scalars,
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
@given(annotation=_annotations)
def test_our_own_schemas_are_taken(annotation: Any) -> None:
    schema = tool_schema("f", annotated(annotation))
    assert check_tool_schemas([schema]) == [schema]


def test_a_chat_without_tools_loads_no_library_for_them() -> None:
    code = (
        "import sys, mlxqwen, mlxqwen.chat.tools, mlxqwen.chat.prompts; from tests.test_tokenizer import QWEN;"
        "assert mlxqwen.chat.prompts.render_prompt(QWEN, [{'role': 'user', 'content': 'Hello'}]);"
        "sys.exit(not {'pydantic', 'pydantic_core', 'jsonschema', 'referencing'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
