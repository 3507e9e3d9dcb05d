"""Calls of a reply that are undecided: one that is not closed yet, and those in a thought that may not be meant."""

from __future__ import annotations

import re

from mlxqwen.chat.tags import Tag

__all__ = ["HeldCalls", "OpenCall"]

_FENCE = "```"
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN_STRINGS = re.compile(r"[ \t\n\r,:+\-.0-9Eaeflnrstu]*")  # brackets aside, all that JSON holds there
_NOTHING = re.compile("")
_NO_QUOTE = re.compile(r'[^"]*')
_IN_STRING = re.compile(r'[^"\\]*')


class HeldCalls:
    """Whole calls in a thought, until it is known whether the reply says more.

    Attributes:
        at: the position of the first one's tag.
        calls: their names and arguments.
        texts: what stands there, as written.
        closed_at: the position of the `</think>` behind them, if there is one.
        behind: the white space behind that.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.closed_at: int | None = None
        self.behind: list[str] = []


class OpenCall:
    """What stands behind a `<tool_call>` that is not closed yet.

    Attributes:
        at: the position of the tag.
        in_string: whether the text so far ends in a JSON string.
        problem: why it can no longer become a call: what no JSON holds outside of strings, or text behind the JSON.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.in_string = False
        self.problem: str | None = None
        self._texts: list[str] = []
        self._pieces: list[tuple[str | Tag, int]] = []  # those of the texts, from the first tag on
        self._before = 0  # texts that are not among the pieces
        self._fence = ""  # of a code fence, as much as has come
        self._depth = 0
        self._is_whole = False
        self._is_escaped = False

    @property
    def text(self) -> str:
        """All that stands behind the tag."""
        return "".join(self._texts)

    def add(self, piece: str | Tag, at: int) -> None:
        """Take the next piece, which begins at position `at`."""
        text = piece.value if isinstance(piece, Tag) else piece
        self._texts.append(text)
        if self._pieces or isinstance(piece, Tag):
            self._pieces.append((piece, at))
        else:
            self._before += 1
        self._follow(text)

    def parts(self) -> tuple[str, list[tuple[str | Tag, int]]]:
        """The text up to the first tag or the closing tag, and the pieces from there on."""
        closes = 1 if self._pieces and self._pieces[0][0] is Tag.END_CALL else 0
        return "".join(self._texts[: self._before + closes]), self._pieces[closes:]

    def _follow(self, text: str) -> None:
        at = 0
        while at < len(text) and self.problem is None:
            if self.in_string:
                at = self._follow_string(text, at)
            else:
                at = _end_of(self._plain, text, at)
                if at < len(text):
                    self._follow_structure(text[at])
                    at += 1

    @property
    def _plain(self) -> re.Pattern[str]:
        """What may stand here without being looked at."""
        if self._fence:
            return _NO_QUOTE if self._fence == _FENCE else _NOTHING
        return _BETWEEN_STRINGS if self._depth else _SPACE

    def _follow_string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        at = _end_of(_IN_STRING, text, at)
        if at < len(text):
            self.in_string, self._is_escaped = text[at] != '"', text[at] == "\\"
        return at + 1

    def _follow_structure(self, character: str) -> None:
        if self._fence == _FENCE:
            self.in_string = True
        elif character == "`" and not self._depth and not self._is_whole:
            self._fence += character
        elif self._fence or self._is_whole or character not in ('"{[]}' if self._depth else "{["):
            expected = Tag.END_CALL.value if self._is_whole else "JSON" if self._depth else "an object"
            self.problem = f"found {character!r}, expected {expected}"
        elif character == '"':
            self.in_string = True
        else:
            self._depth += 1 if character in "{[" else -1
            self._is_whole = self._depth == 0


def _end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()
