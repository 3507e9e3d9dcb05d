"""What tests of tools share: functions and types to be called with, and ways to ask what becomes of an argument."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, Required, Union

import jsonschema
from hypothesis import strategies as st
from typing_extensions import TypedDict

from mlxqwen.chat.tools import call_tool, tool_schema

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


async def asynchronous(n: int) -> int:
    return n


ANNOTATIONS = st.recursive(
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
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 2.5, "a", "red", "", 1e300])
NAMES = st.sampled_from(["x", "y", "tags", "name", "size", "city", "point", "a"])
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def checked(schema: Any, arguments: Mapping[str, Any]) -> str:
    """What a call is told whose tool was shown with another schema than its function's."""
    shown = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return call_tool({"f": lambda **names: sorted(names)}, [shown], {"name": "f", "arguments": arguments})
