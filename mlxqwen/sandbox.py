"""Jinja templates that nobody vouches for, rendered in this process within limits on time and memory.

Jinja's own sandbox keeps a template away from Python's internals, but not from using all memory or time. Here
a template is parsed, every syntax node is checked against a list of what chat templates need, and a meter is
built into each operation that can cost something: loops, macros, operators, comparisons, literals, slices,
filters, calls, output. Three rules bound everything:

- each operation costs steps, and the processor time of a rendering is limited;
- each value that a template makes is measured: text by its characters, containers by all that is in them, an
  element counted as often as it is referred to, so that no value can grow exponentially unseen;
- all text and containers made in one rendering are counted together, so memory is bounded too.

The limits grow with the caller's own data, which is trusted to be as large as it is.
"""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.tests
from jinja2 import nodes
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from mlxqwen.errors import TemplateError

__all__ = ["render"]

MAX_SOURCE_CHARACTERS = 128 * 1024
MAX_SYNTAX_NODES = 20_000
MAX_SECONDS = 2.0
MAX_STEPS = 400_000
MAX_VALUE = 4 * 2**20  # characters of one value; an element of a container counts as 16
MAX_MADE = 32 * 2**20  # characters of all values made in one rendering
MAX_INTEGER_BITS = 4096
MAX_DEPTH = 100
MAX_SHORT_TEXT = 256  # of arguments whose length multiplies the work: strip's characters, time formats
MAX_SEARCH = 2**28
MAX_JSON_LAYOUT = 16  # characters of an indentation or a separator

ELEMENT_COST = 16  # an element of a container takes the memory of about that many characters
TIME_CHECK_UNITS = 100_000
STEP_UNITS = 1_000


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
            raise _too_expensive("too many steps")
        if self._unchecked >= TIME_CHECK_UNITS:
            self._unchecked = 0
            if time.thread_time() > self._deadline:
                raise _too_expensive("too much time")

    def make(self, units: int) -> None:
        """Count `units` characters of new text, before they are made where that is possible."""
        self.check_size(units)
        self._made -= units
        if self._made < 0:
            raise _too_expensive("too much memory")

    def check_size(self, units: int) -> None:
        """Refuse a single value of this many characters and elements."""
        if units > self.largest:
            raise _too_expensive("a value grows too large")

    def admit(self, value: Any) -> Any:
        """`value`, which the template has just made, if it is of a kind and size that it may have."""
        kind = type(value)
        if kind is str:
            self.make(len(value))
        elif kind is int:
            if value.bit_length() > MAX_INTEGER_BITS:
                raise _too_expensive("an integer grows too large")
        elif kind in _CONTAINERS:
            self.spend(weigh(value, self.largest))
            self.make(ELEMENT_COST * len(value))
        elif kind not in _ATOMS and not isinstance(value, _HANDLES):
            raise _forbidden(f"a value of type {kind.__name__}")
        return value

    def weigh(self, value: Any) -> None:
        """Count a step that looks at all of `value`."""
        self.spend(weigh(value, self.largest) if type(value) in _CONTAINERS else _length(value))

    def text(self, value: Any) -> str:
        """`value` as a template prints it."""
        if type(value) is str:
            return value
        if type(value) in _CONTAINERS:
            self.weigh(value)
            return str(self.admit(str(value)))
        if type(value) in _ATOMS or type(value) is int or isinstance(value, jinja2.Undefined):
            return str(value)
        raise _forbidden(f"printing a value of type {type(value).__name__}")

    def elements(self, value: Any) -> Any:
        """`value`, about to be walked through by a filter."""
        self.spend(_length(value))
        self.make(ELEMENT_COST * _length(value))
        return value


class MeteredContext(jinja2.runtime.Context):
    """A template's variables, and the meter of this rendering."""

    meter: Meter


class TemplateNamespace(Namespace):
    """`namespace()`: holds plain values only, so that namespaces cannot hold each other."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name, value in attributes.items():
            _check_stored(name, value)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_stored(name, value)
        super().__setitem__(name, value)


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - a set in the base class too

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """The content as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


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
        elif kind in _CONTAINERS:
            if depth >= MAX_DEPTH:
                raise _too_expensive("a value is nested too deeply")
            if total + ELEMENT_COST * len(item) <= limit:
                parts = (part for pair in item.items() for part in pair) if kind is dict else item
                stack.extend((part, depth + 1) for part in parts)
            else:
                raise _too_expensive("a value grows too large")
        elif kind is int:
            total += item.bit_length() // 8
        elif kind not in _ATOMS and not isinstance(item, jinja2.Undefined):
            raise _forbidden(f"a value of type {kind.__name__} inside of another value")
        if total > limit:
            raise _too_expensive("a value grows too large")
    return total


def _length(value: Any) -> int:
    return len(value) if type(value) in _SIZED else 1


def _too_expensive(what: str) -> TemplateError:
    return TemplateError(
        f"chat template: {what}",
        hint="No chat template needs this much: use the one of the model's page.",
    )


def _forbidden(what: str) -> TemplateError:
    return TemplateError(
        f"chat template: {what} is not allowed",
        hint="Use the chat template of the model's page.",
    )


def _check_stored(name: object, value: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise _forbidden(f"the name {name!r} in a namespace")
    if isinstance(value, Namespace | jinja2.runtime.Macro):
        raise _forbidden(f"a value of type {type(value).__name__} in a namespace")


# --- what a template may name, call and write -----------------------------------------------------

_CONTAINERS = (list, tuple, dict)
_ATOMS = (type(None), bool, float, range)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_SIZED = frozenset({str, range, *_CONTAINERS, *_VIEWS})
_HANDLES: tuple[type, ...] = (
    jinja2.Undefined,
    jinja2.runtime.Macro,
    jinja2.runtime.LoopContext,
    Namespace,
    Cycler,
    Joiner,
    type(iter([])),
    *_VIEWS,
)

_STRING_METHODS = """
capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
_LOOP_ATTRIBUTES = """
changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0
"""
_ATTRIBUTES: Mapping[type, frozenset[str]] = {
    str: frozenset(_STRING_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    jinja2.runtime.LoopContext: frozenset(_LOOP_ATTRIBUTES.split()),
    Cycler: frozenset({"current", "next", "reset"}),
}

_SYNTAX = """
Add And Assign AssignBlock Break Call CallBlock Compare Concat CondExpr Const Continue Dict Div Filter
FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not Operand Or Output
Pair Pos Pow Scope Slice Sub Template TemplateData Test Tuple With
"""
_ALLOWED_SYNTAX = frozenset(_SYNTAX.split())

# A blank at the end: no template can spell these filters.
_ADMIT, _WEIGH, _SLICE, _CONCAT, _STEP = "admit ", "weigh ", "slice ", "concat ", "step "


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the operations of templates metered; see the module."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    context_class = MeteredContext

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use this attribute: a few methods of plain types."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, Namespace) or attr in _ATTRIBUTES.get(type(obj), ())

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse at once, where Jinja would wait until the value is used."""
        raise _forbidden(f"{type(obj).__name__}.{attribute}")

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is no allowed attribute, so there is nothing to wrap."""
        return

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, its result measured beforehand where it can explode."""
        meter = _meter(context)
        meter.spend(_length(left) + _length(right))
        if operator == "*":
            _check_product(meter, left, right)
            _check_product(meter, right, left)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            raise _forbidden("%-formatting")
        return meter.admit(self.binop_table[operator](left, right))

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a macro, a global or a method, its arguments and its result measured."""
        meter = _meter(context)
        given = [*args, *(value for name, value in kwargs.items() if not name.startswith("_"))]
        for value in given:
            meter.weigh(value)
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, types.BuiltinMethodType) and type(owner) is str:
            method = _METERED_METHODS.get(obj.__name__)
            if method is not None:
                named = {name: value for name, value in kwargs.items() if not name.startswith("_")}
                return meter.admit(method(meter, owner, *args, **named))
            meter.spend(len(owner))
        return meter.admit(super().call(context, obj, *args, **kwargs))


def _meter(context: jinja2.runtime.Context) -> Meter:
    if not isinstance(context, MeteredContext):
        raise _forbidden("a context without a meter")
    return context.meter


def _check_product(meter: Meter, left: Any, right: Any) -> None:
    if not isinstance(right, int):
        return
    if isinstance(left, str):
        meter.check_size(len(left) * right)
    elif type(left) in _CONTAINERS:
        meter.check_size(weigh(left, meter.largest) * right)
    elif isinstance(left, int) and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
        raise _too_expensive("an integer grows too large")


def _check_power(base: Any, exponent: Any) -> None:
    both_integers = isinstance(base, int) and isinstance(exponent, int)
    if both_integers and exponent > 1 and base.bit_length() * exponent > MAX_INTEGER_BITS:
        raise _too_expensive("an integer grows too large")


# --- string methods whose cost or result can explode ----------------------------------------------


def _check_short(text: Any = None) -> None:
    if isinstance(text, str) and len(text) > MAX_SHORT_TEXT:
        raise _too_expensive("an argument is too long")


def _strip(method: Callable[..., str]) -> Callable[..., str]:
    def strip(meter: Meter, text: str, *args: Any) -> str:
        meter.spend(len(text))
        _check_short(*args)
        return method(text, *args)

    return strip


def _search_backwards(method: Callable[..., Any]) -> Callable[..., Any]:
    """From the right Python searches in the product of both lengths, unlike from the left."""

    def search(meter: Meter, text: str, *args: Any, **kwargs: Any) -> Any:
        needle = args[0] if args else kwargs.get("sep")
        if isinstance(needle, str) and len(text) * len(needle) > MAX_SEARCH:
            raise _too_expensive("a search takes too long")
        meter.spend(len(text) * _length(needle))
        return method(text, *args, **kwargs)

    return search


def _split(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    pieces = len(text) // 2 + 1 if not sep else text.count(sep) + 1
    meter.spend(len(text))
    meter.make(ELEMENT_COST * (pieces if maxsplit < 0 else min(pieces, maxsplit + 1)) + len(text))
    return text.split(sep, maxsplit)


def _split_backwards(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    _search_backwards(str.rfind)(meter, text, sep or " ")
    _split(meter, text, sep, maxsplit)
    return text.rsplit(sep, maxsplit)


def _split_lines(meter: Meter, text: str, keepends: bool = False) -> list[str]:
    lines = sum(text.count(end) for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029") + 1
    meter.spend(10 * len(text))
    meter.make(ELEMENT_COST * lines + len(text))
    return text.splitlines(keepends)


def _replace(meter: Meter, text: str, old: str, new: str, count: int | None = -1) -> str:
    limit = -1 if count is None else count
    matches = text.count(old)
    matches = matches if limit < 0 else min(matches, limit)
    meter.spend(len(text))
    meter.check_size(len(text) + matches * max(0, len(new) - len(old)))
    return text.replace(old, new, limit)


def _join(meter: Meter, separator: str, items: Iterable[Any], to_text: Callable[[Any], str]) -> str:
    pieces: list[str] = []
    size = 0
    for item in meter.elements(items):
        pieces.append(to_text(item))
        size += len(pieces[-1]) + len(separator)
        meter.check_size(size)
    return separator.join(pieces)


def _join_strings(meter: Meter, separator: str, items: Iterable[Any]) -> str:
    for item in items if type(items) in _CONTAINERS else ():
        if not isinstance(item, str):
            raise TypeError(f"join: expected strings, found {type(item).__name__}")
    return _join(meter, separator, items, meter.text)


_METERED_METHODS: Mapping[str, Callable[..., Any]] = {
    "strip": _strip(str.strip),
    "lstrip": _strip(str.lstrip),
    "rstrip": _strip(str.rstrip),
    "rfind": _search_backwards(str.rfind),
    "rindex": _search_backwards(str.rindex),
    "rpartition": _search_backwards(str.rpartition),
    "split": _split,
    "rsplit": _split_backwards,
    "splitlines": _split_lines,
    "replace": _replace,
    "join": _join_strings,
}


# --- filters and tests ----------------------------------------------------------------------------


def _filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter given the context, which also keeps Jinja from running it while compiling."""

    @jinja2.pass_context
    def metered(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.spend(_length(value))
        for argument in (*args, *kwargs.values()):
            meter.weigh(argument)
        return meter.admit(function(context, value, *args, **kwargs))

    return metered


def _text_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    return _filter(lambda context, value, *args, **kw: function(_meter(context).text(value), *args, **kw))


def _value_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    return _filter(lambda context, value, *args, **kwargs: function(value, *args, **kwargs))


def _environment_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    return _filter(lambda context, value: function(context.environment, value))


def _element_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters that take the environment and compare or add up all elements."""

    def walk(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.weigh(value)
        result = function(context.environment, meter.elements(value), *args, **kwargs)
        return _once(meter, result) if isinstance(result, Iterator) else result

    return _filter(walk)


def _lazy_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's generators, run at once: no chain of unfinished work can pile up."""

    def run(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        return _once(meter, function(context, meter.elements(value), *args, **kwargs))

    return _filter(run)


def _once(meter: Meter, items: Iterable[Any]) -> Iterator[Any]:
    """What a generator gives, seen by templates as they would see the generator: true, and read once."""
    return iter(meter.admit(list(items)))


def _tojson(
    context: jinja2.runtime.Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, with the arguments of Hugging Face's filter of this name."""
    meter = _meter(context)
    meter.weigh(value)
    for layout in (*(separators or ()), indent if isinstance(indent, str) else " " * min(indent or 0, 100)):
        if len(layout) > MAX_JSON_LAYOUT:
            raise _too_expensive("JSON is spaced too widely")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=(separators[0], separators[1]) if separators else None,
        sort_keys=sort_keys,
    )
    if indent is None:
        return encoder.encode(value)
    pieces = []
    size = 0
    for piece in encoder.iterencode(value):
        size += len(piece)
        meter.spend(len(piece))
        meter.check_size(size)
        pieces.append(piece)
    return "".join(pieces)


def _indent(
    context: jinja2.runtime.Context,
    value: Any,
    width: int | str = 4,
    first: bool = False,
    blank: bool = False,
) -> str:
    meter = _meter(context)
    text = meter.text(value)
    margin = len(width) if isinstance(width, str) else width
    meter.check_size(len(text) + (text.count("\n") + 1) * margin)
    return jinja2.filters.do_indent(text, width, first, blank)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 100:
        raise _too_expensive("a rounding is too precise")
    return jinja2.filters.do_round(value, precision, method)


def _sum(environment: jinja2.Environment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise _forbidden("a sum of something else than numbers")
    return jinja2.filters.sync_do_sum(environment, value, attribute, start)


def _join_filter(context: jinja2.runtime.Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    meter = _meter(context)
    getter = jinja2.filters.make_attrgetter(context.environment, attribute) if attribute is not None else None
    to_text = meter.text if getter is None else lambda item: meter.text(getter(item))
    return _join(meter, meter.text(d), value, to_text)


def _replace_filter(context: jinja2.runtime.Context, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    meter = _meter(context)
    return _replace(meter, meter.text(value), meter.text(old), meter.text(new), count)


def _trim(context: jinja2.runtime.Context, value: Any, chars: str | None = None) -> str:
    meter = _meter(context)
    return _strip(str.strip)(meter, meter.text(value), chars)


def _title(context: jinja2.runtime.Context, value: Any) -> str:
    meter = _meter(context)
    text = meter.text(value)
    meter.check_size(ELEMENT_COST * len(text))
    return jinja2.filters.do_title(text)


def _list(context: jinja2.runtime.Context, value: Any) -> list[Any]:
    return list(_meter(context).elements(value))


def _reverse(context: jinja2.runtime.Context, value: Any) -> Any:
    meter = _meter(context)
    result = jinja2.filters.do_reverse(meter.elements(value))
    return result if isinstance(result, str) else _once(meter, result)


def _items(context: jinja2.runtime.Context, value: Any) -> Iterator[Any]:
    meter = _meter(context)
    return _once(meter, jinja2.filters.do_items(meter.elements(value)))


def _dict_sort(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
    meter = _meter(context)
    meter.weigh(value)
    return jinja2.filters.do_dictsort(meter.elements(value), *args, **kwargs)


@jinja2.pass_context
def _admit_filter(context: jinja2.runtime.Context, value: Any) -> Any:
    return _meter(context).admit(value)


@jinja2.pass_context
def _weigh_filter(context: jinja2.runtime.Context, value: Any) -> Any:
    _meter(context).weigh(value)
    return value


@jinja2.pass_context
def _slice_filter(context: jinja2.runtime.Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    meter = _meter(context)
    meter.elements(value)
    return value[slice(start, stop, step)]


@jinja2.pass_context
def _concat_filter(context: jinja2.runtime.Context, *values: Any) -> str:
    meter = _meter(context)
    pieces = [meter.text(value) for value in values]
    meter.make(sum(map(len, pieces)))
    return "".join(pieces)


@jinja2.pass_context
def _step_filter(context: jinja2.runtime.Context, written: int) -> bool:
    meter = _meter(context)
    meter.spend(written)
    meter.make(written)
    return True


def _filters() -> dict[str, Callable[..., Any]]:
    jinja = jinja2.filters.FILTERS
    filters: dict[str, Callable[..., Any]] = {
        _ADMIT: _admit_filter,
        _WEIGH: _weigh_filter,
        _SLICE: _slice_filter,
        _CONCAT: _concat_filter,
        _STEP: _step_filter,
        "count": _value_filter(len),
        "first": _environment_filter(jinja["first"]),
        "last": _environment_filter(jinja["last"]),
        "dictsort": _filter(_dict_sort),
        "indent": _filter(_indent),
        "items": _filter(_items),
        "join": _filter(_join_filter),
        "length": _value_filter(len),
        "list": _filter(_list),
        "replace": _filter(_replace_filter),
        "reverse": _filter(_reverse),
        "round": _value_filter(_round),
        "safe": _text_filter(str),
        "string": _text_filter(str),
        "sum": _element_filter(_sum),
        "title": _filter(_title),
        "tojson": _filter(_tojson),
        "trim": _filter(_trim),
    }
    filters |= {name: _text_filter(jinja[name]) for name in ("capitalize", "lower", "upper")}
    filters |= {name: _value_filter(jinja[name]) for name in ("abs", "d", "default", "float", "int")}
    filters |= {name: _element_filter(jinja[name]) for name in ("max", "min", "sort", "unique")}
    lazy = ("map", "reject", "rejectattr", "select", "selectattr")
    return filters | {name: _lazy_filter(jinja[name]) for name in lazy}


def _test(function: Callable[..., Any]) -> Callable[..., bool]:
    @jinja2.pass_context
    def metered(context: jinja2.runtime.Context, value: Any, *args: Any) -> bool:
        meter = _meter(context)
        for item in (value, *args):
            if args or type(item) not in _CONTAINERS:
                meter.weigh(item)
        return bool(function(value, *args))

    return metered


def _tests() -> Any:
    unwanted = {"escaped", "filter", "lower", "test", "upper"}
    jinja: Mapping[str, Any] = jinja2.tests.TESTS
    tests = {name: _test(test) for name, test in jinja.items() if name not in unwanted}
    return tests | {
        "lower": _test(lambda value: isinstance(value, str) and value.islower()),
        "upper": _test(lambda value: isinstance(value, str) and value.isupper()),
    }


# --- globals --------------------------------------------------------------------------------------


def _raise_exception(message: object = "") -> None:
    raise TemplateError(f"chat template: {message}")


def _strftime_now(format: str) -> str:
    _check_short(format)
    return datetime.now().strftime(format)


# --- syntax ---------------------------------------------------------------------------------------


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class _MeterInserter(NodeTransformer):
    """Refuses syntax that is not listed and builds the meter into the rest."""

    def __init__(self) -> None:
        self._seen = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._seen += 1
        if self._seen > MAX_SYNTAX_NODES:
            raise _too_expensive("too much syntax")
        if type(node).__name__ not in _ALLOWED_SYNTAX:
            raise _forbidden(f"line {node.lineno}: {type(node).__name__.lower()}")
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - named by Jinja
        self.generic_visit(node)
        step = _filtered(nodes.Const(0, lineno=node.lineno), _STEP)
        if node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return self._count_runs(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._count_runs(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._count_runs(node)

    def _count_runs(self, node: Any) -> nodes.Node:
        written = sum(len(data.data) for part in node.body for data in _template_data(part))
        step = _filtered(nodes.Const(written, lineno=node.lineno), _STEP)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        result: nodes.Node = node
        return result

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _ADMIT)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx == "store" else _filtered(node, _ADMIT)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node.nodes[0], _CONCAT, *node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = _weighed(node.arg)
            return node
        none = nodes.Const(None, lineno=node.lineno)
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filtered(node.node, _SLICE, *(none if bound is None else bound for bound in bounds))


def _template_data(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filtered(node, _WEIGH)


# --- rendering ------------------------------------------------------------------------------------


@jinja2.pass_context
def _finalize(context: jinja2.runtime.Context, value: Any) -> str:
    meter = _meter(context)
    text = meter.text(value)
    meter.spend(len(text))
    meter.make(len(text))
    return text


@lru_cache(maxsize=1)
def _environment() -> MeteredEnvironment:
    environment = MeteredEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_finalize,
        extensions=[GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters = _filters()
    environment.tests = _tests()
    environment.globals = {
        "cycler": Cycler,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "joiner": Joiner,
        "namespace": TemplateNamespace,
        "raise_exception": _raise_exception,
        "range": jinja2.sandbox.safe_range,
        "strftime_now": _strftime_now,
    }
    return environment


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise _too_expensive(f"found {len(source)} characters, expected at most {MAX_SOURCE_CHARACTERS}")
    environment = _environment()
    tree = _MeterInserter().visit(environment.parse(source))
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
        source: the template.
        variables: plain JSON values by name; the template cannot change them.

    Raises:
        TemplateError: the template is broken, forbidden, too expensive, or raises an exception of its own.
    """
    try:
        template = _compile(source)
        context = template.new_context(dict(variables))
        if not isinstance(context, MeteredContext):
            raise _forbidden("a context without a meter")
        context.meter = Meter(sum(weigh(value, 2**62) for value in variables.values()))
        return "".join(template.root_render_func(context))
    except TemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template: line {error.lineno}: {error.message}") from error
    except Exception as error:
        kind = [] if isinstance(error, jinja2.TemplateError) else [type(error).__name__]
        raise TemplateError(": ".join(["chat template", *kind, str(error) or "failed"])) from error
