"""Calls of tools in a chat: the user, not a program, tells what they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["OpenCalls"]


class OpenCalls:
    """The calls at the end of a conversation, and the results that were typed for them so far."""

    def __init__(self) -> None:
        self._calling: Mapping[str, Any] | None = None
        self._results: list[dict[str, Any]] = []

    def next_question(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """What to ask the user for now; None if the conversation does not wait for a result."""
        calls = self._waiting(messages)
        if not calls:
            return None
        function = calls[0]["function"]
        return f"The model calls {function['name']} {function['arguments']}: type what it returns."

    def take(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]] | None:
        """Take the result of the next call → the messages to send, None while other results are to come."""
        calls = self._waiting(messages)
        call_id = {"tool_call_id": calls[0]["id"]} if calls[0].get("id") else {}
        self._results.append({"role": "tool", **call_id, "content": text})
        return None if len(calls) > 1 else self._results

    def take_back(self) -> None:
        """Forget the last result, which could not be sent."""
        self._results.pop()

    def are_open(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the conversation waits for the result of a call."""
        return bool(self._waiting(messages))

    def _waiting(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The calls without a result; results belong to one message, and are gone when another stands at the end."""
        calling = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if calling is not self._calling:
            self._calling, self._results = calling, []
        calls: Sequence[Mapping[str, Any]] = (calling or {}).get("tool_calls") or ()
        return calls[len(self._results) :]
