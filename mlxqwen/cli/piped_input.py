"""What is piped in beside a prompt: its context, read only where it is certain to come."""

from __future__ import annotations

import os
import re
import select
import stat
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from mlxqwen.cli.text_input import read_text

__all__ = ["PromptWords", "read_context", "with_context"]

_SECONDS = 1.0
_PLACE = re.compile(r"(?<!\S)-[^\S\n]*$", re.MULTILINE)


class PromptWords(NamedTuple):
    """PROMPT as it was typed: a text, or what stands before and behind `-`, where standard input goes.

    Args:
        prompt: the text, "-" for standard input, None without any.
        before, after: texts around it.
    """

    prompt: str | None
    before: str = ""
    after: str = ""

    @classmethod
    def parse(cls, words: Sequence[str]) -> PromptWords:
        """The words of the command line. Raises `click.UsageError` for several without a `-` among them."""
        if len(words) < 2:
            return cls(*words) if words else cls(None)
        if len(words) > 3 or list(words).count("-") != 1 or (len(words) == 3 and words[1] != "-"):
            raise click.UsageError(
                f"Got unexpected extra argument ({words[1]}): a PROMPT of several words stands in quotes; "
                "'-' before, behind or between two texts is where standard input goes."
            )
        place = list(words).index("-")
        return cls("-", " ".join(words[:place]), " ".join(words[place + 1 :]))

    def around(self, text: str, *, raw: bool) -> str:
        """The text of standard input between what was typed around it: paragraphs, or `raw`, as they are."""
        parts = [part for part in (self.before, text, self.after) if part]
        return ("" if raw else "\n\n").join(parts)


def read_context() -> str:
    """What was piped in, without its last line break; "" if that is nothing.

    Nobody asked for it: a terminal, a device or a socket is not read, and of a pipe on which neither data nor its end
    arrives within a second nothing is waited for, as it may be one that a parent process has left open.

    Raises:
        OptionError: not UTF-8, or too large.
    """
    if not _has_arrived():
        return ""
    text = read_text("-", what="the context").removesuffix("\n")
    return text if text.strip() else ""


def _has_arrived() -> bool:
    if sys.stdin.isatty():
        return False
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):  # something in memory, which is all there
        return True
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode):
        return bool(select.select([descriptor], [], [], _SECONDS)[0])
    return stat.S_ISREG(mode)


def with_context(prompt: str, context: str) -> str:
    """The context as a paragraph before the prompt, or where the prompt has a lone `-` at the end of a line."""
    places = list(_PLACE.finditer(prompt))
    if len(places) != 1:
        return f"{context}\n\n{prompt}"
    start, end = places[0].span()
    before, after = prompt[:start].rstrip(), prompt[end:].lstrip()
    return "\n\n".join(part for part in (before, context, after) if part)
