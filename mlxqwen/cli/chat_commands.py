"""Lines typed into `mlxqwen chat`: messages to the model, or commands."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from mlxqwen.errors import OptionError

__all__ = ["COMMANDS", "HELP", "ChatCommand", "Message", "parse_line"]


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
    "/think": _Usage("", "Let the model think before each answer that follows."),
    "/no_think": _Usage("", "Let it answer without thinking, until /think or /budget."),
    "/budget": _Usage("[N|off]", "Let it think for at most N tokens, 0 for none; off is no limit; alone it tells."),
    "/reasoning": _Usage("[show|hide]", "Keep reasoning on the screen or fold it into a line; alone shows the last."),
    "/system": _Usage("[TEXT|-]", "Set the system message; - removes it; alone it tells."),
    "/save": _Usage("FILE", "Write the conversation to a file; a name with blanks stands in quotes."),
    "/load": _Usage("FILE", "Go on with a conversation from a file."),
    "/undo": _Usage("", "Forget the last message and its answer."),
    "/drop": _Usage("", "Forget the oldest message and its answer, for want of room."),
    "/retry": _Usage("", "Let the model answer the last message anew."),
    "/stats": _Usage("", "Tokens and speed of the last answer, and what following ones are drawn with."),
    "/clear": _Usage("", "Forget all messages but the system's."),
    "/help": _Usage("", "This list."),
    "/quit": _Usage("", "Leave; so does Ctrl-D."),
}

_NOTES = (
    "/think and /no_think alone on a line are switches for all that follows. As words in a message, at its beginning "
    "too, they go to the model, which follows the latest of them; while /no_think is set it does not think, whatever "
    "they say.",
    "A message that begins with // is sent with one / less.",
    "Alt-Enter, or a \\ at the end of a line, begins another line; pasted lines stay one message. The up arrow brings "
    "earlier messages back, Tab completes commands.",
    "Ctrl-C stops an answer, and what was shown of it stays; at the prompt it clears the line, and "
    "twice on an empty one leaves.",
)

HELP = "".join(f"{f'{name} {usage.argument}':<26}{usage.help}\n" for name, usage in COMMANDS.items())
HELP += "".join(f"\n{note}\n" for note in _NOTES)


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
    argument = rest[0] if rest else ""
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
    close = get_close_matches(name, COMMANDS, n=1)
    guess = f"Did you mean {close[0]}? " if close else "/help lists all. "
    return f"{guess}To send it to the model, begin with //."
