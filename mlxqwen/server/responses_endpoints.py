"""OpenAI's responses: made whole, streamed or in the background, and what may be done with those that are kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from mlxqwen.server import compaction, responses_request
from mlxqwen.server.answers import Beginning, answer
from mlxqwen.server.background import Background
from mlxqwen.server.chat_request import Prepared, prepare_chat
from mlxqwen.server.compaction import CompactFields, CompactionReply
from mlxqwen.server.errors import ApiError
from mlxqwen.server.event_stream import EventStream, KeepAlive, to_json
from mlxqwen.server.models import ServedModel
from mlxqwen.server.responses_reply import ResponseReply
from mlxqwen.server.responses_request import ResponsesFields
from mlxqwen.server.responses_store import StoredResponse
from mlxqwen.server.service import Service

__all__ = ["cancel_response", "compact", "delete_response", "list_input_items", "responses", "show_response"]

_OPENAI_HEADER = "x-stainless-lang"
"""What OpenAI's own libraries send with every request."""


async def responses(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/responses`."""
    store = service.responses
    before: list[dict[str, Any]] = []

    def look_up(fields: ResponsesFields) -> None:
        before.extend(responses_request.previous_messages(fields.previous_response_id, store))

    def prepare(fields: ResponsesFields, model: ServedModel) -> Prepared:
        notes: list[str] = []
        chat = responses_request.as_chat(fields, before, notes)
        drops, names = fields.truncation == "auto", dict(responses_request.TOOL_NAMES)
        if fields.text is not None and fields.text.format is not None:
            names["response_format"] = "text.format"
        return prepare_chat(chat, model, service.settings, notes=notes, drop_oldest=drops, names=names)

    def present(fields: ResponsesFields, name: str) -> ResponseReply:
        return ResponseReply(fields, name, store, before, is_for_openai=_OPENAI_HEADER in http.headers)

    async def in_background(
        fields: ResponsesFields,
        reply: ResponseReply,
        beginning: Beginning[ResponsesFields],
        events: AsyncGenerator[bytes],
    ) -> Response:
        is_streamed = fields.stream is True
        nbytes = len(to_json(fields.model_dump(exclude_none=True)))
        service.background.check_room(nbytes, is_logged=is_streamed)

        def at_end() -> None:
            beginning.close()
            store.keep_events(reply.id, run.events)

        run = reply.background = Background(
            events, is_logged=is_streamed, nbytes=nbytes, at_end=at_end, steps=beginning.steps
        )
        await service.background.start(run)
        return _followed(service, run, -1) if is_streamed else JSONResponse(reply.shown())

    return await answer(service, http, ResponsesFields, prepare, present, look_up=look_up, in_background=in_background)


def _followed(service: Service, run: Background, after: int) -> Response:
    """The events of a response in the background, behind number `after`; who leaves does not end it."""
    settings = service.settings
    alive = KeepAlive(settings.keepalive_seconds, settings.stuck_seconds, run.steps)
    return EventStream(run.follow(after, alive), close=lambda: None, stall_seconds=settings.stall_seconds)


async def compact(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/responses/compact`."""
    before: list[dict[str, Any]] = []

    def look_up(fields: CompactFields) -> None:
        before.extend(responses_request.previous_messages(fields.previous_response_id, service.responses))

    def prepare(fields: CompactFields, model: ServedModel) -> Prepared:
        notes: list[str] = []
        chat = compaction.as_chat(fields, before, notes)
        return prepare_chat(chat, model, service.settings, notes=notes, drop_oldest=True)

    def present(fields: CompactFields, name: str) -> CompactionReply:
        return CompactionReply(fields, before)

    return await answer(service, http, CompactFields, prepare, present, look_up=look_up)


async def show_response(service: Service, http: HttpRequest) -> Response:
    """`GET /v1/responses/{id}`: as far as it has come, or its events from `starting_after` on."""
    query = http.query_params
    running = service.responses.running.get(http.path_params["id"])
    if query.get("stream", "").lower() not in ("true", "1"):
        return JSONResponse(_stored(service, http).response if running is None else running.shown())
    after = _starting_after(query.get("starting_after", ""))
    if running is not None and running.background is not None and running.background.is_logged:
        return _followed(service, running.background, after)
    stored = None if running is not None else _stored(service, http)
    if stored is None or not stored.events:
        raise ApiError(
            400,
            "stream: found true for a response whose events are not kept, expected one that was made with both "
            "background and stream",
            code="invalid_value",
            param="stream",
        )
    return Response(b"".join(stored.events[after + 1 :]) + b"data: [DONE]\n\n", media_type="text/event-stream")


def _starting_after(given: str) -> int:
    """The number of the last event that the client has; -1 for none."""
    if not given:
        return -1
    if not given.isascii() or not given.isdecimal() or len(given) > 9:
        raise ApiError(
            400,
            "starting_after: found no number, expected that of an event",
            code="invalid_value",
            param="starting_after",
        )
    return int(given)


async def delete_response(service: Service, http: HttpRequest) -> Response:
    """`DELETE /v1/responses/{id}`; one that is on its way ends."""
    name = http.path_params["id"]
    running = service.responses.running.get(name)
    if running is not None:
        running.forget()
    else:
        service.responses.drop(_stored(service, http).response["id"])
    return JSONResponse({"id": name, "object": "response", "deleted": True})


async def cancel_response(service: Service, http: HttpRequest) -> Response:
    """`POST /v1/responses/{id}/cancel`: ends one that is on its way."""
    running = service.responses.running.get(http.path_params["id"])
    if running is not None:
        return JSONResponse(running.cancel())
    response = _stored(service, http).response
    if response["status"] != "cancelled":
        raise ApiError(
            400,
            f"response: found one that is {response['status']}, expected one that is on its way",
            code="invalid_value",
        )
    return JSONResponse(response)


async def list_input_items(service: Service, http: HttpRequest) -> Response:
    """`GET /v1/responses/{id}/input_items`."""
    running = service.responses.running.get(http.path_params["id"])
    items = _stored(service, http).items if running is None else running.input_items()
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
