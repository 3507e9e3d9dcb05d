"""The input of a chat: lines from the keyboard, a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.history import History
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from mlxqwen.cli.chat_completion import ChatCompleter
from mlxqwen.cli.chat_keys import chat_keys

__all__ = ["Keyboard", "Lines", "Source"]

_PROMPT, _MORE = "> ", ". "


class Source(Protocol):
    """A source of lines."""

    def read(self) -> str:
        """The next line.

        Raises:
            EOFError: there is none any more.
            KeyboardInterrupt: Ctrl-C, where it has not ended the input.
        """


class Keyboard:
    """A line editor with history on the terminal; a message may have several lines.

    Ctrl-C clears a line that has text. On an empty one it is a KeyboardInterrupt, and the end at the second time in a
    row.

    Args:
        history: of the lines typed before.
    """

    def __init__(self, history: History) -> None:
        shown_on = sys.stdout if sys.stdout.isatty() else sys.stderr
        self._session: PromptSession[str] = PromptSession(
            message=_PROMPT,
            multiline=True,
            prompt_continuation=_MORE,
            key_bindings=chat_keys(),
            history=history,
            completer=ChatCompleter(),
            complete_while_typing=False,
            reserve_space_for_menu=0,
            enable_suspend=True,
            output=create_output(shown_on),
        )
        self._was_interrupted = False  # on an empty line, and nothing typed since
        self._session.default_buffer.on_text_changed += self._start_anew

    def read(self) -> str:
        """The text that was typed until Enter."""
        if not self._was_interrupted:
            self._drop_interrupts()
        try:
            text = self._session.prompt()
        except KeyboardInterrupt:
            if self._was_interrupted:
                raise EOFError from None
            self._was_interrupted = True
            raise
        self._was_interrupted = False
        return text

    def _start_anew(self, buffer: Buffer) -> None:
        self._was_interrupted = False

    def _drop_interrupts(self) -> None:
        """Drop each Ctrl-C that was typed before the prompt: it was meant for what ran then."""
        keyboard = self._session.app.input
        typed = get_typeahead(keyboard)
        with keyboard.raw_mode():
            while keys := keyboard.read_keys():
                typed += keys
        store_typeahead(keyboard, [key for key in typed if key.key is not Keys.ControlC])


class Lines:
    """One message a line, from a file or pipe."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines: Iterator[str] = iter(lines)

    def read(self) -> str:
        """The next line."""
        for line in self._lines:
            return line.removesuffix("\n")
        raise EOFError
