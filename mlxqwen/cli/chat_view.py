"""The view of a chat: on a terminal, and in pipes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from mlxqwen.chat.reply import Delta
from mlxqwen.cli.chat_markdown import StreamedMarkdown, wrap
from mlxqwen.cli.chat_screen import LiveLines, terminal_size
from mlxqwen.cli.chat_thought import Thought
from mlxqwen.console import Output
from mlxqwen.engine.events import Done

__all__ = ["ChatView", "PlainView", "ReplyView", "TerminalView"]

_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"
_INTERVAL = 0.04  # seconds between two drawings at least
_SHARE = 0.1  # of the time that drawing may take


class ReplyView(Protocol):
    """One reply while it comes."""

    def show(self, delta: Delta) -> None:
        """Show the next piece."""

    def end(self, done: Done | None = None) -> None:
        """Finish the last line; `done` is None for a reply that was stopped or failed, whose thought is shown whole."""


class ChatView(Protocol):
    """Shows a chat.

    Attributes:
        folds_reasoning: whether reasoning is folded into a line when it is over.
    """

    folds_reasoning: bool

    def reply(self) -> ReplyView:
        """Begin a new reply."""

    def say(self, text: str, *, hanging: int = 0) -> None:
        """Show lines that are no reply: the program's own, or what a user or a file has said.

        Args:
            hanging: columns by which the rest of a line that is too long for a terminal is indented.
        """


class TerminalView:
    """Markdown and dim reasoning, on a terminal that can move its cursor.

    Args:
        stream: the terminal.
        count_tokens: of a text of reasoning.
    """

    def __init__(self, stream: TextIO, count_tokens: Callable[[str], int]) -> None:
        self.folds_reasoning = True
        self._stream = stream
        self._count_tokens = count_tokens

    def reply(self) -> ReplyView:
        """Begin a new reply."""
        return _TerminalReply(self._stream, Thought(folds=self.folds_reasoning, count_tokens=self._count_tokens))

    def say(self, text: str, *, hanging: int = 0) -> None:
        """Show lines, wrapped between words."""
        lines = wrap(text.rstrip("\n"), terminal_size(self._stream).columns, hanging=hanging)
        Output(self._stream).write("\n".join(lines) + "\n")


class _TerminalReply:
    def __init__(self, stream: TextIO, thought: Thought) -> None:
        self._stream = stream
        self._thought = thought
        self._is_styled = not os.environ.get("NO_COLOR")
        self._markdown = StreamedMarkdown(styled=self._is_styled)
        self._has_content = False
        self._screen = LiveLines(stream)
        self._due = 0.0

    def show(self, delta: Delta) -> None:
        if delta.reasoning is not None:
            self._thought.feed(delta.reasoning)
        elif delta.content is not None:
            if not self._has_content:
                self._thought.end()
            self._has_content = True
            self._markdown.feed(delta.content)
        began = time.monotonic()
        if began >= self._due:
            self._draw()
            ended = time.monotonic()
            self._due = ended + max(_INTERVAL, (ended - began) / _SHARE)

    def end(self, done: Done | None = None) -> None:
        if done is not None:
            self._thought.end(done.usage.reasoning_tokens, cut_off=done.usage.budget_exhausted)
        elif not self._has_content:
            self._thought.unfold()
            self._thought.end()
        self._draw()
        self._screen.close()
        self._stream.write("\n")
        self._stream.flush()

    def _draw(self) -> None:
        columns, rows = terminal_size(self._stream)
        thought = self._thought.lines(columns, rows - 1)
        if self._is_styled:
            thought = [f"{_DIM}{line}{_NORMAL}" if line else "" for line in thought]
        content = self._markdown.lines(columns)
        self._screen.update([*thought, *([""] if thought and content else []), *content])


class PlainView:
    """Text as the model writes it, for pipes and files.

    Args:
        answers: for content alone.
        others: for reasoning and for all that is said besides.
        folds_reasoning: show one line instead of the reasoning.
        count_tokens: of a text of reasoning.
    """

    def __init__(
        self, answers: TextIO, others: TextIO, *, folds_reasoning: bool, count_tokens: Callable[[str], int]
    ) -> None:
        self.folds_reasoning = folds_reasoning
        self._answers, self._others = Output(answers), Output(others)
        self._thoughts = Output(others, dim=True)
        self._count_tokens = count_tokens

    def reply(self) -> ReplyView:
        """Begin a new reply."""
        thought = Thought(folds=True, count_tokens=self._count_tokens) if self.folds_reasoning else None
        return _PlainReply(self._answers, self._thoughts, thought)

    def say(self, text: str, *, hanging: int = 0) -> None:
        """Show lines."""
        self._others.write(text.rstrip("\n") + "\n")


class _PlainReply:
    def __init__(self, answers: Output, thoughts: Output, folded: Thought | None) -> None:
        self._answers = answers
        self._thoughts = thoughts
        self._folded = folded

    def show(self, delta: Delta) -> None:
        if delta.reasoning is not None:
            if self._folded is None:
                self._thoughts.write(delta.reasoning)
            else:
                self._folded.feed(delta.reasoning)
        elif delta.content is not None:
            self._end_thought()
            self._answers.write(delta.content)

    def end(self, done: Done | None = None) -> None:
        if done is None and self._folded is not None:
            self._folded.unfold()
        self._end_thought()
        self._answers.end_line()

    def _end_thought(self) -> None:
        if self._folded is not None:
            self._folded.end()
            for line in self._folded.lines(80, 1):
                self._thoughts.write(f"{line}\n")
            self._folded = None
        self._thoughts.end_line()
