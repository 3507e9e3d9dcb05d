"""A reply as values: its reasoning, content and tool calls, whole or in pieces."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from mlxqwen.files.json_file import parse_json

__all__ = ["Delta", "Reply", "ToolCall", "ToolCallDelta", "join_deltas", "new_call_id"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called; `arguments` is the JSON text of an object, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call number `index`: its first piece has `id` and `name`; the pieces of `arguments` are joined."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply; `reasoning` is None where there was none."""

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def whole_calls(self) -> tuple[ToolCall, ...]:
        """The calls whose arguments are whole: a call that is kept to a schema may be cut off, by `max_tokens`."""
        return tuple(call for call in self.tool_calls if _is_object(call.arguments))


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a reply: of its reasoning, its content or a tool call; the other two are None."""

    reasoning: str | None = None
    content: str | None = None
    tool_call: ToolCallDelta | None = None


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def new_call_id() -> str:
    """An id in OpenAI's form: `call_` and 24 random characters."""
    return f"call_{os.urandom(12).hex()}"


def join_deltas(deltas: Iterable[Delta]) -> Reply:
    """The reply that these pieces make."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        reasoning.append(delta.reasoning or "")
        content.append(delta.content or "")
        if delta.tool_call is not None:
            calls.setdefault(delta.tool_call.index, []).append(delta.tool_call)
    joined = (
        ToolCall(pieces[0].id or "", pieces[0].name or "", "".join(piece.arguments for piece in pieces))
        for _, pieces in sorted(calls.items())
    )
    return Reply("".join(reasoning) or None, "".join(content), tuple(joined))
