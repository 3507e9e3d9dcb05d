"""The parser of replies as text: reasoning, content and tool calls, with tags told by their spelling."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from mlxqwen.chat.reply import Delta, Reply, join_deltas, new_call_id
from mlxqwen.chat.splitter import Splitter
from mlxqwen.chat.tags import Tag
from mlxqwen.errors import OptionError

__all__ = ["ReplyParser", "TagLexer", "parse_reply"]

_LONGEST_TAG = max(len(tag.value) for tag in Tag)


class TagLexer:
    """Finds tags in text that comes in pieces, for a `Splitter`; positions are characters.

    Only what may become a tag that the splitter awaits is held back. Each character is searched once; those held back,
    fewer than a tag has, are searched once more.

    Args:
        splitter: takes the pieces.
        tags: those that text spells.

    Attributes:
        length: characters fed so far.
    """

    def __init__(self, splitter: Splitter, tags: Iterable[Tag] = Tag) -> None:
        self.length = 0
        self._splitter = splitter
        self._tags = tuple(tags)
        self._pattern = re.compile("|".join(re.escape(tag.value) for tag in self._tags))
        self._held = ""

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text → the deltas that are now certain."""
        self.length += len(text)
        text, self._held = self._held + text, ""
        return self._search(text, self.length - len(text))

    def _search(self, text: str, start: int) -> list[Delta]:
        """Search `text`, which begins at position `start`."""
        take = self._splitter.take
        deltas: list[Delta] = []
        at = 0
        for found in self._pattern.finditer(text):
            if at < found.start():
                deltas += take(text[at : found.start()], start + at, start + found.start())
            at = found.end()
            deltas += take(Tag(found[0]), start + found.start(), start + at)
        tail = text.rfind("<", max(at, len(text) - _LONGEST_TAG + 1))
        if tail < 0:
            return deltas + take(text[at:], start + at, self.length) if at < len(text) else deltas
        if at < tail:
            deltas += take(text[at:tail], start + at, start + tail)
        rest = text[tail:]
        if any(tag.value.startswith(rest) and self._splitter.awaits(tag) for tag in self._tags):
            self._held = rest
            return deltas
        return deltas + take(rest, start + tail, self.length)

    def feed_tag(self, tag: Tag) -> list[Delta]:
        """Take a tag that has a token of its own → the deltas that are now certain."""
        deltas = self._flush()
        start = self.length
        self.length += len(tag.value)
        return deltas + self._splitter.take(tag, start, self.length)

    def finish(self) -> list[Delta]:
        """End the text and the splitter → the deltas that were held back."""
        return self._flush() + self._splitter.finish()

    def _flush(self) -> list[Delta]:
        held, self._held = self._held, ""
        return self._splitter.take(held, self.length - len(held), self.length) if held else []


class ReplyParser:
    """Splits a reply while it is being written, by the rules of `mlxqwen.chat.splitter.Splitter`.

    Args:
        thinking: True if the reply is known to begin in thought: then everything up to `</think>` is reasoning, whether
            or not the model opens its own tag. False if it is known not to: then everything is content. None if the
            reply decides: it is reasoning if it opens with `<think>`, else content.
        tools: whether the model was given tools. If so, `<tool_call>` begins a call and ends reasoning still open; if
            not, it is text.
        new_id: makes the ids of the calls.
    """

    def __init__(
        self, *, thinking: bool | None = True, tools: bool = False, new_id: Callable[[], str] = new_call_id
    ) -> None:
        self._splitter = Splitter(thinking=thinking, tools=tools, new_id=new_id, spelled=list(Tag))
        self._lexer = TagLexer(self._splitter)

    @property
    def warnings(self) -> list[str]:
        """Why calls were kept as text."""
        return self._splitter.warnings

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends in reasoning; not while it may be a call that ends it."""
        return self._splitter.in_reasoning

    @property
    def may_reason(self) -> bool:
        """Whether reasoning continues or may still begin."""
        return self._splitter.may_reason

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text → the deltas that are now certain."""
        return self._lexer.feed(text)

    def finish(self) -> list[Delta]:
        """End the text → the deltas that were held back."""
        return self._lexer.finish()


def parse_reply(text: str, *, thinking: bool | None = True, tools: bool = False) -> Reply:
    """Split a whole reply, as `ReplyParser` does; its warnings are logged. Raises `OptionError` if it is no text."""
    if not isinstance(text, str):
        raise OptionError(f"text: found {type(text).__name__}, expected a string")
    parser = ReplyParser(thinking=thinking, tools=tools)
    reply = join_deltas(parser.feed(text) + parser.finish())
    for warning in parser.warnings:
        logging.getLogger("mlxqwen").warning("%s", warning)
    return reply
