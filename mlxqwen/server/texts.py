"""`/tokenize` and `/detokenize`: texts and conversations as token ids, and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from mlxqwen.checks import check_token_ids
from mlxqwen.errors import OptionError
from mlxqwen.server.bodies import Form
from mlxqwen.server.chat_fields import LONGEST_TEXT, ChatFields
from mlxqwen.server.chat_request import prompt_ids
from mlxqwen.server.models import ServedModel
from mlxqwen.server.service import Service

__all__ = ["DetokenizeFields", "TokenizeFields", "detokenize", "tokenize"]

_MOST_TOKENS = 1_000_000


class TokenizeFields(Form):
    """A text (`prompt`), or a conversation with the fields of a chat completion that make its prompt."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeFields(Form):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=_MOST_TOKENS)]


async def tokenize(service: Service, http: HttpRequest) -> Response:
    """`POST /tokenize`."""
    fields = await service.form(http, TokenizeFields)

    def ids(model: ServedModel) -> list[int]:
        if (fields.prompt is None) == (fields.messages is None):
            raise OptionError("prompt: found both prompt and messages, or none, expected one of them")
        if fields.prompt is not None:
            return model.engine.tokenizer.encode(fields.prompt)
        chat = ChatFields(
            messages=fields.messages or [],
            tools=fields.tools,
            chat_template_kwargs=fields.chat_template_kwargs,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
        )
        return prompt_ids(chat, model)

    async with service.model(http, fields.model) as model:
        tokens = await service.in_thread(lambda: ids(model))
        return JSONResponse({"count": len(tokens), "max_model_len": model.context, "tokens": tokens})


async def detokenize(service: Service, http: HttpRequest) -> Response:
    """`POST /detokenize`."""
    fields = await service.form(http, DetokenizeFields)

    def text(model: ServedModel) -> str:
        return model.engine.tokenizer.decode(check_token_ids("tokens", fields.tokens, model.vocab_size))

    async with service.model(http, fields.model) as model:
        return JSONResponse({"prompt": await service.in_thread(lambda: text(model))})
