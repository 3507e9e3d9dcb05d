"""`POST /v1/completions`: texts and token ids that are gone on with, without a chat template."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from mlxqwen.engine.events import Done
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.engine.logprobs import TokenLogprobs
from mlxqwen.engine.request import CacheKind
from mlxqwen.engine.text_generation import text_request
from mlxqwen.errors import OptionError
from mlxqwen.server.bodies import unknown_fields
from mlxqwen.server.chat_fields import ReplyFields
from mlxqwen.server.chat_reply import FINGERPRINT, usage_of
from mlxqwen.server.chat_request import (
    Prepared,
    bounded,
    budget_of,
    ending,
    refuse_what_is_not_done,
    rows,
    sampling_of,
)
from mlxqwen.server.errors import ApiError
from mlxqwen.server.event_stream import event
from mlxqwen.server.logprobs import spelled_entry
from mlxqwen.server.models import ServedModel
from mlxqwen.server.presenter import Presenter
from mlxqwen.server.replies import Replies
from mlxqwen.server.settings import MOST_CHOICES, ServerSettings
from mlxqwen.server.structured import in_words_of, response_format

__all__ = ["CompletionFields", "CompletionReply", "prepare_completion"]

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

_Ids = Annotated[list[int], Field(min_length=1)]
_Text = Annotated[str, Field(min_length=1)]


class CompletionFields(ReplyFields):
    """A completion."""

    prompt: _Text | _Ids | Annotated[list[_Text], Field(min_length=1)] | Annotated[list[_Ids], Field(min_length=1)]
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def prepare_completion(fields: CompletionFields, model: ServedModel, settings: ServerSettings) -> Prepared:
    """The engine's requests for a completion. Raises `ApiError`, `MlxqwenError`."""
    refuse_what_is_not_done(fields)
    if fields.suffix:
        _refuse("suffix", "Qwen3 does not fill in the middle")
    prompts = prompts_of(fields)
    choices = fields.n or 1
    if len(prompts) * choices > MOST_CHOICES:
        raise OptionError(
            f"prompt: found {len(prompts):,}, with n {choices}, expected at most {MOST_CHOICES} replies in all"
        )
    most = _DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    requests = []
    for place, prompt in enumerate(prompts):
        with in_words_of(fields):
            request = text_request(
                model.engine.model,
                model.engine.tokenizer,
                prompt,
                sampling=sampling_of(fields),
                max_tokens=1 if only_echoes(fields) else most,
                cache=CacheKind(settings.max_kv_size, settings.keep, settings.kv_bits),
                prefill_chunk=settings.prefill_chunk,
                speculative=model.engine.speculative,
                draft_tokens=model.engine.draft_tokens,
                split=False,
                stop=fields.stop or (),
                skip_special_tokens=fields.skip_special_tokens is not False,
                priority=fields.priority or 0,
                salt=fields.cache_salt or "",
                thinking_budget=budget_of(fields),
                logprobs=fields.logprobs,
                response_format=response_format(fields),
                constraints=ending(fields, model),
            )
        request = bounded(request, fields, model)
        told = replace(request, prompt_logprobs=fields.logprobs) if fields.echo else request
        seeded = fields if fields.seed is None else fields.model_copy(update={"seed": fields.seed + place * choices})
        requests += [*rows(told, seeded)[:1], *rows(request, seeded)[1:]]  # one of them is enough to tell of the prompt
    return Prepared(model, requests, unknown_fields(fields), choices)


def prompts_of(fields: CompletionFields) -> Sequence[str | list[int]]:
    """The prompts, each as text or ids."""
    prompt = fields.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


def only_echoes(fields: CompletionFields) -> bool:
    """Whether nothing is to follow the prompt: its log-probabilities are what is asked for."""
    return fields.max_tokens == 0 and fields.echo is True


def _refuse(name: str, why: str) -> None:
    raise ApiError(400, f"{name}: found one, expected none: {why}", code="unsupported_parameter", param=name)


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class CompletionReply(Presenter):
    """The reply to a completion, whole or as chunks; both are made of the same pieces.

    Args:
        fields: the request's.
        name: of the model.
    """

    def __init__(self, fields: CompletionFields, name: str) -> None:
        self._fields = fields
        self._head = {
            "id": f"cmpl-{os.urandom(12).hex()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": FINGERPRINT,
        }
        self._tells = fields.logprobs is not None
        options = fields.stream_options
        self._includes_usage = options is not None and options.include_usage is True
        self._tells_prompt = self._tells and fields.echo is True
        self._only_echoes = only_echoes(fields)

    def begin(self, prepared: Prepared) -> None:
        """Take what the request came to."""
        fields, tokenizer = self._fields, prepared.model.engine.tokenizer
        self._tokenizer = tokenizer
        self._ends = prepared.requests[0].end_token_ids
        echoed = [one if isinstance(one, str) else tokenizer.decode(one) for one in prompts_of(fields)]
        self._begins = [echoed[row // prepared.choices] if fields.echo else "" for row in range(len(prepared.requests))]
        self._lengths = [len(text) for text in self._begins]
        self._choices = prepared.choices

    def _piece(self, row: int, token: GeneratedToken) -> tuple[str, dict[str, Any] | None]:
        """The text and the log-probabilities that come with a token."""
        if self._only_echoes:
            return "", None
        text = "".join(delta.content or "" for delta in token.deltas)
        offset = self._lengths[row]
        self._lengths[row] += len(text)
        if not self._tells or token.logprobs is None or token.token in self._ends:
            return text, None
        entry = spelled_entry(self._tokenizer, token.logprobs.token, token.logprobs.logprob)
        return text, {
            "tokens": [entry["token"]],
            "token_logprobs": [entry["logprob"]],
            "top_logprobs": [self._likeliest(token.logprobs)],
            "text_offset": [offset],
        }

    def _prompt_logprobs(self, row: int, replies: Replies) -> dict[str, list[Any]] | None:
        """Those of the prompt of a choice, if they are there. Nothing comes before the first token."""
        handle = replies.handles[row // self._choices * self._choices]
        told = handle.prompt_logprobs
        if told is None:
            return None
        entries: dict[str, list[Any]] = _no_logprobs()
        offset = 0
        for place, token in enumerate(handle.request.prompt):
            likely = told[place - 1] if place else None
            entry = spelled_entry(self._tokenizer, token, 0.0 if likely is None else likely.logprob)
            entries["tokens"].append(entry["token"])
            entries["token_logprobs"].append(None if likely is None else entry["logprob"])
            entries["top_logprobs"].append(None if likely is None else self._likeliest(likely))
            entries["text_offset"].append(offset)
            offset += sum(byte & 0xC0 != 0x80 for byte in entry["bytes"])  # characters that begin in it
        return entries

    def _likeliest(self, told: TokenLogprobs) -> dict[str, float]:
        entries = [spelled_entry(self._tokenizer, one, value) for one, value in told.likeliest]
        return {one["token"]: one["logprob"] for one in entries}

    def _choice(self, row: int, text: str, logprobs: dict[str, Any] | None, done: Done | None) -> dict[str, Any]:
        reason = None if done is None else "length" if done.finish_reason == "length" else "stop"
        return {"index": row, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The reply that is not streamed."""
        texts = [[begin] for begin in self._begins]
        told = [_no_logprobs() for _ in texts]
        async for batch in replies.tokens():
            for row, token in batch:
                text, logprobs = self._piece(row, token)
                texts[row].append(text)
                for name, values in (logprobs or {}).items():
                    told[row][name] += values
        if self._tells_prompt:
            for row, said in enumerate(told):
                before = self._prompt_logprobs(row, replies) or _no_logprobs()
                told[row] = {name: [*values, *said[name]] for name, values in before.items()}
        choices = [
            self._choice(row, "".join(pieces), told[row] if self._tells else None, replies.done[row])
            for row, pieces in enumerate(texts)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(replies)}

    def _usage(self, replies: Replies) -> dict[str, Any]:
        usage = usage_of(replies)
        if self._only_echoes:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    async def chunks(self, replies: Replies) -> AsyncGenerator[bytes]:
        """The events of the reply that is streamed."""
        usage = {"usage": None} if self._includes_usage else {}

        def chunk(*choice: Any) -> bytes:
            return event({**self._head, "choices": [self._choice(*choice)], **usage})

        # Chunks that wait for the log-probabilities of their prompt, which another choice of it may be reading.
        held: dict[int, list[bytes]] = {row: [] for row in range(len(self._begins))} if self._tells_prompt else {}
        if not held:
            yield b"".join(chunk(row, text, None, None) for row, text in enumerate(self._begins) if text)
        async for batch in replies.tokens():
            pieces: list[bytes] = []
            for row, token in batch:
                text, logprobs = self._piece(row, token)
                ended = replies.done[row] if token.finish_reason is not None else None
                if text or logprobs or ended:
                    held.get(row, pieces).append(chunk(row, text, logprobs, ended))
            for row in list(held):
                if (told := self._prompt_logprobs(row, replies)) is not None:
                    pieces += [chunk(row, self._begins[row], told, None), *held.pop(row)]
            yield b"".join(pieces)
        if self._includes_usage:
            yield event({**self._head, "choices": [], "usage": self._usage(replies)})
        yield b"data: [DONE]\n\n"
