"""What one rendering may cost: steps, the size of each value, all values together."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.runtime
from jinja2.filters import _GroupTuple
from jinja2.utils import Cycler, Joiner, Namespace

from mlxqwen.errors import TemplateError

# A unit is a character. On a core of 2024 no operation takes longer than about 10 ns a unit.
MAX_STEPS = 1_000_000
MAX_VALUE = 2**20  # units of one value
MAX_MADE = 16 * 2**20  # units of all values that one rendering makes; at most 8 bytes each
MAX_INTEGER_BITS = 60  # below the modulus of Python's hash: no two such integers have the same hash
MAX_DEPTH = 100

ELEMENT_UNITS = 16  # an element of a container takes the memory of about that many characters
STEP_UNITS = 100

CONTAINERS = (list, tuple, dict, _GroupTuple)
ATOMS = (type(None), bool, float, range)
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
SIZED = frozenset({str, range, *CONTAINERS, *VIEWS})
HANDLES: tuple[type, ...] = (
    jinja2.Undefined,
    jinja2.runtime.Macro,
    jinja2.runtime.LoopContext,
    Namespace,
    Cycler,
    Joiner,
    type(iter([])),
    *VIEWS,
)


class Meter:
    """What one rendering may still use.

    Args:
        input_units: what `weigh` gives for the caller's data.
    """

    def __init__(self, input_units: int) -> None:
        self.largest = MAX_VALUE + 4 * input_units
        self.steps = MAX_STEPS + 4 * input_units
        self.room = MAX_MADE + 64 * input_units

    def spend(self, units: int = 0) -> None:
        """Count one step, and one more for each 100 units that it reads."""
        self.steps -= 1 + units // STEP_UNITS
        if self.steps < 0:
            raise too_expensive("too many steps")

    def make(self, units: int) -> None:
        """Count `units` of a new value, before it is made where it may be large."""
        self.check_size(units)
        self.room -= units
        if self.room < 0:
            raise too_expensive("too much memory")

    def write(self, characters: int) -> None:
        """Count a step that makes a text, before it is made."""
        self.spend(characters)
        self.make(characters)

    def check_size(self, units: int) -> None:
        """Refuse a single value of this many units."""
        if units > self.largest:
            raise too_expensive("a value grows too large")

    def admit(self, value: Any) -> Any:
        """`value`, which the template has just made, if it is of a kind and size that it may have."""
        kind = type(value)
        if kind is str:
            self.write(len(value))
        elif kind is int:
            check_integer(value)
        elif kind in CONTAINERS:
            self.spend(weigh(value, self.largest))
            self.make(ELEMENT_UNITS * len(value))
        elif kind not in ATOMS and not isinstance(value, HANDLES):
            raise forbidden(f"a value of type {kind.__name__}")
        return value

    def read(self, value: Any) -> int:
        """Count a step that looks at all of `value`, and return its units."""
        units = weigh(value, self.largest) if type(value) in CONTAINERS else length(value)
        self.spend(units)
        return units

    def text(self, value: Any) -> str:
        """`value` as a template prints it."""
        if type(value) is str:
            return value
        if type(value) in CONTAINERS:
            self.read(value)
            return str(self.admit(str(value)))
        if type(value) in ATOMS or type(value) is int or isinstance(value, jinja2.Undefined):
            return str(value)
        raise forbidden(f"printing a value of type {type(value).__name__}")


class MeteredContext(jinja2.runtime.Context):
    """A template's variables, and the meter of this rendering."""

    meter: Meter


def weigh(value: Any, limit: int) -> int:
    """Units of a plain value: its characters and 16 for each element, shared parts as often as they are referred to.

    Raises:
        TemplateError: more than `limit`, nested too deeply, or something in a container that is not plain.
    """
    total = 0
    stack: list[tuple[Any, int]] = [((value,), 0)]
    while stack:
        parts, depth = stack.pop()
        total += ELEMENT_UNITS * len(parts)
        if total > limit:
            raise too_expensive("a value grows too large")
        if depth > MAX_DEPTH:
            raise too_expensive("a value is nested too deeply")
        for part in parts:
            kind = type(part)
            if kind is str:
                total += len(part)
            elif kind is dict:
                stack += ((part.keys(), depth + 1), (part.values(), depth + 1))
            elif kind in CONTAINERS:
                stack.append((part, depth + 1))
            elif kind is int:
                total += part.bit_length() // 8
            elif kind not in ATOMS and not isinstance(part, jinja2.Undefined):
                raise forbidden(f"a value of type {kind.__name__} inside of another value")
    if total > limit:
        raise too_expensive("a value grows too large")
    return total


def length(value: Any) -> int:
    """Characters or elements of a value, 1 for those that have none."""
    return len(value) if type(value) in SIZED else 1


def check_integer(value: int) -> None:
    """Refuse an integer that a template has no use for."""
    if value.bit_length() > MAX_INTEGER_BITS:
        raise too_expensive("an integer grows too large")


def too_expensive(what: str) -> TemplateError:
    """The error of a limit."""
    return TemplateError(
        f"chat template: {what}",
        hint="No chat template needs this much: use the one of the model's page.",
    )


def forbidden(what: str) -> TemplateError:
    """The error of syntax, attributes and values that templates may not use."""
    return TemplateError(
        f"chat template: {what} is not allowed",
        hint="Use the chat template of the model's page.",
    )
