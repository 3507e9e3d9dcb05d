"""Text → reasoning, content and tool calls: a stream state machine that knows no model and no arrays.

Qwen3 thinks between `<think>` and `</think>` and answers behind it; in the answer a call stands between `<tool_call>`
and `</tool_call>`. Pieces of text go in as they come, in any cut; only what could still be part of a tag, a call not
yet whole, and line breaks that may turn out to be at an edge are held back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlxqwen.chat.old_tool_call_text import ToolCallScanner, parse_tool_call
from mlxqwen.chat.reply import Delta, ToolCallDelta, new_call_id
from mlxqwen.chat.reply_tags import TEXT_TAGS, ReplyTags

__all__ = ["ReplyParser"]

MAX_WARNINGS = 20


class ReplyParser:
    """Splits a reply while it is being written.

    Think tags count only around the reply's first thought; in the content they are text. A call counts once all of it
    is there and its JSON is sound. A broken or unfinished one is content, exactly as written, and `warnings` says what
    is wrong with it; what is behind it counts. A call ends a thought, sound or not, and the `</think>` that may still
    follow is no content either; a `<tool_call>` with no object behind it is only talked about, and stays in the
    thought. Line breaks around a call are no content, except that texts before and behind it stay on lines of their
    own.

    Args:
        thinking: True if the reply is known to begin in thought: then everything up to `</think>` is reasoning, whether
            or not the model opens its own tag. False if it is known not to: then everything is content. None if the
            reply decides: it is reasoning if it opens with `<think>`, else content.
        tools: whether the model was given tools. If so, `<tool_call>` begins a call and ends reasoning still open; if
            not, it is text.
        new_id: makes the ids of the calls.
        tags: what stands for the tags in the text.

    Attributes:
        warnings: what was wrong with calls that were kept as text.
        length: characters fed so far.
        reasoning_start, reasoning_end: where among them the thought begins and ends; None while that is not known.
    """

    def __init__(
        self,
        *,
        thinking: bool | None = True,
        tools: bool = False,
        new_id: Callable[[], str] = new_call_id,
        tags: ReplyTags = TEXT_TAGS,
    ) -> None:
        self.warnings: list[str] = []
        self.length = 0
        self.reasoning_start = 0 if thinking else None
        self.reasoning_end: int | None = None
        self._may_open = thinking is not False
        self._in_thought = thinking is True
        self._end_think_due = thinking is True
        self._tools = tools
        self._new_id = new_id
        self._tags = tags
        self._calls = 0
        self._text = ""  # what is not yet decided, from `_at` on
        self._at = 0
        self._scanner: ToolCallScanner | None = None  # holds the text of a call not yet whole
        self._scanned_from = 0
        self._edges = _EdgeLineBreaks()

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends in reasoning; not while it may be a call that ends it."""
        return self._in_thought and self._scanner is None

    @property
    def may_reason(self) -> bool:
        """Whether reasoning goes on or may still come."""
        return self._in_thought or self._may_open

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text → what is now certain."""
        self.length += len(text)
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
        while True:
            if self._scanner is None:
                text, tag = self._take_until(self._tags_to_come, final=final)
                yield from self._shown(text)
                if tag == self._tags.end_think:
                    self._end_think()
                    continue
                if not tag:
                    return
                self._scanner, self._scanned_from = ToolCallScanner(self._tags), self._position - len(tag)
            yield from self._advance_call(self._scanner, final=final)
            if self._scanner is not None:
                return

    @property
    def _position(self) -> int:
        """How many of the characters fed are taken."""
        return self.length - len(self._text) + self._at

    @property
    def _tags_to_come(self) -> tuple[str, ...]:
        tags = (self._tags.end_think,) if self._end_think_due else ()
        return (*tags, self._tags.tool_call) if self._tools else tags

    def _open(self, *, final: bool) -> None:
        """Swallow the tag that opens a thought, once it is clear whether there is one."""
        tag, rest = self._tags.think, self._text.lstrip("\n")
        self._at = len(self._text) - len(rest)
        if not final and rest != tag and tag.startswith(rest):
            return
        self._may_open = False
        if rest.startswith(tag):
            self._at += len(tag)
            self._in_thought = self._end_think_due = True
            self.reasoning_start = self._position

    def _end_think(self) -> None:
        """`</think>`: of the thought, or left over from one that a call has ended."""
        self._end_think_due = False
        if self._in_thought:
            self._end_thought(self._position - len(self._tags.end_think))
        else:
            self._edges.cut()

    def _end_thought(self, end: int) -> None:
        self._in_thought, self.reasoning_end, self._edges = False, end, _EdgeLineBreaks()

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
        taken, intact = scanner.taken, scanner.intact
        if scanner.problem is None:
            try:
                name, arguments = parse_tool_call(self._tags.spell(taken.removesuffix(self._tags.end_tool_call)))
            except ValueError as problem:
                scanner.problem, intact = str(problem), len(taken)
        if scanner.problem is not None:
            self._warn(scanner.problem)
            self._take_back(taken[intact:])
            if self._in_thought and taken.lstrip(" \t\r\n").startswith("{"):
                self._end_thought(self._scanned_from)
            yield from self._shown(self._tags.tool_call + taken[:intact])
            return
        if self._in_thought:
            self._end_thought(self._scanned_from)
        self._edges.cut()
        yield Delta(tool_call=ToolCallDelta(self._calls, self._new_id(), name, arguments))
        self._calls += 1

    def _take_back(self, text: str) -> None:
        """Read the last text once more; it may reach back into earlier pieces."""
        if len(text) <= self._at:
            self._at -= len(text)
        else:
            self._text, self._at = text + self._text[self._at :], 0

    def _shown(self, text: str) -> Iterator[Delta]:
        if certain := self._tags.spell(self._edges.strip(text)):
            yield Delta(reasoning=certain) if self._in_thought else Delta(content=certain)

    def _warn(self, problem: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(f"a tool call was kept as text: {problem[:200]}")
        elif len(self.warnings) == MAX_WARNINGS:
            self.warnings.append("more tool calls were kept as text")


def _tag_prefix_length(text: str, tag: str, start: int) -> int:
    """The length of the longest end of `text`, from `start` on, that is the beginning of `tag`."""
    longest = min(len(text) - start, len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


class _EdgeLineBreaks:
    """`str.strip("\\n")` for text that comes in pieces, with calls and the like between them."""

    def __init__(self) -> None:
        self._started = False
        self._pending = 0
        self._beside_cut = False

    def cut(self) -> None:
        """A call stands here, or something else that is not shown."""
        self._beside_cut = True

    def strip(self, text: str) -> str:
        inner = text.lstrip("\n")
        self._pending += len(text) - len(inner)
        if not inner:
            return ""
        pending = min(self._pending, 1) if self._beside_cut else self._pending
        before = "\n" * pending if self._started else ""
        text, self._started, self._beside_cut = inner, True, False
        inner = text.rstrip("\n")
        self._pending = len(text) - len(inner)
        return before + inner
