"""The endpoints that answer chat completions, completions and Anthropic's messages."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from mlxqwen.server import anthropic_request
from mlxqwen.server.answers import answer
from mlxqwen.server.anthropic_reply import MessageReply
from mlxqwen.server.anthropic_request import CountFields, MessagesFields
from mlxqwen.server.chat_fields import ChatFields
from mlxqwen.server.chat_reply import ChatReply
from mlxqwen.server.chat_request import Prepared, prepare_chat, prompt_ids
from mlxqwen.server.completions import CompletionFields, CompletionReply, prepare_completion
from mlxqwen.server.models import ServedModel
from mlxqwen.server.service import Service

__all__ = [
    "chat_completions",
    "completions",
    "count_tokens",
    "messages",
]


async def chat_completions(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/chat/completions`."""

    def prepare(fields: ChatFields, model: ServedModel) -> Prepared:
        return prepare_chat(fields, model, service.settings)

    def present(fields: ChatFields, name: str) -> ChatReply:
        return ChatReply(fields, name, service.settings.reasoning_field)

    return await answer(service, http, ChatFields, prepare, present)


async def completions(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/completions`."""

    def prepare(fields: CompletionFields, model: ServedModel) -> Prepared:
        return prepare_completion(fields, model, service.settings)

    return await answer(service, http, CompletionFields, prepare, CompletionReply)


async def messages(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/messages`."""
    edits: list[list[dict[str, Any]] | None] = [None]

    def prepare(fields: MessagesFields, model: ServedModel) -> Prepared:
        notes: list[str] = []
        fields, edits[0] = anthropic_request.edited(fields, lambda some: _prompt_tokens(some, model), notes)
        chat = anthropic_request.as_chat(fields, notes)
        form = "output_config.format" if fields.output_format is None else "output_format"
        names = {"response_format": form, "stop:": "stop_sequences:", **anthropic_request.TOOL_NAMES}
        return prepare_chat(chat, model, service.settings, notes=notes, names=names)

    def present(fields: MessagesFields, name: str) -> MessageReply:
        choice = fields.tool_choice
        most_calls = 1 if choice is not None and choice.disable_parallel_tool_use else None
        return MessageReply(name, most_calls, lambda: edits[0])

    return await answer(service, http, MessagesFields, prepare, present)


async def count_tokens(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/messages/count_tokens`."""
    fields = await service.form(http, CountFields)
    async with service.model(http, fields.model) as model:

        def count() -> dict[str, Any]:
            kept, edits = anthropic_request.edited(fields, lambda some: _prompt_tokens(some, model), [])
            told: dict[str, Any] = {"input_tokens": _prompt_tokens(kept, model)}
            if edits is not None:
                told["context_management"] = {"original_input_tokens": _prompt_tokens(fields, model)}
            return told

        return JSONResponse(await service.in_thread(count))


def _prompt_tokens(fields: CountFields, model: ServedModel) -> int:
    """How many tokens the prompt of such a message has."""
    return len(prompt_ids(anthropic_request.as_chat(fields, []), model, anthropic_request.TOOL_NAMES))
