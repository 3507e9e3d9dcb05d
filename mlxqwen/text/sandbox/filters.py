"""The filters and tests that a template may use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.filters
import jinja2.runtime
import jinja2.tests

from mlxqwen.text.sandbox.meter import (
    CONTAINERS,
    ELEMENT_COST,
    Group,
    Meter,
    forbidden,
    length,
    meter_of,
    too_expensive,
    weigh,
)
from mlxqwen.text.sandbox.strings import METERED_METHODS, format_text, join_pieces, metered_strip, replace_text

MAX_JSON_LAYOUT = 16  # characters of an indentation or a separator

# A blank at the end: no template can spell these filters.
ADMIT, WEIGH, SLICE, CONCAT, STEP = "admit ", "weigh ", "slice ", "concat ", "step "


def metered_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter given the context, which also keeps Jinja from running it while compiling."""

    @jinja2.pass_context
    def metered(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = meter_of(context)
        meter.spend(length(value))
        for argument in (*args, *kwargs.values()):
            meter.weigh(argument)
        return meter.admit(function(context, value, *args, **kwargs))

    return metered


def text_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    return metered_filter(lambda context, value, *args, **kw: function(meter_of(context).text(value), *args, **kw))


def value_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    return metered_filter(lambda context, value, *args, **kwargs: function(value, *args, **kwargs))


def environment_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    return metered_filter(lambda context, value: function(context.environment, value))


def element_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters that take the environment and compare or add up all elements."""

    def walk(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = meter_of(context)
        meter.weigh(value)
        result = function(context.environment, meter.elements(value), *args, **kwargs)
        return read_once(meter, result) if isinstance(result, Iterator) else result

    return metered_filter(walk)


def lazy_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's generators, run at once: no chain of unfinished work can pile up."""

    def run(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = meter_of(context)
        return read_once(meter, function(context, meter.elements(value), *args, **kwargs))

    return metered_filter(run)


def read_once(meter: Meter, items: Iterable[Any]) -> Iterator[Any]:
    """What a generator gives, seen by templates as they would see the generator: true, and read once."""
    return iter(meter.admit(list(items)))


def to_json(
    context: jinja2.runtime.Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, with the arguments of Hugging Face's filter of this name."""
    meter = meter_of(context)
    meter.weigh(value)
    for layout in (*(separators or ()), indent if isinstance(indent, str) else " " * min(indent or 0, 100)):
        if len(layout) > MAX_JSON_LAYOUT:
            raise too_expensive("JSON is spaced too widely")
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


def indent(
    context: jinja2.runtime.Context,
    value: Any,
    width: int | str = 4,
    first: bool = False,
    blank: bool = False,
) -> str:
    meter = meter_of(context)
    text = meter.text(value)
    margin = len(width) if isinstance(width, str) else width
    meter.check_size(len(text) + (text.count("\n") + 1) * margin)
    return jinja2.filters.do_indent(text, width, first, blank)


def round_number(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 100:
        raise too_expensive("a rounding is too precise")
    return jinja2.filters.do_round(value, precision, method)


def sum_numbers(environment: jinja2.Environment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise forbidden("a sum of something else than numbers")
    return jinja2.filters.sync_do_sum(environment, value, attribute, start)


def join_filter(context: jinja2.runtime.Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    meter = meter_of(context)
    getter = jinja2.filters.make_attrgetter(context.environment, attribute) if attribute is not None else None
    to_text = meter.text if getter is None else lambda item: meter.text(getter(item))
    return join_pieces(meter, meter.text(d), value, to_text)


def replace_filter(context: jinja2.runtime.Context, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    meter = meter_of(context)
    return replace_text(meter, meter.text(value), meter.text(old), meter.text(new), count)


def trim(context: jinja2.runtime.Context, value: Any, chars: str | None = None) -> str:
    meter = meter_of(context)
    return metered_strip(str.strip)(meter, meter.text(value), chars)


def title(context: jinja2.runtime.Context, value: Any) -> str:
    meter = meter_of(context)
    text = meter.text(value)
    meter.check_size(ELEMENT_COST * len(text))
    return jinja2.filters.do_title(text)


def make_list(context: jinja2.runtime.Context, value: Any) -> list[Any]:
    return list(meter_of(context).elements(value))


def reverse(context: jinja2.runtime.Context, value: Any) -> Any:
    meter = meter_of(context)
    result = jinja2.filters.do_reverse(meter.elements(value))
    return result if isinstance(result, str) else read_once(meter, result)


def items(context: jinja2.runtime.Context, value: Any) -> Iterator[Any]:
    meter = meter_of(context)
    return read_once(meter, jinja2.filters.do_items(meter.elements(value)))


def dict_sort(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
    meter = meter_of(context)
    meter.weigh(value)
    return jinja2.filters.do_dictsort(meter.elements(value), *args, **kwargs)


def escape(context: jinja2.runtime.Context, value: Any) -> str:
    meter = meter_of(context)
    text = meter.text(value)
    meter.spend(5 * len(text))
    meter.check_size(len(text) + 4 * sum(map(text.count, "&<>'\"")))
    return str(jinja2.filters.FILTERS["escape"](text))


def format_filter(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format: found positional and keyword arguments, expected the ones or the others")
    meter = meter_of(context)
    return format_text(meter, meter.text(value), kwargs or args)


def center(context: jinja2.runtime.Context, value: Any, width: int = 80) -> str:
    meter = meter_of(context)
    return str(METERED_METHODS["center"](meter, meter.text(value), width))


def count_words(context: jinja2.runtime.Context, value: Any) -> int:
    meter = meter_of(context)
    text = meter.text(value)
    meter.spend(10 * len(text))
    return sum(1 for _ in re.finditer(r"\w+", text))


def group_by(environment: jinja2.Environment, value: Any, *args: Any, **kwargs: Any) -> list[Group]:
    return [Group(*group) for group in jinja2.filters.sync_do_groupby(environment, value, *args, **kwargs)]


def batch(context: jinja2.runtime.Context, value: Any, size: int, fill: Any = None) -> Iterator[Any]:
    meter = meter_of(context)
    if fill is not None:
        meter.check_size(size * weigh(fill, meter.largest))
    return read_once(meter, jinja2.filters.do_batch(meter.elements(value), size, fill))


@jinja2.pass_context
def admit_filter(context: jinja2.runtime.Context, value: Any) -> Any:
    return meter_of(context).admit(value)


@jinja2.pass_context
def weigh_filter(context: jinja2.runtime.Context, value: Any) -> Any:
    meter_of(context).weigh(value)
    return value


@jinja2.pass_context
def slice_filter(context: jinja2.runtime.Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    meter = meter_of(context)
    meter.elements(value)
    return value[slice(start, stop, step)]


@jinja2.pass_context
def concat_filter(context: jinja2.runtime.Context, *values: Any) -> str:
    meter = meter_of(context)
    pieces = [meter.text(value) for value in values]
    meter.make(sum(map(len, pieces)))
    return "".join(pieces)


@jinja2.pass_context
def step_filter(context: jinja2.runtime.Context, written: int) -> bool:
    meter = meter_of(context)
    meter.spend(written)
    meter.make(written)
    return True


def make_filters() -> dict[str, Callable[..., Any]]:
    jinja = jinja2.filters.FILTERS
    filters: dict[str, Callable[..., Any]] = {
        ADMIT: admit_filter,
        WEIGH: weigh_filter,
        SLICE: slice_filter,
        CONCAT: concat_filter,
        STEP: step_filter,
        "count": value_filter(len),
        "first": environment_filter(jinja["first"]),
        "last": environment_filter(jinja["last"]),
        "batch": metered_filter(batch),
        "center": metered_filter(center),
        "dictsort": metered_filter(dict_sort),
        "e": metered_filter(escape),
        "escape": metered_filter(escape),
        "format": metered_filter(format_filter),
        "groupby": element_filter(group_by),
        "indent": metered_filter(indent),
        "items": metered_filter(items),
        "join": metered_filter(join_filter),
        "length": value_filter(len),
        "list": metered_filter(make_list),
        "replace": metered_filter(replace_filter),
        "reverse": metered_filter(reverse),
        "round": value_filter(round_number),
        "safe": text_filter(str),
        "string": text_filter(str),
        "sum": element_filter(sum_numbers),
        "title": metered_filter(title),
        "tojson": metered_filter(to_json),
        "trim": metered_filter(trim),
        "wordcount": metered_filter(count_words),
    }
    filters |= {name: text_filter(jinja[name]) for name in ("capitalize", "lower", "upper")}
    filters |= {name: value_filter(jinja[name]) for name in ("abs", "d", "default", "float", "int")}
    filters |= {name: element_filter(jinja[name]) for name in ("max", "min", "sort", "unique")}
    lazy = ("map", "reject", "rejectattr", "select", "selectattr")
    return filters | {name: lazy_filter(jinja[name]) for name in lazy}


def metered_test(function: Callable[..., Any]) -> Callable[..., bool]:
    @jinja2.pass_context
    def metered(context: jinja2.runtime.Context, value: Any, *args: Any) -> bool:
        meter = meter_of(context)
        for item in (value, *args):
            if args or type(item) not in CONTAINERS:
                meter.weigh(item)
        return bool(function(value, *args))

    return metered


def make_tests() -> Any:
    unwanted = {"escaped", "filter", "lower", "test", "upper"}
    jinja: Mapping[str, Any] = jinja2.tests.TESTS
    tests = {name: metered_test(test) for name, test in jinja.items() if name not in unwanted}
    return tests | {
        "lower": metered_test(lambda value: isinstance(value, str) and value.islower()),
        "upper": metered_test(lambda value: isinstance(value, str) and value.isupper()),
    }
