"""Text → reasoning and content: a stream state machine that knows no model and no arrays.

Qwen3 thinks between `<think>` and `</think>` and answers behind it. Pieces of text go in as they come, in any cut; only
what could still be part of a tag, or line breaks that may turn out to be at an edge, is held back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Delta", "Reply", "ReplyParser", "parse_reply"]

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply; `reasoning` is None where there was none."""

    reasoning: str | None
    content: str


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a reply: of its reasoning or of its content, the other is None."""

    reasoning: str | None = None
    content: str | None = None


class ReplyParser:
    """Splits a reply while it is being written.

    Args:
        thinking: whether the model was asked to think. Then everything up to `</think>` is reasoning, whether or not
            the model opens its own tag; otherwise everything is content.
    """

    def __init__(self, *, thinking: bool = True) -> None:
        self.in_reasoning = thinking
        self._may_open = thinking
        self._held = ""
        self._edges = _EdgeLineBreaks()

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text → what is now certain."""
        self._held += text
        return list(self._advance(final=False))

    def finish(self) -> list[Delta]:
        """No more text will come → what was held back."""
        return list(self._advance(final=True))

    def _advance(self, *, final: bool) -> Iterator[Delta]:
        if self._may_open:
            start = self._held.lstrip("\n")
            if not final and start != _OPEN and _OPEN.startswith(start):
                return
            if start.startswith(_OPEN):
                self._held = start.removeprefix(_OPEN)
            self._may_open = False
        if self.in_reasoning:
            before, close, after = self._held.partition(_CLOSE)
            if not close:
                kept = 0 if final else _tag_prefix_length(before, _CLOSE)
                self._held = before[len(before) - kept :]
                before = before[: len(before) - kept]
            if certain := self._edges.strip(before):
                yield Delta(reasoning=certain)
            if not close:
                return
            self.in_reasoning, self._held, self._edges = False, after, _EdgeLineBreaks()
        content, self._held = self._held, ""
        if certain := self._edges.strip(content):
            yield Delta(content=certain)


def parse_reply(text: str, *, thinking: bool = True) -> Reply:
    """Split a whole reply."""
    parser = ReplyParser(thinking=thinking)
    deltas = parser.feed(text) + parser.finish()
    reasoning = "".join(delta.reasoning or "" for delta in deltas)
    return Reply(reasoning or None, "".join(delta.content or "" for delta in deltas))


def _tag_prefix_length(text: str, tag: str) -> int:
    """The length of the longest end of `text` that is the beginning of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


class _EdgeLineBreaks:
    """`str.strip("\\n")` for text that comes in pieces."""

    def __init__(self) -> None:
        self._started = False
        self._pending = ""

    def strip(self, text: str) -> str:
        if not self._started:
            text = text.lstrip("\n")
            self._started = bool(text)
        text = self._pending + text
        certain = text.rstrip("\n")
        self._pending = text[len(certain) :]
        return certain
