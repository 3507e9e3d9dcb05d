"""A prompt that the context has no room for: which part of it takes the room, and what can be done in the chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mlxqwen.chat.prompts import said_of_extending, shortest_prompt
from mlxqwen.chat.turns import count_turns, prepare_conversation, without_oldest_turns
from mlxqwen.engine.engine import Engine
from mlxqwen.errors import ContextLengthError, MlxqwenError, OptionError

__all__ = ["check_system_fits", "explained"]

_OF_TURNS = (
    "/drop forgets the oldest turn, /clear all of them. Started with --drop-oldest the chat leaves old turns out by "
    "itself, with --max-kv-size it slides over them{extend}."
)
_ALONE = "Started with --max-kv-size the chat slides over its beginning{extend}."
_OF_SYSTEM = "/system TEXT sets a shorter system message, /system - removes it."
_SYSTEM, _FUNCTIONS = "system message", "functions of --tools"


def explained(
    error: ContextLengthError, engine: Engine, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> ContextLengthError:
    """The error for a prompt that is too long, with what can be done about it in the chat.

    Args:
        error: the engine's.
        engine: whose context has no room.
        messages: that were to be sent, the new one the last.
        options: of the turn.
    """
    extends = said_of_extending(error.hint)
    flags = [flag for flag in ("--yarn auto", "--yarn-factor") if flag in extends]
    extend = f", {' or '.join(flags)} extends the context" if flags else ""
    return ContextLengthError(error.problem, hint=_way_out(engine, messages, options, extend))


def _way_out(engine: Engine, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], extend: str) -> str:
    room = engine.model.config.context_length - (shortest_prompt(engine.tokenizer) or 1)
    turns = count_turns(messages)
    last = prepare_conversation(without_oldest_turns(messages, turns - 1))
    systems = [message for message in last if message["role"] == "system"]
    others = [message for message in last if message["role"] != "system"]
    said = "message" if len(others) == 1 else "last message, with the calls and results behind it,"
    parts = {
        said: _tokens(engine, [message["content"] or "" for message in others], room),
        _SYSTEM: _tokens(engine, [message["content"] or "" for message in systems], room),
        _FUNCTIONS: _of_tools(engine, options.get("tools")),
    }
    alone = _ALONE.format(extend=extend)
    for part, way in ((said, "Shorten it."), (_SYSTEM, _OF_SYSTEM), (_FUNCTIONS, "Start the chat with fewer of them.")):
        count, told = parts[part]
        if count > room:
            return f"The {part} {'take' if part == _FUNCTIONS else 'takes'} {told} tokens. {way} {alone}"
    if sum(count for count, _ in parts.values()) <= room and turns > 1 and not options.get("drop_oldest"):
        return _OF_TURNS.format(extend=extend)
    others_told = "".join(f", the {part} {parts[part][1]}" for part in (_SYSTEM, _FUNCTIONS) if parts[part][0])
    way = f"Shorten one of them: {_OF_SYSTEM}" if parts[_SYSTEM][0] else "Shorten it."
    return f"The {said} takes {parts[said][1]} tokens{others_told}. {way} {alone}"


def check_system_fits(engine: Engine, text: str, options: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a system message behind which no message has room.

    Args:
        engine: that would read it.
        text: of the system message.
        options: of the chat; a window that slides has room for any.
    """
    context = engine.model.config.context_length
    if options.get("max_kv_size") is not None and options["max_kv_size"] <= context:
        return
    room = context - (shortest_prompt(engine.tokenizer) or 1)
    count, told = _tokens(engine, [text], room)
    if count > room:
        raise OptionError(
            f"/system: found {told} tokens, but the model's context of {context:,} has to hold messages and answers, "
            "too",
            hint="Shorten it: nothing has changed. Started with --max-kv-size the chat slides over its beginning.",
        )


def _tokens(engine: Engine, texts: Sequence[str], room: int) -> tuple[int, str]:
    """The tokens of texts, and the number in words: a lower bound where that tells enough."""
    least = sum(engine.tokenizer.least_tokens(text) for text in texts)
    if least > room:  # encoding megabytes takes seconds
        return least, f"at least {least:,}"
    count = sum(len(engine.tokenizer.encode_plain(text)) for text in texts)
    return count, f"{count:,}"


def _of_tools(engine: Engine, tools: Sequence[Mapping[str, Any]] | None) -> tuple[int, str]:
    """What schemas add to a prompt."""
    count = 0
    if tools:
        asked = [{"role": "user", "content": "a"}]
        with suppress(MlxqwenError):
            count = len(engine.prompt(asked, tools=tools)) - len(engine.prompt(asked))
    return count, f"{count:,}"
