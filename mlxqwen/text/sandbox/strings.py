"""String methods and operators whose cost or result can explode, measured beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlxqwen.text.sandbox.meter import (
    CONTAINERS,
    ELEMENT_COST,
    MAX_INTEGER_BITS,
    MAX_SHORT_TEXT,
    Meter,
    forbidden,
    length,
    too_expensive,
    weigh,
)

MAX_SEARCH = 2**28
# Of `printf`, with a width and a precision of three digits at most, and none from an argument.
CONVERSION = re.compile(r"%%|%(\([^()]*\))?[-#0 +]*\d{0,3}(\.\d{0,3})?[sdiuoxXeEfFgGc]")
MAX_CONVERSION = 4000  # characters that such a conversion can add to its argument


def check_product(meter: Meter, left: Any, right: Any) -> None:
    if not isinstance(right, int):
        return
    if isinstance(left, str):
        meter.check_size(len(left) * right)
    elif type(left) in CONTAINERS:
        meter.check_size(weigh(left, meter.largest) * right)
    elif isinstance(left, int) and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
        raise too_expensive("an integer grows too large")


def check_power(base: Any, exponent: Any) -> None:
    both_integers = isinstance(base, int) and isinstance(exponent, int)
    if both_integers and exponent > 1 and base.bit_length() * exponent > MAX_INTEGER_BITS:
        raise too_expensive("an integer grows too large")


def check_short(text: Any = None) -> None:
    if isinstance(text, str) and len(text) > MAX_SHORT_TEXT:
        raise too_expensive("an argument is too long")


def metered_strip(method: Callable[..., str]) -> Callable[..., str]:
    def strip(meter: Meter, text: str, *args: Any) -> str:
        meter.spend(len(text))
        check_short(*args)
        return method(text, *args)

    return strip


def search_backwards(method: Callable[..., Any]) -> Callable[..., Any]:
    """From the right Python searches in the product of both lengths, unlike from the left."""

    def search(meter: Meter, text: str, *args: Any, **kwargs: Any) -> Any:
        needle = args[0] if args else kwargs.get("sep")
        if isinstance(needle, str) and len(text) * len(needle) > MAX_SEARCH:
            raise too_expensive("a search takes too long")
        meter.spend(len(text) * length(needle))
        return method(text, *args, **kwargs)

    return search


def split_forwards(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    pieces = len(text) // 2 + 1 if not sep else text.count(sep) + 1
    meter.spend(len(text))
    meter.make(ELEMENT_COST * (pieces if maxsplit < 0 else min(pieces, maxsplit + 1)) + len(text))
    return text.split(sep, maxsplit)


def split_backwards(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    search_backwards(str.rfind)(meter, text, sep or " ")
    split_forwards(meter, text, sep, maxsplit)
    return text.rsplit(sep, maxsplit)


def split_lines(meter: Meter, text: str, keepends: bool = False) -> list[str]:
    lines = sum(text.count(end) for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029") + 1
    meter.spend(10 * len(text))
    meter.make(ELEMENT_COST * lines + len(text))
    return text.splitlines(keepends)


def replace_text(meter: Meter, text: str, old: str, new: str, count: int | None = -1) -> str:
    limit = -1 if count is None else count
    matches = text.count(old)
    matches = matches if limit < 0 else min(matches, limit)
    meter.spend(len(text))
    meter.check_size(len(text) + matches * max(0, len(new) - len(old)))
    return text.replace(old, new, limit)


def join_pieces(meter: Meter, separator: str, items: Iterable[Any], to_text: Callable[[Any], str]) -> str:
    pieces: list[str] = []
    size = 0
    for item in meter.elements(items):
        pieces.append(to_text(item))
        size += len(pieces[-1]) + len(separator)
        meter.check_size(size)
    return separator.join(pieces)


def join_strings(meter: Meter, separator: str, items: Iterable[Any]) -> str:
    for item in items if type(items) in CONTAINERS else ():
        if not isinstance(item, str):
            raise TypeError(f"join: expected strings, found {type(item).__name__}")
    return join_pieces(meter, separator, items, meter.text)


def pad(method: Callable[..., str]) -> Callable[..., str]:
    def padded(meter: Meter, text: str, width: int, *fill: str) -> str:
        meter.spend(len(text))
        meter.check_size(width)
        return method(text, width, *fill)

    return padded


def format_text(meter: Meter, text: str, arguments: Any) -> str:
    """`text % arguments`."""
    meter.spend(len(text))
    rest, conversions = CONVERSION.subn("", text)
    if "%" in rest:
        raise forbidden("a %-format of this kind or width")
    if isinstance(arguments, tuple):
        parts = list(arguments)
    else:
        parts = [arguments, *(arguments.values() if isinstance(arguments, dict) else ())]
    longest = max((len(meter.text(part)) for part in parts), default=0)
    meter.check_size(len(text) + conversions * (longest + MAX_CONVERSION))
    return str(text % arguments)


METERED_METHODS: Mapping[str, Callable[..., Any]] = {
    "strip": metered_strip(str.strip),
    "lstrip": metered_strip(str.lstrip),
    "rstrip": metered_strip(str.rstrip),
    "rfind": search_backwards(str.rfind),
    "rindex": search_backwards(str.rindex),
    "rpartition": search_backwards(str.rpartition),
    "split": split_forwards,
    "rsplit": split_backwards,
    "splitlines": split_lines,
    "replace": replace_text,
    "join": join_strings,
    "center": pad(str.center),
    "ljust": pad(str.ljust),
    "rjust": pad(str.rjust),
    "zfill": pad(str.zfill),
}
