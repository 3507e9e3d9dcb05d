"""`POST /v1/responses/compact`: a long talk → its users' messages, and the model's own summary of all the rest."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mlxqwen.server.bodies import Form, form_of, unknown_fields
from mlxqwen.server.chat_fields import ChatFields
from mlxqwen.server.errors import ApiError
from mlxqwen.server.event_stream import event
from mlxqwen.server.presenter import Presenter
from mlxqwen.server.replies import Replies
from mlxqwen.server.responses_reply import response_usage
from mlxqwen.server.responses_request import Input, input_items, messages_of, with_ids
from mlxqwen.server.summaries import encoded_summary

__all__ = ["CompactFields", "CompactionReply", "as_chat"]

_REQUEST = (
    "Summarize this conversation for someone who goes on with it without having read it: what was asked for, what was "
    "decided, found and done, and what is left to do. Answer with the summary alone."
)
_MOST_TOKENS = 2048


class CompactFields(Form):
    """A talk that is to become shorter."""

    aside: ClassVar[tuple[str, ...]] = (
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "service_tier",
    )

    model: Annotated[str, Field(max_length=512)] | None = None
    input: Input | None = None
    instructions: str | None = None
    stream: bool | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    cache_salt: str | None = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    service_tier: Any = None


def as_chat(fields: CompactFields, before: Sequence[Mapping[str, Any]], notes: list[str]) -> ChatFields:
    """The chat completion that asks for the summary; what is left out of the talk is added to `notes`.

    Args:
        before: messages of the responses that the talk follows.

    Raises:
        ApiError, MessagesError: no talk, or items that a text model does not read.
    """
    notes += unknown_fields(fields)
    talk = [*before, *messages_of(input_items(fields.input), notes)]
    if not talk:
        raise ApiError(
            400, "input: is missing, expected text or items", code="missing_required_parameter", param="input"
        )
    instructions = [{"role": "system", "content": fields.instructions}] if fields.instructions else []
    chat = {
        "messages": [*instructions, *talk, {"role": "user", "content": _REQUEST}],
        "max_completion_tokens": _MOST_TOKENS,
        "chat_template_kwargs": {"enable_thinking": False},
        "cache_salt": fields.cache_salt,
    }
    return form_of(chat, ChatFields)


class CompactionReply(Presenter):
    """The talk that has become shorter.

    Args:
        fields: the request's.
        before: messages of the responses that it follows.
    """

    def __init__(self, fields: CompactFields, before: Sequence[Mapping[str, Any]]) -> None:
        self._fields = fields
        self._before = before

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The talk. Raises `ApiError` if the model says nothing."""
        async for _ in replies.tokens():
            pass
        return self._over(replies)

    async def chunks(self, replies: Replies) -> AsyncGenerator[bytes]:
        """The talk as one event."""
        async for _ in replies.tokens():
            yield b""
        yield event(self._over(replies)) + b"data: [DONE]\n\n"

    def _over(self, replies: Replies) -> dict[str, Any]:
        """The users' messages as they are, then the summary."""
        summary = replies.done[0].reply.content.strip()
        if not summary:
            raise ApiError(500, "summary: the model said nothing, expected some words", code="empty_summary")
        messages = [*self._before, *messages_of(input_items(self._fields.input), [])]
        kept = [
            {
                "type": "message",
                "status": "completed",
                "role": "user",
                "content": [{"type": "input_text", "text": message["content"]}],
            }
            for message in messages
            if message["role"] == "user"
        ]
        compaction = {
            "id": f"cmp_{os.urandom(12).hex()}",
            "type": "compaction",
            "encrypted_content": encoded_summary(summary),
        }
        return {
            "id": f"resp_{os.urandom(16).hex()}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*with_ids(kept), compaction],
            "usage": response_usage(replies),
        }
