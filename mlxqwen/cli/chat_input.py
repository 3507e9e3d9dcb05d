"""What the user of a chat types or pipes in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from mlxqwen.cli.chat_commands import COMMANDS

__all__ = ["Keyboard", "Lines", "Source"]

_PROMPT, _MORE = "> ", ". "


class Source(Protocol):
    """Where messages come from."""

    def read(self) -> str:
        """The next one.

        Raises:
            EOFError: there is none any more.
            KeyboardInterrupt: Ctrl-C.
        """


class Keyboard:
    """A line editor with history on the terminal; a message may have several lines."""

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

    def read(self) -> str:
        """What was typed until Enter."""
        return self._session.prompt()


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

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
