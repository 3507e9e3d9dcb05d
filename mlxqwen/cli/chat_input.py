"""The input of a chat: lines from the keyboard, a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from mlxqwen.cli.chat_commands import COMMANDS

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
    """

    def __init__(self) -> None:
        shown_on = sys.stdout if sys.stdout.isatty() else sys.stderr
        self._session: PromptSession[str] = PromptSession(
            message=_PROMPT,
            multiline=True,
            prompt_continuation=_MORE,
            key_bindings=_keys(),
            history=InMemoryHistory(),
            completer=_Commands(),
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


class _Commands(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/") and not any(map(str.isspace, typed)):
            for name in COMMANDS:
                if name.startswith(typed):
                    yield Completion(name, start_position=-len(typed))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def end_or_continue(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("c-c")
    @keys.add("<sigint>")
    def clear_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
