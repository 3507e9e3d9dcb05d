"""The OpenAPI document of the server, made from the forms that requests are checked against."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from mlxqwen import __version__
from mlxqwen.server.anthropic_request import CountFields, MessagesFields
from mlxqwen.server.bodies import Form
from mlxqwen.server.chat_fields import ChatFields
from mlxqwen.server.compaction import CompactFields
from mlxqwen.server.completions import CompletionFields
from mlxqwen.server.responses_request import ResponsesFields
from mlxqwen.server.texts import DetokenizeFields, TokenizeFields

__all__ = ["document"]

_FORMS: dict[str, tuple[type[Form], str]] = {
    "/v1/chat/completions": (ChatFields, "Answer a conversation."),
    "/v1/completions": (CompletionFields, "Go on with a text or token ids."),
    "/v1/messages": (MessagesFields, "Answer a conversation in Anthropic's form."),
    "/v1/messages/count_tokens": (CountFields, "The length of such a conversation in tokens."),
    "/v1/responses": (ResponsesFields, "Answer in the form of OpenAI's responses."),
    "/v1/responses/compact": (CompactFields, "A long talk as its users' messages and a summary of the rest."),
    "/tokenize": (TokenizeFields, "The token ids of a text or a conversation."),
    "/detokenize": (DetokenizeFields, "The text of token ids."),
}
_PAGES = {
    "/v1/models": "The models that are served.",
    "/health": "Whether requests are answered.",
    "/version": "The version of the server.",
    "/metrics": "Counters in Prometheus's form.",
    "/openapi.json": "This document.",
}
_BY_ID = {
    "/v1/models/{id}": {"get": "One of the models."},
    "/v1/responses/{id}": {"get": "A response that is kept or on its way.", "delete": "Forget a response."},
    "/v1/responses/{id}/cancel": {"post": "End a response that is on its way."},
    "/v1/responses/{id}/input_items": {"get": "What a response was asked."},
}
_QUERIES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("/v1/responses/{id}", "get"): {"stream": {"type": "boolean"}, "starting_after": {"type": "integer", "minimum": 0}},
    ("/v1/responses/{id}/input_items", "get"): {
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "order": {"enum": ["asc", "desc"]},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


@cache
def document() -> dict[str, Any]:
    """The document."""
    forms = [form for form, _ in _FORMS.values()]
    _, definitions = models_json_schema(
        [(form, "validation") for form in forms], ref_template="#/components/schemas/{model}"
    )
    failed = {"description": "An error.", "content": {"application/json": {"schema": _ERROR}}}
    anthropic = {"description": "An error.", "content": {"application/json": {"schema": _ANTHROPIC_ERROR}}}
    whole = {"application/json": {"schema": {"type": "object"}}}
    done = {"description": "As asked.", "content": whole}
    page = {"description": "As asked.", "content": {**whole, "text/plain": {}, "text/event-stream": {}}}
    streamed = {"description": "As asked.", "content": {**whole, "text/event-stream": {"schema": {"type": "string"}}}}
    paths: dict[str, Any] = {
        path: {"get": {"summary": summary, "responses": {"200": page, "default": failed}}}
        for path, summary in _PAGES.items()
    }
    for path, methods in _BY_ID.items():
        name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        paths[path] = {
            method: {
                "summary": summary,
                "parameters": [
                    name,
                    *(
                        {"name": one, "in": "query", "schema": schema}
                        for one, schema in _QUERIES.get((path, method), {}).items()
                    ),
                ],
                "responses": {"200": page, "default": failed},
            }
            for method, summary in methods.items()
        }
    for path, (form, summary) in _FORMS.items():
        responses = {
            "200": streamed if "stream" in form.model_fields else done,
            "default": anthropic if path.startswith("/v1/messages") else failed,
        }
        schema = {"$ref": f"#/components/schemas/{form.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlxqwen", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
