"""Lines typed into `mlxqwen chat`: messages to the model, or commands."""

from __future__ import annotations

from dataclasses import dataclass

from mlxqwen.cli.nearest import nearest
from mlxqwen.errors import OptionError

__all__ = ["ALIASES", "COMMANDS", "HELP", "HELP_INDENT", "ChatCommand", "Message", "parse_line"]


@dataclass(frozen=True, slots=True)
class ChatCommand:
    """A command and its argument, "" if it has none."""

    name: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """A message to the model."""

    text: str


@dataclass(frozen=True, slots=True)
class _Usage:
    argument: str  # as the help shows it; "" for none, in brackets if it may be left out
    help: str


COMMANDS = {
    "/think": _Usage("", "Let the model think before each answer."),
    "/no_think": _Usage("", "Let it answer without thinking, until /think or /budget."),
    "/budget": _Usage("[N|off]", "Let it think for at most N tokens, 0 for none; alone it tells."),
    "/reasoning": _Usage("[show|hide]", "Show reasoning or fold it; alone: that of the last answer."),
    "/system": _Usage("[TEXT|-]", "Set the system message; - removes it; alone it tells."),
    "/save": _Usage("FILE", "Write the conversation to a file."),
    "/load": _Usage("FILE", "Go on with a conversation from a file."),
    "/undo": _Usage("", "Forget the last message and its answer."),
    "/drop": _Usage("", "Forget the oldest message and its answer, for want of room."),
    "/retry": _Usage("", "Let the model answer the last message anew."),
    "/stats": _Usage("", "Tokens and speed of the last answer, and sampling."),
    "/clear": _Usage("", "Forget all messages but the system's."),
    "/help": _Usage("", "This list; so does /?."),
    "/quit": _Usage("", "Leave; so do /exit, /bye, exit, quit and Ctrl-D."),
}
ALIASES = {"/?": "/help", "/exit": "/quit", "/bye": "/quit"}

_NOTES = (
    "/no_think in a message is for that answer; // at its beginning sends one /.",
    "Alt-Enter or \\ before Enter begins another line; pasted lines stay together.",
    "Up and Ctrl-R bring earlier lines back; Tab completes commands and files.",
    "Ctrl-C stops an answer or clears the line; twice on an empty line it leaves.",
)

HELP_INDENT = 24
"""Columns before what a command does."""
HELP = "".join(f"{f'{name} {usage.argument}':<{HELP_INDENT}}{usage.help}\n" for name, usage in COMMANDS.items())
HELP += "\n" + "".join(f"{note}\n" for note in _NOTES)


def parse_line(text: str) -> Message | ChatCommand | None:
    """The message or command in a line; None if it is blank.

    Raises:
        OptionError: an unknown command, one that lacks its argument, or one that takes none.
    """
    stripped = text.strip()
    if not stripped:
        return None
    if not stripped.startswith("/"):
        return Message(text.rstrip("\n"))
    if stripped.startswith("//"):
        return Message(text.rstrip("\n").lstrip()[1:])
    name, *rest = stripped.split(maxsplit=1)
    name, argument = ALIASES.get(name, name), rest[0] if rest else ""
    if name not in COMMANDS:
        raise OptionError(f"{name}: found no such command", hint=_way_out(name))
    if argument and name in ("/think", "/no_think"):
        return Message(text.rstrip("\n"))  # the soft switch in front of a question
    expected = COMMANDS[name].argument
    if argument and not expected:
        raise OptionError(f"{name}: found {argument!r} behind it, expected nothing")
    if not argument and expected and not expected.startswith("["):
        raise OptionError(f"{name}: found nothing behind it, expected {expected}", hint=f"For example {name} chat.json")
    return ChatCommand(name, argument)


def _way_out(name: str) -> str:
    close = nearest(name, [*COMMANDS, *ALIASES]) if len(name) > 1 else []
    guess = f"Did you mean {close[0]}? " if close else "/help lists all. "
    return f"{guess}To send it to the model, begin with //."
