"""What one rendering may cost, and the values that a template may hold."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jinja2
import jinja2.runtime
from jinja2.utils import Cycler, Joiner, Namespace

from mlxqwen.errors import TemplateError

MAX_SECONDS = 2.0
MAX_STEPS = 400_000
MAX_VALUE = 4 * 2**20  # characters of one value; an element of a container counts as 16
MAX_MADE = 32 * 2**20  # characters of all values made in one rendering
MAX_INTEGER_BITS = 4096
MAX_DEPTH = 100
MAX_SHORT_TEXT = 256  # of arguments whose length multiplies the work: strip's characters, time formats

ELEMENT_COST = 16  # an element of a container takes the memory of about that many characters
TIME_CHECK_UNITS = 100_000
STEP_UNITS = 1_000


class Group(NamedTuple):
    """One element of what `groupby` gives."""

    grouper: Any
    list: list[Any]

    def __repr__(self) -> str:
        return repr(tuple(self))


CONTAINERS = (list, tuple, dict, Group)
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
        input_weight: what `weigh` gives for the caller's data.
    """

    def __init__(self, input_weight: int) -> None:
        self.largest = MAX_VALUE + 4 * input_weight
        self._made = MAX_MADE + 64 * input_weight
        self._steps = MAX_STEPS + 100 * input_weight
        self._deadline = time.thread_time() + MAX_SECONDS + 1e-6 * input_weight
        self._unchecked = 0

    def spend(self, units: int = 0) -> None:
        """Count one step that touches `units` characters or elements."""
        self._steps -= 1
        self._unchecked += units + STEP_UNITS
        if self._steps < 0:
            raise too_expensive("too many steps")
        if self._unchecked >= TIME_CHECK_UNITS:
            self._unchecked = 0
            if time.thread_time() > self._deadline:
                raise too_expensive("too much time")

    def make(self, units: int) -> None:
        """Count `units` characters of new text, before they are made where that is possible."""
        self.check_size(units)
        self._made -= units
        if self._made < 0:
            raise too_expensive("too much memory")

    def check_size(self, units: int) -> None:
        """Refuse a single value of this many characters and elements."""
        if units > self.largest:
            raise too_expensive("a value grows too large")

    def admit(self, value: Any) -> Any:
        """`value`, which the template has just made, if it is of a kind and size that it may have."""
        kind = type(value)
        if kind is str:
            self.make(len(value))
        elif kind is int:
            if value.bit_length() > MAX_INTEGER_BITS:
                raise too_expensive("an integer grows too large")
        elif kind in CONTAINERS:
            self.spend(weigh(value, self.largest))
            self.make(ELEMENT_COST * len(value))
        elif kind not in ATOMS and not isinstance(value, HANDLES):
            raise forbidden(f"a value of type {kind.__name__}")
        return value

    def weigh(self, value: Any) -> None:
        """Count a step that looks at all of `value`."""
        self.spend(weigh(value, self.largest) if type(value) in CONTAINERS else length(value))

    def text(self, value: Any) -> str:
        """`value` as a template prints it."""
        if type(value) is str:
            return value
        if type(value) in CONTAINERS:
            self.weigh(value)
            return str(self.admit(str(value)))
        if type(value) in ATOMS or type(value) is int or isinstance(value, jinja2.Undefined):
            return str(value)
        raise forbidden(f"printing a value of type {type(value).__name__}")

    def elements(self, value: Any) -> Any:
        """`value`, about to be walked through by a filter."""
        self.spend(length(value))
        self.make(ELEMENT_COST * length(value))
        return value


class MeteredContext(jinja2.runtime.Context):
    """A template's variables, and the meter of this rendering."""

    meter: Meter


def meter_of(context: jinja2.runtime.Context) -> Meter:
    if not isinstance(context, MeteredContext):
        raise forbidden("a context without a meter")
    return context.meter


def weigh(value: Any, limit: int) -> int:
    """Characters in a plain value and 16 for each element, shared parts counted as often as they are referred to.

    Raises:
        TemplateError: more than `limit`, nested too deeply, or something in a container that is not plain.
    """
    total = 0
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        kind = type(item)
        total += ELEMENT_COST
        if kind is str:
            total += len(item)
        elif kind in CONTAINERS:
            if depth >= MAX_DEPTH:
                raise too_expensive("a value is nested too deeply")
            if total + ELEMENT_COST * len(item) <= limit:
                parts = (part for pair in item.items() for part in pair) if kind is dict else item
                stack.extend((part, depth + 1) for part in parts)
            else:
                raise too_expensive("a value grows too large")
        elif kind is int:
            total += item.bit_length() // 8
        elif kind not in ATOMS and not isinstance(item, jinja2.Undefined):
            raise forbidden(f"a value of type {kind.__name__} inside of another value")
        if total > limit:
            raise too_expensive("a value grows too large")
    return total


def length(value: Any) -> int:
    return len(value) if type(value) in SIZED else 1


def too_expensive(what: str) -> TemplateError:
    return TemplateError(
        f"chat template: {what}",
        hint="No chat template needs this much: use the one of the model's page.",
    )


def forbidden(what: str) -> TemplateError:
    return TemplateError(
        f"chat template: {what} is not allowed",
        hint="Use the chat template of the model's page.",
    )
