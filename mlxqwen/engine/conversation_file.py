"""A conversation as a JSON file: its messages and options, checked when it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxqwen.chat.request_files.conversations import CONVERSATION_FORMAT, parse_json_text
from mlxqwen.chat.turns import check_conversation
from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.files.atomic import reason_of, write_file
from mlxqwen.files.json_file import json_kind, parse_json, read_text
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.messages import to_plain_json

__all__ = ["read_conversation", "write_conversation"]

_MAX_BYTES = 256 * 2**20
# The options that a file may hold: none that lets it forge special tokens, none of this machine or call.
_OPTIONS = (
    "thinking",
    "thinking_budget",
    "early_stop_text",
    "tools",
    "sampling",
    "max_tokens",
    "seed",
    "stop",
    "stop_on_loop",
    "drop_oldest",
)
_HINT = "Give a file that Conversation.save, or /save in the chat, has written, or a list of messages."


def write_conversation(path: Path, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """Write the messages and the options that a file may hold, whole or not at all.

    Raises:
        MessagesError: no conversation, or a value that JSON cannot hold, such as NaN.
        OptionError: the file cannot be written.
    """
    if messages:
        check_conversation(messages)
    kept = {name: _plain_option(name, options[name]) for name in _OPTIONS if options.get(name) is not None}
    text = json.dumps(
        {"format": CONVERSATION_FORMAT, "messages": list(messages), "options": kept}, ensure_ascii=False, indent=1
    )
    try:
        parse_json(text)
    except ValueError as error:
        raise MessagesError(
            f"{path}: {error}; it could not be read again", hint="Leave it out, and save then."
        ) from None
    try:
        write_file(path, text.encode() + b"\n", private=True, keeps_mode=True)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{path}: cannot be written: {reason_of(error)}", hint="Choose a file in a folder that can be written to."
        ) from None


def read_conversation(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read messages and options from a file. The values of options are checked by whoever uses them.

    The file is one that `write_conversation` wrote, a list of messages, or an object with `messages` and optional
    `tools`.

    Raises:
        MessagesError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        text = read_text(path, error=MessagesError, max_bytes=_MAX_BYTES)
    except MessagesError as error:
        raise MessagesError(error.problem, hint=_HINT) from None
    value = _with_format(path, _parse(path, text))
    messages, options = value.get("messages"), value.get("options", {})
    if value["format"] != CONVERSATION_FORMAT:
        raise MessagesError(
            f"{path}: format: found {value['format']!r:.80}, expected {CONVERSATION_FORMAT!r}", hint=_HINT
        )
    for name in value:
        if name not in ("format", "messages", "options"):
            raise MessagesError(f"{path}: found {name!r}, expected format, messages and options", hint=_HINT)
    if not isinstance(messages, list):
        raise MessagesError(f"{path}: messages: found {json_kind(messages)}, expected a list", hint=_HINT)
    if not isinstance(options, dict):
        raise MessagesError(f"{path}: options: found {json_kind(options)}, expected an object", hint=_HINT)
    for name in options:
        if name not in _OPTIONS:
            raise MessagesError(f"{path}: options: found {name!r}, expected {', '.join(_OPTIONS)}", hint=_HINT)
    if messages:
        try:
            check_conversation(messages)
        except MessagesError as error:
            raise MessagesError(f"{path}: {error.problem}", hint=error.hint) from None
    return messages, options


def _parse(path: Path, text: str) -> Any:
    try:
        return parse_json_text(text, hint=_HINT)
    except OptionError as error:
        raise MessagesError(f"{path}: {error.problem}", hint=_HINT) from None


def _with_format(path: Path, value: Any) -> dict[str, Any]:
    """A list of messages, or an object of messages and tools, in the form that `write_conversation` writes."""
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise MessagesError(f"{path}: found {json_kind(value)}, expected an object or a list", hint=_HINT)
    if "format" in value or "options" in value:
        return {"format": None, **value}
    tools = value.pop("tools", None)
    return {"format": CONVERSATION_FORMAT, **value, "options": {} if tools is None else {"tools": tools}}


def _plain_option(name: str, value: Any) -> Any:
    if name == "sampling":
        given = dataclasses.asdict(value) if isinstance(value, SamplingParams) else dict(value)
        if given.get("logit_bias"):
            given["logit_bias"] = {
                str(token): bias for token, bias in given["logit_bias"].items()
            }  # JSON's keys are text
        value = given
    return to_plain_json(value, name)
