"""Replies in Anthropic's form: blocks of thought, text and calls, whole or as events."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

from mlxqwen.server.blocks import Block, Blocks, Step
from mlxqwen.server.errors import ApiError, anthropic_error
from mlxqwen.server.event_stream import event
from mlxqwen.server.presenter import Presenter
from mlxqwen.server.replies import Replies

__all__ = ["MessageReply"]

_PING = event({"type": "ping"}, "ping")
_DIRECT = {"type": "direct"}  # no program that the model wrote
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "loop": "end_turn"}


class MessageReply(Presenter):
    """The reply to one message.

    Args:
        name: of the model.
        most_calls: how many calls it may have; None for any number.
        edits: says how the conversation was edited, once it was; None if that was not asked for.
    """

    def __init__(
        self, name: str, most_calls: int | None, edits: Callable[[], list[dict[str, Any]] | None] = lambda: None
    ) -> None:
        self._edits = edits
        self._head = {
            "id": f"msg_{os.urandom(12).hex()}",
            "type": "message",
            "role": "assistant",
            "model": name,
            "stop_details": None,
            "container": None,
        }
        self._blocks = Blocks(most_calls)

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The reply that is not streamed."""
        async for batch in replies.tokens():
            for row, token in batch:
                for _ in self._blocks.feed(token.deltas):
                    pass
                if self._blocks.is_cut:
                    replies.end(row)
        content = [_whole(block) for block in self._blocks.blocks]
        ending = {**self._ending(replies), "usage": _usage(replies), **self._edited()}
        return {**self._head, "content": content, **ending}

    async def chunks(self, replies: Replies) -> AsyncGenerator[bytes]:
        """The events of the reply that is streamed."""
        begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = {**_usage(replies), "input_tokens": replies.prompt_tokens, "cache_read_input_tokens": 0}
        yield event({"type": "message_start", "message": {**self._head, **begun, "usage": usage}}, "message_start")
        async for batch in replies.tokens():
            steps = [step for _, token in batch for step in self._blocks.feed(token.deltas)]
            yield b"".join(map(_told, steps))
            if self._blocks.is_cut:
                replies.end(0)
        yield b"".join(map(_told, self._blocks.finish()))
        delta = {
            "type": "message_delta",
            "delta": self._ending(replies),
            "usage": _usage(replies),
            **self._edited(),
        }
        yield event(delta, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def comment(self) -> bytes:
        """What says that the reply is on its way; Anthropic's libraries take it anywhere, before the beginning too."""
        return _PING

    def failure(self, error: ApiError) -> bytes:
        """What ends a stream in which something went wrong."""
        return event(anthropic_error(error), "error")

    def _edited(self) -> dict[str, Any]:
        edits = self._edits()
        return {} if edits is None else {"context_management": {"applied_edits": edits}}

    def _ending(self, replies: Replies) -> dict[str, Any]:
        """Why it ended, and that it did so in thought, if nothing was said."""
        done = replies.done[0]
        if done.stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": done.stop_string}
        reason = "tool_use" if self._blocks.is_cut else _REASONS[done.finish_reason]
        in_thought = {"ended_in_thought": True} if replies.ended_in_thought(0) else {}
        return {"stop_reason": reason, "stop_sequence": None, **in_thought}


def _call_id(block: Block) -> str:
    return f"toolu_{block.call_id.removeprefix('call_')}"


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "content":
        return {"type": "text", "text": block.text, "citations": None}
    try:
        arguments = json.loads(block.text or "{}")
    except ValueError:  # cut off by max_tokens
        arguments = {}
    return {"type": "tool_use", "id": _call_id(block), "name": block.name, "input": arguments, "caller": _DIRECT}


def _told(step: Step) -> bytes:
    """The events of one step."""
    block, place = step.block, {"index": step.block.index}
    if step.kind == "open":
        empty: dict[str, Any] = {"type": "text", "text": "", "citations": None}
        if block.kind == "reasoning":
            empty = {"type": "thinking", "thinking": "", "signature": ""}
        elif block.kind == "call":
            empty = {"type": "tool_use", "id": _call_id(block), "name": block.name, "input": {}, "caller": _DIRECT}
        return event({"type": "content_block_start", **place, "content_block": empty}, "content_block_start")
    if step.kind == "fill":
        kind, name = {
            "reasoning": ("thinking_delta", "thinking"),
            "content": ("text_delta", "text"),
            "call": ("input_json_delta", "partial_json"),
        }[block.kind]
        return _delta(place, {"type": kind, name: step.text})
    signed = _delta(place, {"type": "signature_delta", "signature": ""}) if block.kind == "reasoning" else b""
    return signed + event({"type": "content_block_stop", **place}, "content_block_stop")


def _delta(place: dict[str, int], delta: dict[str, Any]) -> bytes:
    return event({"type": "content_block_delta", **place, "delta": delta}, "content_block_delta")


def _usage(replies: Replies) -> dict[str, Any]:
    """Tokens: those of the prompt that were known are counted apart, as Anthropic does."""
    return {
        "input_tokens": replies.prompt_tokens - replies.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": replies.cached_tokens,
        "cache_creation": None,
        "output_tokens": replies.handles[0].token_count,
        "output_tokens_details": {"thinking_tokens": replies.reasoning_tokens},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }
