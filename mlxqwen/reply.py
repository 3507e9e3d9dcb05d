"""Text → reasoning, content and tool calls: a stream state machine that knows no model and no arrays.

Qwen3 thinks between `<think>` and `</think>` and answers behind it; in the answer a call stands between `<tool_call>`
and `</tool_call>`. Pieces of text go in as they come, in any cut; only what could still be part of a tag, a call not
yet whole, and line breaks that may turn out to be at an edge are held back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mlxqwen.tool_call_text import CLOSE_TAG, OPEN_TAG, ToolCallScanner, parse_tool_call

__all__ = ["Delta", "Reply", "ReplyParser", "ToolCall", "ToolCallDelta", "join_deltas", "new_call_id", "parse_reply"]

MAX_WARNINGS = 20
_THINK, _END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called; `arguments` is the JSON text of an object, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call number `index`: `id` and `name` come with its first, the pieces of `arguments` add up."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply; `reasoning` is None where there was none."""

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a reply: of its reasoning, of its content or of a tool call; the others are None."""

    reasoning: str | None = None
    content: str | None = None
    tool_call: ToolCallDelta | None = None


def new_call_id() -> str:
    """An id in OpenAI's form: `call_` and 24 random characters."""
    return f"call_{os.urandom(12).hex()}"


class ReplyParser:
    """Splits a reply while it is being written.

    Think tags count only around the reply's first thought; in the content they are text. A call counts once all of it
    is there and its JSON is sound. A broken or unfinished one is content, exactly as written, and `warnings` says what
    is wrong with it; calls behind it count. Line breaks around a call are no content, except that texts before and
    behind it stay on lines of their own.

    Args:
        thinking: True if the reply is known to begin in thought: then everything up to `</think>` is reasoning, whether
            or not the model opens its own tag. False if it is known not to: then everything is content. None if the
            reply decides: it is reasoning if it opens with `<think>`, else content.
        tools: whether the model was given tools. If so, `<tool_call>` begins a call and ends reasoning still open; if
            not, it is text.
        new_id: makes the ids of the calls.

    Attributes:
        in_reasoning: whether the text so far ends in reasoning.
        warnings: what was wrong with calls that were kept as content.
    """

    def __init__(
        self, *, thinking: bool | None = True, tools: bool = False, new_id: Callable[[], str] = new_call_id
    ) -> None:
        self.in_reasoning = thinking is True
        self.warnings: list[str] = []
        self._may_open = thinking is not False
        self._tools = tools
        self._new_id = new_id
        self._calls = 0
        self._text = ""  # what is not yet decided, from `_at` on
        self._at = 0
        self._scanner: ToolCallScanner | None = None  # holds the text of a call not yet whole
        self._edges = _EdgeLineBreaks()

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text → what is now certain."""
        self._text, self._at = self._text[self._at :] + text, 0
        return list(self._advance(final=False))

    def finish(self) -> list[Delta]:
        """No more text will come → what was held back."""
        return list(self._advance(final=True))

    def _advance(self, *, final: bool) -> Iterator[Delta]:
        if self._may_open:
            self._open(final=final)
        if self._may_open:
            return
        if self.in_reasoning:
            ends = (_END_THINK, OPEN_TAG) if self._tools else (_END_THINK,)
            thought, end = self._take_until(ends, final=final)
            if certain := self._edges.strip(thought):
                yield Delta(reasoning=certain)
            if not end:
                return
            self.in_reasoning, self._edges = False, _EdgeLineBreaks()
            if end == OPEN_TAG:
                self._scanner = ToolCallScanner()
        while True:
            if self._scanner is None:
                content, tag = self._take_until((OPEN_TAG,) if self._tools else (), final=final)
                yield from self._content(content)
                if not tag:
                    return
                self._scanner = ToolCallScanner()
            yield from self._advance_call(self._scanner, final=final)
            if self._scanner is not None:
                return

    def _open(self, *, final: bool) -> None:
        """Swallow the tag that opens a thought, once it is clear whether there is one."""
        self._text = self._text.lstrip("\n")
        if not final and self._text != _THINK and _THINK.startswith(self._text):
            return
        self._may_open = False
        if self._text.startswith(_THINK):
            self._at = len(_THINK)
            self.in_reasoning = True

    def _take_until(self, tags: tuple[str, ...], *, final: bool) -> tuple[str, str]:
        """Text up to the first of `tags`, and that tag; without one, the text that can be part of none, and ""."""
        start = self._at
        found = [(at, tag) for tag in tags if (at := self._text.find(tag, start)) >= 0]
        if found:
            at, tag = min(found)
            self._at = at + len(tag)
            return self._text[start:at], tag
        kept = 0 if final else max((_tag_prefix_length(self._text, tag, start) for tag in tags), default=0)
        self._at = len(self._text) - kept
        return self._text[start : self._at], ""

    def _advance_call(self, scanner: ToolCallScanner, *, final: bool) -> Iterator[Delta]:
        self._at = scanner.feed(self._text, self._at)
        if final:
            scanner.end()
        if scanner.undecided:
            return
        self._scanner = None
        taken = scanner.taken
        if scanner.problem is not None:
            self._warn(scanner.problem)
            self._take_back(taken[scanner.intact :])
            yield from self._content(OPEN_TAG + taken[: scanner.intact])
            return
        try:
            name, arguments = parse_tool_call(taken.removesuffix(CLOSE_TAG))
        except ValueError as problem:
            self._warn(str(problem))
            yield from self._content(OPEN_TAG + taken)
            return
        self._edges.call()
        yield Delta(tool_call=ToolCallDelta(self._calls, self._new_id(), name, arguments))
        self._calls += 1

    def _take_back(self, text: str) -> None:
        """Read the last text once more; it may reach back into earlier pieces."""
        if len(text) <= self._at:
            self._at -= len(text)
        else:
            self._text, self._at = text + self._text[self._at :], 0

    def _content(self, text: str) -> Iterator[Delta]:
        if certain := self._edges.strip(text):
            yield Delta(content=certain)

    def _warn(self, problem: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(f"a tool call was kept as text: {problem[:200]}")
        elif len(self.warnings) == MAX_WARNINGS:
            self.warnings.append("more tool calls were kept as text")


def parse_reply(text: str, *, thinking: bool | None = True, tools: bool = False) -> Reply:
    """Split a whole reply, as `ReplyParser` does; its warnings are logged."""
    parser = ReplyParser(thinking=thinking, tools=tools)
    reply = join_deltas(parser.feed(text) + parser.finish())
    for warning in parser.warnings:
        logging.getLogger("mlxqwen").warning("%s", warning)
    return reply


def join_deltas(deltas: Iterable[Delta]) -> Reply:
    """The reply that all its pieces make."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        reasoning.append(delta.reasoning or "")
        content.append(delta.content or "")
        if delta.tool_call is not None:
            calls.setdefault(delta.tool_call.index, []).append(delta.tool_call)
    joined = (
        ToolCall(pieces[0].id or "", pieces[0].name or "", "".join(piece.arguments for piece in pieces))
        for _, pieces in sorted(calls.items())
    )
    return Reply("".join(reasoning) or None, "".join(content), tuple(joined))


def _tag_prefix_length(text: str, tag: str, start: int) -> int:
    """The length of the longest end of `text`, from `start` on, that is the beginning of `tag`."""
    longest = min(len(text) - start, len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


class _EdgeLineBreaks:
    """`str.strip("\\n")` for text that comes in pieces, with calls between them."""

    def __init__(self) -> None:
        self._started = False
        self._pending = 0
        self._beside_call = False

    def call(self) -> None:
        """A call stands here."""
        self._beside_call = True

    def strip(self, text: str) -> str:
        inner = text.lstrip("\n")
        self._pending += len(text) - len(inner)
        if not inner:
            return ""
        pending = min(self._pending, 1) if self._beside_call else self._pending
        before = "\n" * pending if self._started else ""
        text, self._started, self._beside_call = inner, True, False
        inner = text.rstrip("\n")
        self._pending = len(text) - len(inner)
        return before + inner
