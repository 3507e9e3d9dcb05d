"""Text and JSON files from strangers: read whole, strictly and within bounds."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mlxqwen.errors import MlxqwenError

__all__ = ["find_lone_surrogate", "json_kind", "parse_json", "read_bounded", "read_json_object", "read_text", "shown"]

MAX_DEPTH = 64
MAX_ITEMS = 3_000_000
MAX_FILE_ITEMS = 1_000_000
BYTE_ORDER_MARK = "\ufeff"
MAX_INTEGER_DIGITS = 40
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_object(
    path: Path,
    *,
    error: type[MlxqwenError],
    max_bytes: int = 32 * 1024 * 1024,
    parse: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Stricter than `json.load`: UTF-8, no key twice in an object, no `NaN` or `Infinity` (nor a number that
    overflows to it), no lone surrogate, integers of at most 40 digits, nesting of at most 64 levels, at most
    a million values. A byte order mark before it is skipped.

    Args:
        path: the file.
        error: what to raise.
        max_bytes: the largest file that is read.
        parse: text → value or `ValueError`; by default `parse_json`, whose rules are those above.

    Raises:
        MlxqwenError: of the type `error`, when the file cannot be read or holds anything else.
    """
    text = read_text(path, error=error, max_bytes=max_bytes).removeprefix(BYTE_ORDER_MARK)
    if not text.strip():
        raise error(f"{path}: the file is empty, expected a JSON object", hint=way_out(path))
    try:
        value = parse(text) if parse is not None else parse_json(text, max_items=MAX_FILE_ITEMS)
    except json.JSONDecodeError as cause:
        where = f"line {cause.lineno}, column {cause.colno}"
        raise error(f"{path}: not valid JSON at {where}: {cause.msg}", hint=way_out(path)) from None
    except ValueError as cause:
        raise error(f"{path}: {cause}", hint=way_out(path)) from None
    if not isinstance(value, dict):
        raise error(f"{path}: found {json_kind(value)}, expected an object {{…}}", hint=way_out(path))
    return value


def parse_short_integer(digits: str) -> int:
    """The integer. Raises `ValueError` for too many digits, whose conversion would take long."""
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected at most {MAX_INTEGER_DIGITS}")
    return int(digits)


def parse_json(text: str, *, parse_int: Callable[[str], int] = parse_short_integer, max_items: int = MAX_ITEMS) -> Any:
    """The value of a JSON text, as strictly as `read_json_object` says.

    Args:
        text: the JSON; a byte order mark before it is skipped.
        parse_int: makes an integer of its digits.
        max_items: the most commas, objects and lists that the text may have, those in its strings included.

    Raises:
        ValueError: the text breaks a rule; `json.JSONDecodeError`, its subclass, where it is no JSON at all.
    """
    # A value is two bytes of text, some sixty of memory and a microsecond: they are counted before any is made.
    if sum(text.count(mark) for mark in ",[{") > max_items:
        raise ValueError(f"more than {max_items:,} values")
    try:
        value = json.loads(
            text.removeprefix(BYTE_ORDER_MARK),
            object_pairs_hook=object_without_duplicates,
            parse_constant=refuse_constant,
            parse_int=parse_int,
            parse_float=parse_finite_float,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    check_tree(value, surrogates=SURROGATE_ESCAPE.search(text) is not None)
    return value


def read_text(path: Path, *, error: type[MlxqwenError], max_bytes: int) -> str:
    """The text of a UTF-8 file.

    Raises:
        MlxqwenError: of the type `error`, when the file cannot be read, is too large, or is no text.
    """
    data = read_bounded(path, error=error, max_bytes=max_bytes)
    if data.startswith(b"version https://git-lfs"):
        raise error(
            f"{path}: a git-lfs pointer, not the file itself",
            hint="Run `git lfs pull` in the folder, or download the file itself.",
        )
    if data[:1024].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise error(f"{path}: a web page, not the file itself", hint=f"Download {path.name} itself, not its page.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not UTF-8 at byte {cause.start}", hint=way_out(path)) from None


def find_lone_surrogate(text: str) -> int | None:
    """Where `text` has half of a surrogate pair, which UTF-8 cannot spell; None if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def json_kind(value: object) -> str:
    """What a value is called in JSON, with its article; Python's name of its type for what JSON does not have."""
    names = {bool: "true or false", dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    name = next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)
    return "null" if value is None else name


def shown(value: object, most: int = 100) -> str:
    """A value as JSON text for a message, of at most `most` characters; no more of it is spelled than is shown."""
    text = ""
    for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value[:most] if isinstance(value, str) else value):
        text += piece[: most + 1]
        if len(text) > most:
            return f"{text[: most - 1]}…"
    return text


def way_out(path: Path) -> str:
    """The hint for a file that holds something else than it should."""
    return f"Correct {path.name}, or use the one that belongs to the model."


def unreadable(cause: Exception) -> str:
    """The hint for a file or folder that the system does not let read."""
    if isinstance(cause, PermissionError):
        return "Check its permissions."
    return "Give a file or folder that can be read."


def read_bounded(path: Path, *, error: type[MlxqwenError], max_bytes: int) -> bytes:
    """The bytes of a regular file; anything else (a pipe, a device) could block or never end."""
    try:
        mode = path.stat().st_mode
        data = b""
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise error(f"{path}: no such file", hint="Download the model's folder completely.") from None
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{path}: cannot be read: {reason}", hint=unreadable(cause)) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise error(f"{path}: {kind}, expected a file", hint="Put the file in its place.")
    if len(data) > max_bytes:
        raise error(f"{path}: larger than {max_bytes:,} bytes, the limit for this file", hint=way_out(path))
    return data


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises `ValueError` for a key that appears twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:120]!r} appears twice in one object")
            seen.add(key)
    return result


def refuse_constant(name: str) -> NoReturn:
    """Raise `ValueError` for NaN and Infinity, which Python's parser would take."""
    raise ValueError(f"{name} is not JSON")


def parse_finite_float(digits: str) -> float:
    """The number. Raises `ValueError` if no float is as large."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def check_tree(root: Any, *, surrogates: bool) -> None:
    """Bounds the depth; where the text has surrogate escapes, finds the unpaired ones."""
    level = [root]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
                if surrogates:
                    below.extend(value.keys())
            elif isinstance(value, list):
                below.extend(value)
            elif surrogates and isinstance(value, str) and find_lone_surrogate(value) is not None:
                raise ValueError(f"the string {value[:40]!r} has an unpaired surrogate")
        level = below
