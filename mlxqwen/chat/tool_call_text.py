"""The text between `<tool_call>` and `</tool_call>`: JSON of calls, read strictly."""

from __future__ import annotations

import json
import re
from typing import Any

from mlxqwen.files.json_file import json_kind, parse_json

__all__ = ["parse_tool_calls"]

_WHITESPACE = " \t\n\r"
_SPACE_AND_SEPARATOR = re.compile(r"[ \t\n\r,:]*")
_FENCE = re.compile(r"```[\w-]*[ \t]*\r?\n(.*?)\r?\n?[ \t]*```", re.DOTALL)
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_RAW = re.compile(r"[\t\n\r]")
_ESCAPES = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def parse_tool_calls(text: str) -> list[tuple[str, str]]:
    """The calls in the JSON of one call or of a list → the name of each function and the JSON text of its arguments.

    The arguments are the text as written, an object or a string that holds one; line breaks and tabs in
    its strings are escaped. `parameters` is read where there are no `arguments`. Missing or null arguments are "{}".
    A code fence around the JSON is taken off.

    Raises:
        ValueError: `text` is no JSON in the strict sense of `parse_json`, or no call.
    """
    text = text.strip(_WHITESPACE)
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip(_WHITESPACE)
    text = _with_escapes(text)
    value = parse_json(text)
    if not isinstance(value, list):
        return [_parse_call(value, text)]
    if not value:
        raise ValueError("found an empty list, expected an object")
    sources = _sources(text)
    return [_parse_call(call, source) for call, source in zip(value, sources, strict=True)]


def _parse_call(call: Any, text: str) -> tuple[str, str]:
    """The name and the arguments of `call`, the value of the JSON `text`."""
    if not isinstance(call, dict):
        raise ValueError(f"found {json_kind(call)}, expected an object")
    name = call.get("name")
    if not isinstance(name, str) or not name:
        kind = "empty text" if name == "" else json_kind(name)
        found = kind if "name" in call else f"keys {', '.join(map(repr, call))}"
        raise ValueError(f"name: found {found}, expected text")
    key = next((key for key in ("arguments", "parameters") if key in call), None)
    if key is None and len(call) > 1:
        raise ValueError(f"arguments: found keys {', '.join(map(repr, call))} instead")
    arguments = None if key is None else call[key]
    if arguments is None:
        return name, "{}"
    if isinstance(arguments, dict):
        return name, _source_of_value(text, str(key))
    if isinstance(arguments, str):
        arguments = _with_escapes(arguments)
        value = parse_json(arguments)
    else:
        value = arguments
    if not isinstance(value, dict):
        raise ValueError(f"{key}: found {json_kind(value)}, expected an object")
    return name, str(arguments)


def _with_escapes(text: str) -> str:
    """JSON text with line breaks and tabs in its strings replaced by escapes."""
    if not _RAW.search(text):
        return text
    return _STRING.sub(lambda string: _RAW.sub(lambda raw: _ESCAPES[raw[0]], string[0]), text)


def _sources(text: str) -> list[str]:
    """The texts of the items of the list that `text`, known to be JSON, holds."""
    decode = json.JSONDecoder().raw_decode
    sources = []
    start = _skip(text, text.index("[") + 1)
    while text[start] != "]":
        _, end = decode(text, start)
        sources.append(text[start:end])
        start = _skip(text, end)
    return sources


def _source_of_value(text: str, wanted: str) -> str:
    """The text of a value of the object that `text`, known to be JSON, holds under the key `wanted`."""
    decode = json.JSONDecoder().raw_decode
    at = text.index("{") + 1
    while True:
        key, at = decode(text, _skip(text, at))
        start = _skip(text, at)
        _, at = decode(text, start)
        if key == wanted:
            return text[start:at]


def _skip(text: str, at: int) -> int:
    match = _SPACE_AND_SEPARATOR.match(text, at)
    return match.end() if match else at
