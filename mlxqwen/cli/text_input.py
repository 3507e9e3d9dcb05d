"""The user's text: from arguments, files and standard input."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import find_lone_surrogate

__all__ = ["check_unicode", "read_prompt", "read_text", "source_name"]

MAX_PROMPT_BYTES = 64 * 1024 * 1024

logger = logging.getLogger("mlxqwen")


def read_prompt(prompt: str | None, prompt_file: Path | None, *, raw: bool) -> str:
    """The prompt from the argument, the file, or standard input; the last line break of a file is its end, not text.

    Args:
        prompt: the text itself, or "-" for standard input.
        prompt_file: holds the text.
        raw: keep the last line break as well.

    Raises:
        click.UsageError: both are given, or neither while a terminal is the standard input.
        OptionError: not UTF-8, too large, or nothing but blanks.
    """
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("Give PROMPT or --prompt-file, not both.")
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise click.UsageError("Give a PROMPT, --prompt-file, or '-' for standard input.")
    if prompt is not None and prompt != "-":
        text = prompt
    else:
        text = read_text("-" if prompt_file is None else str(prompt_file), what="the prompt")
        text = text if raw else text.removesuffix("\n")
    if not text.strip():
        raise OptionError("prompt: found no text, expected a question", hint='For example: mlxqwen generate "Hello"')
    return text


def check_unicode(**texts: str | None) -> None:
    """Raise `OptionError` for an argument with bytes that are not UTF-8, which Python passes on as half surrogates."""
    for name, text in texts.items():
        if text is not None and (position := find_lone_surrogate(text)) is not None:
            raise OptionError(
                f"{name.replace('_', '-')}: found bytes that are not UTF-8 at character {position}, expected text",
                hint="Convert it to UTF-8 first.",
            )


def source_name(path: str) -> str:
    """The name of a file in errors, or "-"."""
    return "standard input" if path == "-" else path


def read_text(path: str, *, what: str, max_bytes: int = MAX_PROMPT_BYTES) -> str:
    """The text of a file, or of standard input for "-"; a user at a terminal is told that it is waited for.

    Args:
        path: of the file.
        what: is in it, in words.
        max_bytes: the most that is read.

    Raises:
        OptionError: not UTF-8, or too large.
    """
    if path == "-":
        if sys.stdin.isatty():
            logger.warning("type %s; Ctrl-D on an empty line ends it", what)
        return _decode(source_name(path), sys.stdin.buffer.read(max_bytes + 1), max_bytes)
    with open(path, "rb") as file:
        return _decode(path, file.read(max_bytes + 1), max_bytes)


def _decode(source: str, data: bytes, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise OptionError(f"{source}: found more than {max_bytes:,} bytes, the most that is read")
    try:
        return data.decode("utf-8-sig")  # some systems begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        in_line = f", in line {line}" if line > 1 else ""
        raise OptionError(
            f"{source}: found byte {data[error.start]:#04x} at {error.start}{in_line}, expected UTF-8 text",
            hint="Convert it to UTF-8 first.",
        ) from None
