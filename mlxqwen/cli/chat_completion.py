"""What Tab completes in `mlxqwen chat`: commands, and the files of those that take one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from mlxqwen.cli.chat_commands import COMMANDS

__all__ = ["ChatCompleter"]

_MOST_FILES = 1_000


class ChatCompleter(Completer):
    """Completes a command at the beginning of a line, and the file behind one that takes a file."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """The completions of what stands before the cursor."""
        typed = document.text_before_cursor.lstrip()
        command, blank, argument = typed.partition(" ")
        if blank and command in COMMANDS and COMMANDS[command].argument == "FILE":
            argument = argument.lstrip()
            for name, text in _files(argument):
                yield Completion(text, start_position=-len(argument), display=name)
        elif not blank and typed.startswith("/"):
            for name in COMMANDS:
                if name.startswith(typed):
                    yield Completion(name, start_position=-len(typed))


def _files(argument: str) -> Iterator[tuple[str, str]]:
    """Files that begin like `argument`: what to show, and the argument that names them, quoted where it must be."""
    path = _unquoted(argument)
    folder, begun = os.path.split(path)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(begun))
    except (OSError, ValueError):
        return
    for name, is_folder in found[:_MOST_FILES]:
        if name.isprintable() and (begun or not name.startswith(".")):
            whole = os.path.join(folder, name)
            quoted = shlex.quote(whole) if any(c.isspace() or c in "\"'\\#" for c in whole) else whole
            yield (f"{name}/", _open_folder(quoted)) if is_folder else (name, quoted)


def _open_folder(quoted: str) -> str:
    """A folder to go on from: with its slash, and without the quote that would end the name."""
    return f"{quoted.removesuffix(chr(39))}/" if quoted.endswith("'") else f"{quoted}/"


def _unquoted(argument: str) -> str:
    """The name that is being typed, whose quotes may still be open."""
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(argument + closing)
        except ValueError:
            continue
        if len(words) < 2:
            return "".join(words)
    return argument  # blanks without quotes: taken as they stand
