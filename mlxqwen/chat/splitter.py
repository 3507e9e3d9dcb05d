"""Pieces of a reply, text or tags → reasoning, content and tool calls: the one set of rules.

Qwen3 thinks between `<think>` and `</think>` and answers behind it; a call stands between `<tool_call>` and
`</tool_call>`. Who feeds a `Splitter` has told tags from text before, by their token ids or by their spelling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from enum import Enum

from mlxqwen.chat.constrained_call import ConstrainedCall
from mlxqwen.chat.edge_line_breaks import EdgeLineBreaks
from mlxqwen.chat.reply import Delta, ToolCallDelta, new_call_id
from mlxqwen.chat.tool_call_text import parse_tool_calls

__all__ = ["MAX_WARNINGS", "Splitter", "Tag"]

MAX_WARNINGS = 20
_FENCE = "```"
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN_STRINGS = re.compile(r"[ \t\n\r,:+\-.0-9Eaeflnrstu]*")  # brackets aside, all that JSON holds there
_NOTHING = re.compile("")
_NO_QUOTE = re.compile(r'[^"]*')
_IN_STRING = re.compile(r'[^"\\]*')


class Tag(Enum):
    """A tag of a reply; its value is how it is spelled."""

    THINK = "<think>"
    END_THINK = "</think>"
    CALL = "<tool_call>"
    END_CALL = "</tool_call>"


class Splitter:
    """Takes text and tags as they come, and returns what is certain.

    Think tags count only around the reply's first thought; elsewhere they are text. The text of a call is kept until
    its closing tag and parsed then. What is no call stays where it stands, as reasoning or as content, exactly as
    written, and `warnings` says why it is none. What is no JSON behind a `<tool_call>` is text at once. A call ends a
    thought, and the `</think>` that may still follow is not shown. A whole call at the end of the reply counts without
    its closing tag. Line breaks around a call are no content, except that texts before and behind it stay on lines of
    their own.

    In a call, another `<tool_call>`, and a `</think>` that is still due, end it as text. Tags that are spelled by text
    are no tags inside a JSON string; if that call comes to nothing, it ends at the first of them, and what follows is
    read again, once, with every tag a tag.

    Args:
        thinking: whether the reply begins in thought; None if it does where it opens with `<think>`.
        tools: whether `<tool_call>` begins a call.
        new_id: makes the ids of the calls.
        spelled: the tags that text spells, rather than a token of their own.

    Attributes:
        warnings: why calls were kept as text; at most `MAX_WARNINGS` and a line that there are more.
        keeps_calls: whether a constraint keeps calls behind the thought to Qwen3's form; then their arguments are told
            as they come, also those of a call that the reply ends in.
        in_thought: whether the text so far is thought, or may become one of its calls.
        may_open: whether `<think>` may still open the thought.
        has_reasoned: whether any reasoning was returned.
        reasoning_start, reasoning_end: positions, as `take` was given them, between which the thought stands; None
            while not known.
    """

    def __init__(
        self,
        *,
        thinking: bool | None,
        tools: bool = False,
        new_id: Callable[[], str] = new_call_id,
        spelled: Collection[Tag] = (),
    ) -> None:
        self.warnings: list[str] = []
        self.in_thought = thinking is True
        self.may_open = thinking is not False
        self.has_reasoned = False
        self.reasoning_start = 0 if thinking else None
        self.reasoning_end: int | None = None
        self._end_think_due = thinking is True
        self.keeps_calls = False
        self._constrained: ConstrainedCall | None = None
        self._tools = tools
        self._new_id = new_id
        self._spelled = frozenset(spelled)
        self._calls = 0
        self._call: _OpenCall | None = None
        self._edges = EdgeLineBreaks()
        self._rereads = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends in reasoning; not while it may be a call that ends it."""
        return self.in_thought and self._call is None

    @property
    def may_reason(self) -> bool:
        """Whether reasoning continues or may still begin."""
        return self.in_thought or self.may_open

    @property
    def shows_text(self) -> bool:
        """Whether text without line breaks at its ends is shown as it is."""
        is_in_call = self._call is not None or self._constrained is not None
        return not is_in_call and not self.may_open and self._edges.is_clear

    def awaits(self, tag: Tag) -> bool:
        """Whether `tag` would be a tag here rather than text."""
        if tag is Tag.CALL:
            return self._tools
        if tag is Tag.THINK:
            return self.may_open and self._call is None
        if tag is Tag.END_THINK:
            return self._end_think_due
        return self._call is not None or self._constrained is not None

    def take(self, piece: str | Tag, at: int = 0, end: int = 0) -> list[Delta]:
        """Take the next piece → the deltas that are now certain.

        Args:
            piece: text or a tag.
            at, end: where it begins and ends, in the caller's units.
        """
        if self._constrained is not None:
            return self._take_constrained(self._constrained, piece)
        if isinstance(piece, Tag):
            if not self.awaits(piece):
                return self._take_text(piece.value, at)
            return self._take_tag(piece, at, end)
        return self._take_text(piece, at)

    def finish(self) -> list[Delta]:
        """End the reply → the deltas that were held back."""
        if self._constrained is not None:
            rest = self._constrained.cut()
            return [Delta(tool_call=ToolCallDelta(self._calls, None, None, rest))] if rest else []
        deltas: list[Delta] = []
        while self._call is not None:
            deltas += self._end_call(self._call)
        return deltas

    def _take_text(self, text: str, at: int) -> list[Delta]:
        if self._call is not None:
            return self._add_to_call(self._call, text, at)
        if self.may_open:
            text = text.lstrip("\n")
            if not text:
                return []
            self.may_open = False
        return self._shown(text)

    def _take_tag(self, tag: Tag, at: int, end: int) -> list[Delta]:
        call = self._call
        if call is not None and call.in_string and tag in self._spelled and not self._rereads:
            return self._add_to_call(call, tag, at)
        if tag is Tag.END_CALL and call is not None:
            return self._end_call(call, at)
        if tag is Tag.THINK:
            self.may_open = False
            self.in_thought = self._end_think_due = True
            self.reasoning_start = end
            return []
        deltas: list[Delta] = []
        if call is not None:
            deltas = self._give_up(call, f"found {tag.value}, expected {Tag.END_CALL.value}")
            return deltas + self.take(tag, at, end)
        self.may_open = False
        if tag is Tag.CALL:
            if self.keeps_calls and not self.in_thought:
                self._constrained = ConstrainedCall()
            else:
                self._call = _OpenCall(at)
            return deltas
        self._end_think_due = False
        if self.in_thought:
            self._end_thought(at)
        else:
            self._edges.cut()
        return deltas

    def _take_constrained(self, call: ConstrainedCall, piece: str | Tag) -> list[Delta]:
        """Take the next piece of a call that a constraint keeps to its form."""
        name = call.name
        if piece is not Tag.END_CALL:
            arguments = call.add(piece.value if isinstance(piece, Tag) else piece)
            if name is None and call.name is not None:
                return [Delta(tool_call=ToolCallDelta(self._calls, self._new_id(), call.name, arguments))]
            return [Delta(tool_call=ToolCallDelta(self._calls, None, None, arguments))] if arguments else []
        try:
            rest = call.end()
        except ValueError as problem:
            self._warn(str(problem))
            rest = ""
        deltas = [Delta(tool_call=ToolCallDelta(self._calls, None, None, rest))] if rest else []
        self._constrained = None
        self._calls += 1
        self._edges.cut()
        return deltas

    def _end_thought(self, end: int) -> None:
        self.in_thought, self.reasoning_end, self._edges = False, end, EdgeLineBreaks()

    def _add_to_call(self, call: _OpenCall, piece: str | Tag, at: int) -> list[Delta]:
        call.add(piece, at)
        return [] if call.problem is None else self._give_up(call, call.problem)

    def _end_call(self, call: _OpenCall, closed_at: int | None = None) -> list[Delta]:
        try:
            calls = parse_tool_calls(call.text)
        except ValueError as problem:
            if closed_at is None:
                return self._give_up(call, f"the reply ends, expected {Tag.END_CALL.value}")
            call.add(Tag.END_CALL, closed_at)
            return self._give_up(call, str(problem))
        self._call = None
        if self.in_thought:
            self._end_thought(call.at)
        self._edges.cut()
        deltas = []
        for name, arguments in calls:
            deltas.append(Delta(tool_call=ToolCallDelta(self._calls, self._new_id(), name, arguments)))
            self._calls += 1
        return deltas

    def _give_up(self, call: _OpenCall, problem: str) -> list[Delta]:
        """Give up `call`: show its text up to the first tag in it, and read the rest again."""
        self._call = None
        self._warn(problem)
        text, rest = call.parts()
        deltas = self._shown(Tag.CALL.value + text)
        rereads, self._rereads = self._rereads, True
        for piece, at in rest:
            deltas += self.take(piece, at, at + len(piece.value if isinstance(piece, Tag) else piece))
        self._rereads = rereads
        return deltas

    def _shown(self, text: str) -> list[Delta]:
        text = self._edges.strip(text)
        if not text:
            return []
        if self.in_thought:
            self.has_reasoned = True
            return [Delta(reasoning=text)]
        return [Delta(content=text)]

    def _warn(self, problem: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(f"a tool call was kept as text: {problem[:200]}")
        elif len(self.warnings) == MAX_WARNINGS:
            self.warnings.append("more tool calls were kept as text")


class _OpenCall:
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
