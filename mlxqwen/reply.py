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
        thinking: True if the reply is known to begin in thought: then everything up to `</think>` is reasoning, whether
            or not the model opens its own tag. False if it is known not to: then everything is content. None if the
            reply decides: it is reasoning if it opens with `<think>`, else content.
    """

    def __init__(self, *, thinking: bool | None = True) -> None:
        self.in_reasoning = thinking is True
        self._may_open = thinking is not False
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
            self._held = self._held.lstrip("\n")
            if not final and self._held != _OPEN and _OPEN.startswith(self._held):
                return
            self._may_open = False
            if self._held.startswith(_OPEN):
                self._held = self._held.removeprefix(_OPEN)
                self.in_reasoning = True
        if self.in_reasoning:
            before, close, after = self._held.partition(_CLOSE)
            kept = 0 if final or close else _tag_prefix_length(before, _CLOSE)
            self._held = before[len(before) - kept :]
            if certain := self._edges.strip(before[: len(before) - kept]):
                yield Delta(reasoning=certain)
            if not close:
                return
            self.in_reasoning, self._held, self._edges = False, after, _EdgeLineBreaks()
        content, self._held = self._held, ""
        if certain := self._edges.strip(content):
            yield Delta(content=certain)


def parse_reply(text: str, *, thinking: bool | None = True) -> Reply:
    """Split a whole reply; `thinking` as for `ReplyParser`."""
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
        self._pending = 0

    def strip(self, text: str) -> str:
        if not self._started:
            text = text.lstrip("\n")
            self._started = bool(text)
        inner = text.rstrip("\n")
        pending, self._pending = self._pending, len(text) - len(inner)
        if not inner:
            self._pending += pending
            return ""
        return "\n" * pending + inner
