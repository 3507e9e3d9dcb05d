"""Replies to chat completions, whole and as chunks: both are made of the same pieces, so that they are equal."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from mlxqwen import __version__
from mlxqwen.chat.reply import Delta
from mlxqwen.engine.events import Done
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.server.chat_fields import ChatFields
from mlxqwen.server.chat_request import Prepared
from mlxqwen.server.event_stream import to_json
from mlxqwen.server.logprobs import ChoiceLogprobs
from mlxqwen.server.presenter import Presenter
from mlxqwen.server.replies import Replies
from mlxqwen.server.settings import ReasoningField

__all__ = ["FINGERPRINT", "ChatChoice", "ChatReply", "usage_of"]

FINGERPRINT = f"mlxqwen-{__version__}"


class ChatChoice:
    """One choice: the engine's pieces → OpenAI's, and the message that they make.

    Args:
        fields: the request's.
        reasoning_field: the name that thought has.

    Attributes:
        is_cut: whether the reply is to end here, as it begins a second call that was not wanted.
    """

    def __init__(self, fields: ChatFields, reasoning_field: ReasoningField) -> None:
        self._shows_reasoning = fields.include_reasoning is not False
        self._separates = fields.separate_reasoning is not False
        self._most_calls = 1 if fields.parallel_tool_calls is False else None
        self._names = ("reasoning_content", "reasoning") if reasoning_field == "both" else (reasoning_field,)
        self._stop_token_ids = fields.stop_token_ids or ()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._is_in_thought = False
        self.is_cut = False

    def pieces(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """The engine's deltas as OpenAI's."""
        pieces: list[dict[str, Any]] = []
        for delta in deltas:
            if delta.reasoning is not None:
                pieces += self._thought(delta.reasoning)
            elif delta.content is not None:
                pieces += self._said(delta.content)
            elif delta.tool_call is not None:
                call = delta.tool_call
                if self._most_calls is not None and call.index >= self._most_calls:
                    self.is_cut = True
                    break
                pieces += [] if not self._is_in_thought else self._said("")
                pieces.append({"tool_calls": [self._called(call.index, call.id, call.name, call.arguments)]})
        return pieces

    def _thought(self, text: str) -> list[dict[str, Any]]:
        if not self._shows_reasoning:
            return []
        if self._separates:
            self._reasoning.append(text)
            return [dict.fromkeys(self._names, text)]
        opening = "" if self._is_in_thought else "<think>\n"
        self._is_in_thought = True
        self._content.append(opening + text)
        return [{"content": opening + text}]

    def _said(self, text: str) -> list[dict[str, Any]]:
        if self._is_in_thought:
            self._is_in_thought = False
            text = f"\n</think>\n\n{text}"
        self._content.append(text)
        return [{"content": text}]

    def _called(self, index: int, call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
        if index == len(self._calls):
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            self._calls.append({**call, "function": {"name": name, "arguments": arguments}})
            return {"index": index, **call}
        self._calls[index]["function"]["arguments"] += arguments
        return {"index": index, "function": {"arguments": arguments}}

    def message(self) -> dict[str, Any]:
        """The whole message."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "refusal": None,
            "annotations": [],
        }
        if self._shows_reasoning and self._separates:
            message |= dict.fromkeys(self._names, "".join(self._reasoning) or None)
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def ending(self, done: Done, *, in_thought: bool) -> dict[str, Any]:
        """Why it ended: also which stop string or token did it, and that it did so in thought, if nothing was said."""
        reason = "tool_calls" if self.is_cut else "stop" if done.finish_reason == "loop" else done.finish_reason
        ended: dict[str, Any] = {"finish_reason": reason, "stop_reason": done.stop_string}
        if done.tokens and done.tokens[-1] in self._stop_token_ids:
            ended["stop_reason"] = done.tokens[-1]
        if in_thought:
            ended["ended_in_thought"] = True
        return ended


class ChatReply(Presenter):
    """The reply to one chat completion.

    Args:
        fields: the request's.
        name: of the model.
        reasoning_field: the name that thought has.
    """

    def __init__(self, fields: ChatFields, name: str, reasoning_field: ReasoningField) -> None:
        self.id = f"chatcmpl-{os.urandom(12).hex()}"
        self._created = int(time.time())
        self._name = name
        self._fields = fields
        self._logprobs: list[ChoiceLogprobs] | None = None
        self._choices = [ChatChoice(fields, reasoning_field) for _ in range(fields.n or 1)]
        options = fields.stream_options
        self._includes_usage = options is not None and options.include_usage is True

    def begin(self, prepared: Prepared) -> None:
        """Take what the request came to."""
        if prepared.requests[0].logprobs is not None:
            ends = prepared.requests[0].end_token_ids
            tokenizer, tells = prepared.model.engine.tokenizer, self._fields.include_reasoning is not False
            self._logprobs = [ChoiceLogprobs(tokenizer, ends, tells_thought=tells) for _ in prepared.requests]

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._name,
            "system_fingerprint": FINGERPRINT,
            "service_tier": "default",
        }

    def _told(self, row: int, token: GeneratedToken) -> dict[str, Any] | None:
        """The log-probabilities that are certain with a token."""
        return None if self._logprobs is None else self._logprobs[row].feed(token)

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The reply that is not streamed."""
        async for batch in replies.tokens():
            for row, token in batch:
                choice = self._choices[row]
                if not choice.is_cut:
                    choice.pieces(token.deltas)
                    self._told(row, token)
                if choice.is_cut:
                    replies.end(row)
        choices = [
            {
                "index": row,
                "message": choice.message(),
                "logprobs": None if self._logprobs is None else self._logprobs[row].whole(),
                **choice.ending(replies.done[row], in_thought=replies.ended_in_thought(row)),
            }
            for row, choice in enumerate(self._choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage_of(replies)}

    async def chunks(self, replies: Replies) -> AsyncGenerator[bytes]:
        """The events of the reply that is streamed; nothing (empty bytes) about every second without any."""
        usage = ',"usage":null' if self._includes_usage else ""
        head = f"data: {to_json(self._head('chat.completion.chunk'))[:-1]}"
        fronts = [f'{head},"choices":[{{"index":{row},"delta":' for row in range(len(self._choices))]

        def chunk(
            row: int, delta: dict[str, Any], ended: dict[str, Any] | None = None, told: dict[str, Any] | None = None
        ) -> bytes:
            rest = '"finish_reason":null' if ended is None else to_json(ended)[1:-1]
            logprobs = "null" if told is None else to_json(told)
            return f'{fronts[row]}{to_json(delta)},"logprobs":{logprobs},{rest}}}]{usage}}}\n\n'.encode()

        yield b"".join(chunk(row, {"role": "assistant", "content": ""}) for row in range(len(self._choices)))
        cut: set[int] = set()
        pieces: list[bytes] = []
        async for batch in replies.tokens():
            for row, token in batch:
                if row in cut:
                    continue
                choice = self._choices[row]
                told = self._told(row, token)
                for delta in choice.pieces(token.deltas) or ([] if told is None else [{}]):
                    pieces.append(chunk(row, delta, told=told))
                    told = None
                if choice.is_cut:
                    cut.add(row)
                    replies.end(row)
                if token.finish_reason is not None or choice.is_cut:
                    pieces.append(
                        chunk(row, {}, choice.ending(replies.done[row], in_thought=replies.ended_in_thought(row)))
                    )
            if not replies.is_over:  # the last ones go with the end
                yield b"".join(pieces)
                pieces = []
        if self._includes_usage:
            pieces.append(f'{head},"choices":[],"usage":{to_json(usage_of(replies))}}}\n\n'.encode())
        yield b"".join([*pieces, b"data: [DONE]\n\n"])


def usage_of(replies: Replies) -> dict[str, Any]:
    """Tokens of a request and all its replies."""
    usages = [done.usage for done in replies.done.values()]
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": replies.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": replies.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": replies.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
    }
