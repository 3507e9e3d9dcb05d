"""Checks of values that callers give: each returns the value in its plain type, or raises an error that names it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from mlxqwen.errors import MlxqwenError, OptionError

__all__ = ["as_token_ids", "check_flag", "check_integer", "check_number", "check_token_ids", "parse_size"]

_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) *([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_SIZES = 'For example "512MB", "2GB" or "off".'


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

    Whatever has `__index__` is an integer (NumPy's are), but a bool is none.

    Args:
        name: of the option, for the error.
        optional: if not empty, None is taken as it is, and these words say in the error what None means.
        hint: the way out.
        error: what is raised.
    """
    if optional and value is None:
        return None
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        number = operator.index(value)
        if (low is None or number >= low) and (high is None or number <= high):
            return number
    if low is None:
        wanted = "an integer" if high is None else f"an integer up to {high:,}"
    else:
        wanted = f"an integer from {low:,}" + ("" if high is None else f" to {high:,}")
    raise error(f"{name}: found {value!r}, expected {wanted}{f', or {optional}' if optional else ''}", hint=hint)


def check_number(
    name: str, value: object, low: float, high: float, *, low_is_open: bool = False, hint: str = ""
) -> float:
    """`value` as a `float` from `low` to `high`; with `low_is_open` above `low`. Raises `OptionError`."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if low <= number <= high and not (low_is_open and number == low):
            return number
    interval = f"{'(' if low_is_open else '['}{low:g}, {high:g}]"
    raise OptionError(f"{name}: found {value!r}, expected a number in {interval}", hint=hint)


def check_flag(name: str, value: object) -> bool:
    """`value` as it is, True or False. Raises `OptionError`."""
    if isinstance(value, bool):
        return value
    raise OptionError(f"{name}: found {value!r}, expected True or False")


def as_token_ids(tokens: object) -> list[Any]:
    """A sequence, or an array of any library, as a list; what it holds is not looked at. Raises `OptionError`."""
    listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(listed, Sequence) and not isinstance(listed, str | bytes):
        return list(listed)
    raise OptionError(f"prompt: found {type(tokens).__name__}, expected text or token ids")


def check_token_ids(name: str, tokens: Iterable[Any], vocab_size: int) -> list[int]:
    """The ids as a list of `int`, each from 0 to below `vocab_size`. Raises `OptionError`."""
    checked = []
    for token in tokens:
        if type(token) is not int:
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise _no_token_id(name, token, vocab_size)
            token = operator.index(token)
        if not 0 <= token < vocab_size:
            raise _no_token_id(name, token, vocab_size)
        checked.append(token)
    return checked


def _no_token_id(name: str, token: object, vocab_size: int) -> OptionError:
    return OptionError(f"{name}: found {token!r}, expected token ids from 0 to {vocab_size - 1}")


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
    raise OptionError(f"{name}: found {value!r}, expected a size above 0", hint=_SIZES)
