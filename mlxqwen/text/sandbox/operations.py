"""Operators, string methods, filters and tests: bounded before they run, measured after.

All share the bounds on what they may make, so they stand in one file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2.filters
import jinja2.tests
from jinja2.utils import _PassArg

from mlxqwen.text.sandbox.meter import (
    CONTAINERS,
    ELEMENT_UNITS,
    MAX_INTEGER_BITS,
    STEP_UNITS,
    Meter,
    MeteredContext,
    forbidden,
    length,
    too_expensive,
    weigh,
)

MAX_STRIPPED = 256  # characters of strip's argument: each is compared with each character of the text
MAX_JSON_LAYOUT = 16  # characters of an indentation or a separator
# Of `printf`, with a width and a precision of three digits at most, and none from an argument.
CONVERSION = re.compile(r"%%|%(\([^()]*\))?[-#0 +]*\d{0,3}(\.\d{0,3})?[sdiuoxXeEfFgG]")
CONVERSION_UNITS = 4000  # that such a conversion can add to its argument

WALKING = "dictsort groupby items list map max min reject rejectattr reverse select selectattr sort unique"  # filters
COMPARING = "in eq ne lt le gt ge == != < <= > >= equalto lessthan greaterthan"  # tests

# Filters that `syntax.py` inserts. A blank at the end: no template can spell them behind a bar.
ADMIT, READ, SLICE, CONCAT, STEP = "admit ", "read ", "slice ", "concat ", "step "


# --- operators ---------------------------------------------------------------------------------------


def check_product(meter: Meter, left: Any, right: Any) -> None:
    """Refuse `left * right` if it is a text or a container that is too large."""
    if isinstance(right, int) and type(left) in (str, *CONTAINERS):
        meter.check_size(right * (len(left) if type(left) is str else weigh(left, meter.largest)))


def check_power(base: Any, exponent: Any) -> None:
    """Refuse `base ** exponent` if it is an integer that is too large."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > 2 * MAX_INTEGER_BITS:
        raise too_expensive("an integer grows too large")


def format_text(meter: Meter, text: str, arguments: Any) -> str:
    """`text % arguments`."""
    rest, conversions = CONVERSION.subn("", text)
    if "%" in rest:
        raise forbidden("a %-format of this kind or width")
    parts = list(arguments) if isinstance(arguments, tuple) else [arguments]
    if isinstance(arguments, dict):
        parts += arguments.values()
    longest = max((len(meter.text(part)) for part in parts), default=0)
    meter.check_size(len(text) + conversions * (longest + CONVERSION_UNITS))
    return str(text % arguments)


# --- methods of strings --------------------------------------------------------------------------------


def strip(method: Callable[..., str]) -> Callable[..., str]:
    """A bounded `str.strip`, `lstrip` or `rstrip`: what is stripped is tried for each character of the text."""

    def stripped(meter: Meter, text: str, chars: str | None = None) -> str:
        if chars is not None and len(chars) > MAX_STRIPPED:
            raise too_expensive("an argument is too long")
        return method(text, chars)

    return stripped


def search_backwards(method: Callable[..., Any]) -> Callable[..., Any]:
    """From the right Python searches in the product of both lengths, unlike from the left."""

    def search(meter: Meter, text: str, sep: str | None = None, *args: Any, **kwargs: Any) -> Any:
        meter.spend(len(text) * length(sep))
        return method(text, sep, *args, **kwargs)

    return search


def replace(meter: Meter, text: str, old: str, new: str, count: int | None = -1) -> str:
    """A bounded `str.replace`: the size of the result is known before it is made."""
    limit = -1 if count is None else count
    matches = text.count(old)
    matches = matches if limit < 0 else min(matches, limit)
    meter.check_size(len(text) + matches * max(0, len(new) - len(old)))
    return text.replace(old, new, limit)


def join(meter: Meter, separator: str, items: Iterable[Any]) -> str:
    """A bounded `str.join`: the size is counted as the items come."""
    pieces = []
    units = 0
    for item in items:
        if not isinstance(item, str):
            raise TypeError(f"join: found {type(item).__name__}, expected strings")
        units += len(item) + len(separator)
        meter.check_size(units)
        pieces.append(item)
    meter.spend(ELEMENT_UNITS * len(pieces))
    return separator.join(pieces)


def pad(method: Callable[..., str]) -> Callable[..., str]:
    """A bounded `str.center`, `ljust` or `rjust`: the width is checked first."""

    def padded(meter: Meter, text: str, width: int = 80, *fill: str) -> str:
        meter.check_size(width)
        return method(text, width, *fill)

    return padded


METHODS: Mapping[str, Callable[..., Any]] = {
    **{name: strip(getattr(str, name)) for name in ("strip", "lstrip", "rstrip")},
    **{name: search_backwards(getattr(str, name)) for name in ("rfind", "rindex", "rpartition", "rsplit")},
    **{name: pad(getattr(str, name)) for name in ("center", "ljust", "rjust", "zfill")},
    "replace": replace,
    "join": join,
}


# --- filters -------------------------------------------------------------------------------------------


def metered(
    function: Callable[..., Any],
    check: Callable[..., None] | None = None,
    *,
    text: bool = False,
    walks: bool = False,
) -> Callable[..., Any]:
    """A filter with its input, arguments and result counted.

    Args:
        function: what it does, marked by Jinja's `pass_…` decorators or not.
        check: refuses what would be too large, given the meter and the filter's arguments.
        text: the value is taken as text.
        walks: looks into each element, by an attribute perhaps.
    """
    passed = _PassArg.from_obj(function)

    @jinja2.pass_context
    def run(context: MeteredContext, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context.meter
        arguments = (*args, *kwargs.values())
        given = sum(map(meter.read, arguments))
        if text:
            value = meter.text(value)
        if walks:
            meter.read(value)
            lookups = 1 + sum(a.count(".") + a.count(",") for a in arguments if type(a) is str)
            meter.spend(length(value) * (STEP_UNITS * lookups + given))
            meter.make(ELEMENT_UNITS * length(value))
        else:
            meter.spend(length(value))
        if check is not None:
            check(meter, value, *args, **kwargs)
        first: tuple[Any, ...] = ()
        if passed is not None:
            first = ({"context": context, "eval_context": context.eval_ctx}.get(passed.name, context.environment),)
        result = function(*first, value, *args, **kwargs)
        # Generators are run at once, so that no chain of unfinished work can pile up. They stay true and read once.
        return iter(meter.admit(list(result))) if isinstance(result, Iterator) else meter.admit(result)

    return run


def with_meter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the meter first, as one that takes Jinja's context."""

    @jinja2.pass_context
    def run(context: MeteredContext, *args: Any, **kwargs: Any) -> Any:
        return function(context.meter, *args, **kwargs)

    return run


def to_json(
    meter: Meter,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, with the arguments of Hugging Face's filter of this name."""
    meter.read(value)
    layouts = [*(separators or ()), indent if isinstance(indent, str) else " " * min(indent or 0, 100)]
    if max(map(len, layouts)) > MAX_JSON_LAYOUT:
        raise too_expensive("JSON is spaced too widely")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=(separators[0], separators[1]) if separators else None,
        sort_keys=sort_keys,
    )
    if indent is None:
        return encoder.encode(value)
    return join(meter, "", encoder.iterencode(value))


@jinja2.pass_context
def join_filter(context: MeteredContext, value: Any, d: Any = "", attribute: Any = None) -> str:
    """Jinja's `join`, bounded as `join` is."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    return join(context.meter, context.meter.text(d), map(context.meter.text, value))


def replace_filter(meter: Meter, text: str, old: Any, new: Any, count: int | None = None) -> str:
    """Jinja's `replace`, bounded as `replace` is."""
    return replace(meter, text, meter.text(old), meter.text(new), count)


def format_filter(meter: Meter, text: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's `format`, bounded as the operator `%` is."""
    if args and kwargs:
        raise TypeError("format: found positional and keyword arguments, expected the ones or the others")
    return format_text(meter, text, kwargs or args)


def check_words(meter: Meter, text: str) -> None:
    """Charge `wordcount` for the words that it makes."""
    meter.write(ELEMENT_UNITS * len(text))


def check_indent(meter: Meter, text: str, width: int | str = 4, *args: Any, **kwargs: Any) -> None:
    """Check the size of what `indent` will make."""
    margin = len(width) if isinstance(width, str) else width
    meter.check_size(len(text) + (text.count("\n") + 1) * margin)


def check_batch(meter: Meter, value: Any, linecount: int, fill_with: Any = None) -> None:
    """Check the size of what `batch` will fill up the last row with."""
    if fill_with is not None:
        meter.check_size(linecount * weigh(fill_with, meter.largest))


def check_round(meter: Meter, value: Any, precision: int = 0, method: Any = "common") -> None:
    """Refuse a precision whose power of ten takes long to compute."""
    if abs(precision) > 100:
        raise too_expensive("a rounding is too precise")


def check_sum(meter: Meter, value: Any, attribute: Any = None, start: Any = 0) -> None:
    """Refuse to start a sum with text or a list, which each addition would copy."""
    if not isinstance(start, int | float):
        raise forbidden("a sum of something else than numbers")


def take_slice(meter: Meter, value: Any, *bounds: Any) -> Any:
    """`value[start:stop:step]`, charged for what is read and what is made."""
    taken = value[slice(*bounds)]
    meter.spend(length(value))
    meter.make(length(taken) if type(taken) is str else ELEMENT_UNITS * length(taken))
    return taken


def concat(meter: Meter, *values: Any) -> str:
    """The operator `~`: the texts of all values as one."""
    pieces = [meter.text(value) for value in values]
    meter.write(sum(map(len, pieces)))
    return "".join(pieces)


def step(meter: Meter, units: int, written: int) -> bool:
    """Charge one pass through a loop's body; always true, so that it may stand in a condition."""
    meter.spend(units)
    meter.make(written)
    return True


def read(meter: Meter, value: Any) -> Any:
    """The value, charged for being read."""
    meter.read(value)
    return value


def make_filters() -> dict[str, Callable[..., Any]]:
    """The filters that a template may use, by name."""
    jinja = jinja2.filters.FILTERS
    unmetered = ("count", "d", "default", "first", "last", "length")  # these neither copy nor look into anything
    texts = ("capitalize", "lower", "string", "upper")
    walking = WALKING.split()
    escape = metered(lambda text: str(jinja["escape"](text)), text=True)
    return {
        ADMIT: with_meter(Meter.admit),
        READ: with_meter(read),
        SLICE: with_meter(take_slice),
        CONCAT: with_meter(concat),
        STEP: with_meter(step),
        **{name: jinja[name] for name in unmetered},
        **{name: metered(jinja[name], text=True) for name in texts},
        **{name: metered(jinja[name], walks=True) for name in walking},
        "abs": metered(jinja["abs"]),
        "batch": metered(jinja["batch"], check_batch, walks=True),
        "center": metered(with_meter(METHODS["center"]), text=True),
        "e": escape,
        "escape": escape,
        "float": metered(jinja["float"]),
        "format": metered(with_meter(format_filter), text=True),
        "indent": metered(jinja["indent"], check_indent, text=True),
        "int": metered(jinja["int"]),
        "join": metered(join_filter, walks=True),
        "replace": metered(with_meter(replace_filter), text=True),
        "round": metered(jinja["round"], check_round),
        "safe": metered(str, text=True),
        "sum": metered(jinja["sum"], check_sum, walks=True),
        "title": metered(jinja["title"], check_words, text=True),
        "tojson": metered(with_meter(to_json)),
        "trim": metered(with_meter(METHODS["strip"]), text=True),
        "wordcount": metered(jinja["wordcount"], check_words, text=True),
    }


# --- tests ---------------------------------------------------------------------------------------------


def metered_test(function: Callable[..., bool]) -> Callable[..., bool]:
    """A test that compares all of its value."""

    @jinja2.pass_context
    def run(context: MeteredContext, *values: Any) -> bool:
        for value in values:
            context.meter.read(value)
        return function(*values)

    return run


def make_tests() -> dict[str, Any]:
    """The tests that a template may use, by name."""
    jinja: Mapping[str, Any] = jinja2.tests.TESTS
    comparing = COMPARING.split()
    return {
        **{name: test for name, test in jinja.items() if name not in ("escaped", "filter", "test")},
        **{name: metered_test(jinja[name]) for name in comparing},
        "lower": metered_test(lambda value: isinstance(value, str) and value.islower()),
        "upper": metered_test(lambda value: isinstance(value, str) and value.isupper()),
    }
