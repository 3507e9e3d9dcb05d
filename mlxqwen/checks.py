"""Checks of values that callers give: each returns the value in its plain type, or raises an error that names it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, SupportsIndex, cast

from mlxqwen.errors import MlxqwenError, OptionError

__all__ = [
    "as_integer",
    "as_token_ids",
    "check_flag",
    "check_integer",
    "check_number",
    "check_token_ids",
    "is_integer",
    "parse_duration",
    "parse_size",
]

_MOST_SHOWN = 80  # characters
_SIZES = 'For example "512MB", "2GB" or "off".'
_DURATIONS = 'For example "5m", "1h", 300 for seconds, or "off".'
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) *(ms|s|m|h|d|)", re.ASCII)
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) *([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)


def is_integer(value: object) -> bool:
    """Whether `value` is an integer: `operator.index` takes it, as it takes NumPy's, and it is no bool."""
    if type(value) is int:
        return True
    try:
        operator.index(cast(SupportsIndex, value))
    except TypeError:
        return False
    return not isinstance(value, bool)


def as_integer(value: Any) -> Any:
    """`value` as an `int` if it is an integer, as `is_integer` tells; else as it is."""
    return operator.index(value) if is_integer(value) else value


def check_integer(
    name: str,
    value: object,
    low: int | None = None,
    high: int | None = None,
    *,
    optional: str = "",
    hint: str = "",
    error: type[MlxqwenError] = OptionError,
) -> Any:
    """`value` as an `int` from `low` to `high`, both included.

    See `is_integer` for what is an integer.

    Args:
        name: of the option, for the error.
        optional: if not empty, None is taken as it is, and these words say in the error what None means.
        hint: the way out.
        error: what is raised.
    """
    if optional and value is None:
        return None
    if is_integer(value):
        number = operator.index(cast(SupportsIndex, value))
        if (low is None or number >= low) and (high is None or number <= high):
            return number
    if low is None:
        wanted = "an integer" if high is None else f"an integer up to {high:,}"
    else:
        wanted = f"an integer from {low:,}" + ("" if high is None else f" to {high:,}")
    raise error(f"{name}: found {_shown(value)}, expected {wanted}{f', or {optional}' if optional else ''}", hint=hint)


def _shown(value: object) -> str:
    """The `repr` of a value, cut off behind 80 characters."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return "a number of thousands of digits"
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"


def check_number(
    name: str, value: object, low: float, high: float, *, low_is_open: bool = False, hint: str = ""
) -> float:
    """`value` as a `float` from `low` to `high`; with `low_is_open` above `low`. Raises `OptionError`."""
    if type(value) is float or (not isinstance(value, bool) and isinstance(value, Real)):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if low <= number <= high and not (low_is_open and number == low):
            return number
    interval = f"{'(' if low_is_open else '['}{low:g}, {high:g}]"
    raise OptionError(f"{name}: found {_shown(value)}, expected a number in {interval}", hint=hint)


def check_flag(name: str, value: object, *, optional: bool = False) -> bool | None:
    """`value` as it is: True or False, or with `optional` None. Raises `OptionError`."""
    if isinstance(value, bool) or (optional and value is None):
        return value
    raise OptionError(
        f"{name}: found {_shown(value)}, expected {'True, False or None' if optional else 'True or False'}"
    )


def as_token_ids(tokens: object) -> list[Any]:
    """A sequence, or an array of any library, as a list with its integers as `int`; other items stay as they are.

    Raises `OptionError` for what is no sequence.
    """
    listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(listed, Sequence) and not isinstance(listed, str | bytes):
        return [operator.index(item) if type(item) is not int and is_integer(item) else item for item in listed]
    raise OptionError(f"prompt: found {type(tokens).__name__}, expected text or token ids")


def check_token_ids(name: str, tokens: Iterable[Any], vocab_size: int) -> list[int]:
    """The ids as a list of `int`, each from 0 to below `vocab_size`. Raises `OptionError`."""
    checked = []
    for token in tokens:
        if type(token) is not int:
            if not is_integer(token):
                raise _no_token_id(name, token, vocab_size)
            token = operator.index(token)
        if not 0 <= token < vocab_size:
            raise _no_token_id(name, token, vocab_size)
        checked.append(token)
    return checked


def _no_token_id(name: str, token: object, vocab_size: int) -> OptionError:
    return OptionError(f"{name}: found {_shown(token)}, expected token ids from 0 to {vocab_size - 1}")


def parse_size(name: str, value: object) -> int:
    """Bytes, from a number of them or from text such as "512MB", "1.5 GB" (powers of 1,000) or "2GiB" (of 1,024).

    Raises `OptionError` for what is neither, or below 1.
    """
    if isinstance(value, str) and (parts := _SIZE.fullmatch(value.strip())):
        number, unit, binary = parts.groups()
        nbytes = int(float(number) * (1024 if binary else 1000) ** (" kmgt".index(unit.lower() or " ")))
        if nbytes >= 1:
            return nbytes
    elif not isinstance(value, str):
        return int(check_integer(name, value, 1, hint=_SIZES))
    raise OptionError(f"{name}: found {_shown(value)}, expected a size above 0 in B, KB, MB, GB or TB", hint=_SIZES)


def parse_duration(name: str, value: str) -> float | None:
    """Seconds, from text such as "300", "90s", "5m", "1.5h" or "1d"; None for "off" and, as Ollama has it, "-1".

    Raises `OptionError` for what is neither.
    """
    text = value.strip().lower()
    if text in ("off", "-1"):
        return None
    if (parts := _DURATION.fullmatch(text)) is None:
        raise OptionError(f"{name}: found {_shown(value)}, expected a time in s, m, h or d, or off", hint=_DURATIONS)
    return float(parts[1]) * _SECONDS[parts[2]]
