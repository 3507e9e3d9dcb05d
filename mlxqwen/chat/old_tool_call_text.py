"""Tool calls as Qwen3 writes them: `<tool_call>`, a JSON object, `</tool_call>`.

The text comes from a model and may be anything. A scanner follows it character by character, in whatever pieces it
comes, and knows at once when it can no longer become a call; the JSON of a finished call is then read strictly.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from string import hexdigits

from mlxqwen.chat.reply_tags import TEXT_TAGS, ReplyTags
from mlxqwen.files.json_file import MAX_DEPTH, json_kind, parse_json

__all__ = ["ToolCallScanner", "parse_tool_call"]

MAX_NUMBER_LENGTH = 1000
_WHITESPACE = " \t\n\r"
_PLAIN_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE_AND_SEPARATOR = re.compile(r"[ \t\n\r,:]*")
_SCALAR_CHARACTER = re.compile(r"[-+.0-9A-Za-z]")
_SCALAR = re.compile(
    r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null"
    r"|NaN|-?Infinity"  # no JSON, but what is wrong with the call is then this and not its form
)


class Expected(StrEnum):
    """What the scanner waits for."""

    OBJECT = "an object"
    FIRST_KEY = "a key or }"
    KEY = "a key"
    COLON = "a colon"
    FIRST_ITEM = "a value or ]"
    VALUE = "a value"
    SCALAR = "the rest of a number, true, false or null"
    COMMA = "a comma or a closing bracket"
    STRING = "the rest of a string"
    ESCAPE = "an escape"
    HEX_DIGIT = "a hexadecimal digit"
    CLOSE_TAG = TEXT_TAGS.end_tool_call


class ToolCallScanner:
    """Follows the text behind a `<tool_call>` until it is a whole call or can no longer become one.

    It takes every call whose JSON is well-formed, tags inside strings included; whether the JSON says something
    sensible is for `parse_tool_call`.

    Args:
        tags: what stands for the tags in the text.
    """

    def __init__(self, tags: ReplyTags = TEXT_TAGS) -> None:
        self.complete = False
        self.problem: str | None = None
        self._tags = tags
        self._pieces: list[str] = []
        self._expected = Expected.OBJECT
        self._brackets: list[str] = []
        self._string_is_key = False
        self._hex_digits_left = 0
        self._scalar = ""
        self._tag_length = 0

    @property
    def undecided(self) -> bool:
        return not self.complete and self.problem is None

    @property
    def taken(self) -> str:
        """The text taken so far; of a complete call with its closing tag."""
        return "".join(self._pieces)

    @property
    def intact(self) -> int:
        """How much of `taken`, after a problem, belongs to the broken call: another may begin behind.

        Its first `</tool_call>` ends it, for then the string that seemed to hold the tag was one never closed.
        Without one it ends where the problem is.
        """
        taken = self.taken
        tag = self._tags.end_tool_call
        first = taken.find(tag)
        return len(taken) - self._tag_length if first < 0 else first + len(tag)

    def feed(self, text: str, start: int = 0) -> int:
        """Take `text` from `start` on → the index where it was decided, or the end of `text`."""
        at = start
        while at < len(text) and self.undecided:
            if self._expected is Expected.STRING:
                run = _PLAIN_IN_STRING.match(text, at)
                at = run.end() if run else at
                if at == len(text):
                    break
            expected = self._expected
            if not self._takes(text[at]):
                self.problem = self.problem or f"found {self._tags.spell(text[at])!r}, expected {expected}"
                break
            at += 1
        self._pieces.append(text[start:at])
        return at

    def end(self) -> None:
        """No more text will come."""
        if self.undecided:
            self.problem = f"the reply ends, expected {self._expected}"

    def _takes(self, character: str) -> bool:
        if self._expected is Expected.SCALAR and not self._ends_scalar(character):
            return self.problem is None
        match self._expected:
            case Expected.STRING | Expected.ESCAPE | Expected.HEX_DIGIT:
                return self._takes_in_string(character)
            case Expected.CLOSE_TAG:
                return self._takes_in_tag(character)
            case _:
                return character in _WHITESPACE or self._takes_structure(character)

    def _ends_scalar(self, character: str) -> bool:
        if _SCALAR_CHARACTER.match(character):
            self._scalar += character
            if len(self._scalar) > MAX_NUMBER_LENGTH:
                self.problem = f"a number of more than {MAX_NUMBER_LENGTH:,} characters"
            return False
        if not _SCALAR.fullmatch(self._scalar):
            self.problem = f"found {self._scalar[:40]!r}, expected {Expected.VALUE}"
            return False
        self._expected = Expected.COMMA
        return True

    def _takes_in_string(self, character: str) -> bool:
        if self._expected is Expected.HEX_DIGIT:
            self._hex_digits_left -= 1
            if self._hex_digits_left == 0:
                self._expected = Expected.STRING
            return character in hexdigits
        if self._expected is Expected.ESCAPE:
            self._expected = Expected.HEX_DIGIT if character == "u" else Expected.STRING
            self._hex_digits_left = 4
            return character in '"\\/bfnrtu'
        if character == '"':
            self._expected = Expected.COLON if self._string_is_key else Expected.COMMA
            return True
        self._expected = Expected.ESCAPE
        return character == "\\"

    def _takes_in_tag(self, character: str) -> bool:
        if self._tag_length == 0 and character in _WHITESPACE:
            return True
        tag = self._tags.end_tool_call
        if character != tag[self._tag_length]:
            return False
        self._tag_length += 1
        self.complete = self._tag_length == len(tag)
        return True

    def _takes_structure(self, character: str) -> bool:
        expected = self._expected
        is_key = expected in (Expected.FIRST_KEY, Expected.KEY)
        is_value = expected in (Expected.FIRST_ITEM, Expected.VALUE)
        if character == '"' and (is_key or is_value):
            self._expected, self._string_is_key = Expected.STRING, is_key
        elif (character == "{" and expected is Expected.OBJECT) or (character in "{[" and is_value):
            return self._opens(character)
        elif character in "}]" and expected in (Expected.FIRST_KEY, Expected.FIRST_ITEM, Expected.COMMA):
            if self._brackets.pop() + character not in ("{}", "[]"):
                return False
            self._expected = Expected.COMMA if self._brackets else Expected.CLOSE_TAG
        elif character == ":" and expected is Expected.COLON:
            self._expected = Expected.VALUE
        elif character == "," and expected is Expected.COMMA:
            self._expected = Expected.KEY if self._brackets[-1] == "{" else Expected.VALUE
        elif is_value and _SCALAR_CHARACTER.match(character):
            self._expected, self._scalar = Expected.SCALAR, character
        else:
            return False
        return True

    def _opens(self, bracket: str) -> bool:
        if len(self._brackets) == MAX_DEPTH:
            self.problem = f"nested deeper than {MAX_DEPTH} levels"
            return False
        self._brackets.append(bracket)
        self._expected = Expected.FIRST_KEY if bracket == "{" else Expected.FIRST_ITEM
        return True


def parse_tool_call(text: str) -> tuple[str, str]:
    """The JSON of a call → the function's name and its arguments, the JSON text of an object.

    The arguments are the text that stands there, be it as an object or as a string that holds one. A call that is
    nothing but a name has no arguments: "{}".

    Raises:
        ValueError: `text` is no JSON in the strict sense of `parse_json`, or no call.
    """
    call = parse_json(text)
    if not isinstance(call, dict):
        raise ValueError(f"found {json_kind(call)}, expected an object")
    name = call.get("name")
    if not isinstance(name, str) or not name:
        kind = "empty text" if name == "" else json_kind(name)
        found = kind if "name" in call else f"keys {', '.join(map(repr, call))}"
        raise ValueError(f"name: found {found}, expected text")
    if "arguments" not in call:
        if len(call) > 1:
            raise ValueError(f"arguments: found keys {', '.join(map(repr, call))} instead")
        return name, "{}"
    arguments = call["arguments"]
    if isinstance(arguments, dict):
        return name, _source_of_value(text, "arguments")
    value = parse_json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise ValueError(f"arguments: found {json_kind(value)}, expected an object")
    return name, str(arguments)


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
    found = _SPACE_AND_SEPARATOR.match(text, at)
    return found.end() if found else at
