"""A thought on the screen: its text while it comes, and one line when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from mlxqwen.cli.chat_markdown import wrap
from mlxqwen.console import counted

__all__ = ["Thought", "thought_line"]

_SHOWN_LINES = 6  # of a thought that goes on


def thought_line(seconds: float, tokens: int, *, cut_off: bool = False) -> str:
    """For example `Thought for 3.2 s, 214 tokens`."""
    return f"Thought for {seconds:.1f} s, {counted(tokens, 'token')}{', its whole budget' * cut_off}"


class Thought:
    """Reasoning, folded into one line at its end or not.

    Args:
        folds: show but the last lines while it goes on, and one in their place when it is over.
        count_tokens: of a text; for the line as long as the reply has not told.
    """

    def __init__(self, *, folds: bool, count_tokens: Callable[[str], int]) -> None:
        self._folds = folds
        self._count_tokens = count_tokens
        self._paragraphs = [""]
        self._lines: list[str] = []  # of all paragraphs but the last, for `_width`
        self._wrapped = 0  # of them, how many
        self._width = 0
        self._began = 0.0
        self._seconds: float | None = None
        self._line = ""

    def feed(self, text: str) -> None:
        """Take the next piece."""
        self._began = self._began or time.monotonic()
        first, *more = text.split("\n")
        self._paragraphs[-1] += first
        self._paragraphs += more

    def end(self, tokens: int | None = None, *, cut_off: bool = False) -> None:
        """End the thought; `tokens` is the reply's own count, None if it has none."""
        if not self._began:
            return
        if self._seconds is None:
            self._seconds = time.monotonic() - self._began
        if tokens is None:
            tokens = self._count_tokens("\n".join(self._paragraphs))
        self._line = thought_line(self._seconds, tokens, cut_off=cut_off)

    def unfold(self) -> None:
        """Show all of it from now on."""
        self._folds = False

    def lines(self, width: int, height: int) -> list[str]:
        """The lines to show, at most `width` columns wide; at most `height` lines of a folded thought."""
        if not self._began:
            return []
        if not self._folds:
            return self._all(width) + [self._line] * bool(self._line)
        if self._line:
            return [self._line]
        last = "\n".join(self._paragraphs[-_SHOWN_LINES:])[-_SHOWN_LINES * width :]
        shown = max(0, min(_SHOWN_LINES, height - 1))
        return ["Thinking…", *wrap(last, width)[-shown:]] if shown else ["Thinking…"]

    def _all(self, width: int) -> list[str]:
        if width != self._width:
            self._lines, self._wrapped, self._width = [], 0, width
        for paragraph in self._paragraphs[self._wrapped : -1]:
            self._lines += wrap(paragraph, width)
        self._wrapped = len(self._paragraphs) - 1
        return self._lines + wrap(self._paragraphs[-1], width)
