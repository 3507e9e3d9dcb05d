"""The endpoints that answer: chat completions, completions, Anthropic's messages, responses."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from mlxqwen.server import anthropic_request, compaction, responses_request
from mlxqwen.server.anthropic_reply import MessageReply
from mlxqwen.server.anthropic_request import CountFields, MessagesFields
from mlxqwen.server.chat_fields import ChatFields
from mlxqwen.server.chat_reply import ChatReply
from mlxqwen.server.chat_request import Prepared, prepare_chat, prompt_ids
from mlxqwen.server.compaction import CompactFields, CompactionReply
from mlxqwen.server.completions import CompletionFields, CompletionReply, prepare_completion
from mlxqwen.server.errors import ApiError
from mlxqwen.server.models import ServedModel
from mlxqwen.server.responses_reply import ResponseReply
from mlxqwen.server.responses_request import ResponsesFields
from mlxqwen.server.responses_store import StoredResponse
from mlxqwen.server.service import Service

__all__ = [
    "cancel_response",
    "chat_completions",
    "compact",
    "completions",
    "count_tokens",
    "delete_response",
    "list_input_items",
    "messages",
    "responses",
    "show_response",
]

_OPENAI_HEADER = "x-stainless-lang"
"""What OpenAI's own libraries send with every request."""


async def chat_completions(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/chat/completions`."""

    def prepare(fields: ChatFields, model: ServedModel) -> Prepared:
        return prepare_chat(fields, model, service.settings)

    def present(fields: ChatFields, prepared: Prepared) -> ChatReply:
        return ChatReply(fields, prepared, service.settings.reasoning_field)

    return await service.answer(http, ChatFields, prepare, present)


async def completions(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/completions`."""

    def prepare(fields: CompletionFields, model: ServedModel) -> Prepared:
        return prepare_completion(fields, model, service.settings)

    return await service.answer(http, CompletionFields, prepare, CompletionReply)


async def messages(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/messages`."""

    def prepare(fields: MessagesFields, model: ServedModel) -> Prepared:
        notes: list[str] = []
        return prepare_chat(anthropic_request.as_chat(fields, notes), model, service.settings, notes=notes)

    def present(fields: MessagesFields, prepared: Prepared) -> MessageReply:
        choice = fields.tool_choice
        most_calls = 1 if choice is not None and choice.disable_parallel_tool_use else None
        return MessageReply(prepared, most_calls)

    return await service.answer(http, MessagesFields, prepare, present)


async def count_tokens(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/messages/count_tokens`."""
    fields = await service.form(http, CountFields)
    model = service.models.find(fields.model)

    def count() -> int:
        return len(prompt_ids(anthropic_request.as_chat(fields, []), model))

    return JSONResponse({"input_tokens": await service.in_thread(count)})


async def responses(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/responses`."""
    store = service.responses
    before: list[dict[str, Any]] = []

    def look_up(fields: ResponsesFields) -> None:
        before.extend(responses_request.previous_messages(fields.previous_response_id, store))

    def prepare(fields: ResponsesFields, model: ServedModel) -> Prepared:
        notes: list[str] = []
        chat = responses_request.as_chat(fields, before, notes)
        return prepare_chat(chat, model, service.settings, notes=notes, drop_oldest=fields.truncation == "auto")

    def present(fields: ResponsesFields, prepared: Prepared) -> ResponseReply:
        return ResponseReply(fields, prepared, store, before, is_for_openai=_OPENAI_HEADER in http.headers)

    return await service.answer(http, ResponsesFields, prepare, present, look_up=look_up)


async def compact(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/responses/compact`."""
    before: list[dict[str, Any]] = []

    def look_up(fields: CompactFields) -> None:
        before.extend(responses_request.previous_messages(fields.previous_response_id, service.responses))

    def prepare(fields: CompactFields, model: ServedModel) -> Prepared:
        notes: list[str] = []
        chat = compaction.as_chat(fields, before, notes)
        return prepare_chat(chat, model, service.settings, notes=notes, drop_oldest=True)

    def present(fields: CompactFields, prepared: Prepared) -> CompactionReply:
        return CompactionReply(fields, before)

    return await service.answer(http, CompactFields, prepare, present, look_up=look_up)


async def show_response(service: Service, http: HttpRequest) -> Response:
    """`GET /v1/responses/{id}`."""
    return JSONResponse(_stored(service, http).response)


async def delete_response(service: Service, http: HttpRequest) -> Response:
    """`DELETE /v1/responses/{id}`."""
    stored = _stored(service, http)
    service.responses.drop(stored.response["id"])
    return JSONResponse({"id": stored.response["id"], "object": "response", "deleted": True})


async def cancel_response(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/responses/{id}/cancel`: ends one that is on its way."""
    running = service.responses.running.get(http.path_params["id"])
    if running is not None:
        return JSONResponse(running.cancel())
    stored = _stored(service, http)
    raise ApiError(400, f"response: found one that is {stored.response['status']}, expected one that is on its way")


async def list_input_items(service: Service, http: HttpRequest) -> Response:
    """`GET /v1/responses/{id}/input_items`."""
    items = _stored(service, http).items
    query = http.query_params
    if query.get("order", "desc") != "asc":
        items = items[::-1]
    ids = [item["id"] for item in items]
    if (after := query.get("after")) in ids:
        items = items[ids.index(after) + 1 :]
    limit = query.get("limit", "20")
    most = min(max(int(limit), 1), 100) if limit.isascii() and limit.isdecimal() and len(limit) < 6 else 20
    shown = items[:most]
    return JSONResponse(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(items) > len(shown),
        }
    )


def _stored(service: Service, http: HttpRequest) -> StoredResponse:
    """The response that the path names. Raises `ApiError` 404 if it is not kept."""
    stored = service.responses.find(http.path_params["id"])
    if stored is None:
        raise ApiError(404, "response: found none of this id, expected one that is kept", code="response_not_found")
    return stored
