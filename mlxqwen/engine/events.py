"""A reply as events: its pieces as they become certain, and at the end the whole of it and how it came about."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mlxqwen.chat.reply import Delta, Reply, ReplyParser, join_deltas
from mlxqwen.chat.reply_tags import TEXT_TAGS, ReplyTags
from mlxqwen.engine.completion import GenerationResponse
from mlxqwen.engine.generation import FinishReason
from mlxqwen.text.stop import StopStrings

__all__ = [
    "Done",
    "Event",
    "ReplyEvents",
    "Timings",
    "Usage",
    "assistant_message",
    "split_reply",
]

logger = logging.getLogger("mlxqwen")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one reply.

    Args:
        prompt_tokens: those of the prompt.
        completion_tokens: all that were generated.
        reasoning_tokens: those of the thought, its tags not counted; see `mlxqwen.chat.thinking.ThinkingBudget`.
        budget_exhausted: whether the thinking budget ended the thought.
        cached_tokens: those of the prompt that were not read, as the cache held them.
        drafted_tokens, accepted_tokens: of speculative decoding: tokens guessed, and how many of them were right.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    budget_exhausted: bool = False
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds until the first token and from there to the last, and tokens per second of both, cached ones left out."""

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Done:
    """The last event: the whole reply and how it came about.

    `finish_reason` is "stop" for an end token or a stop string, "tool_calls" for an end token behind a reply that calls
    tools, "length" where tokens or context ran out, "loop" where the reply went round in circles. `tokens` are the ids
    of the reply, its tags and end token included.
    """

    reply: Reply
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    tokens: tuple[int, ...] = ()


Event = Delta | Done


class ReplyEvents:
    """One reply's text as it comes → its events.

    Args:
        thinking, tools: as for `mlxqwen.chat.reply.ReplyParser`.
        stop: end before the first of these texts in the content; reasoning and calls may hold them.
        tags: those of the tokenizer, for responses that no stop strings have held back: then only its tokens are tags.
            By default text that spells a tag is one.

    Raises:
        OptionError: a stop is empty or not a string.
    """

    def __init__(
        self,
        *,
        thinking: bool | None,
        tools: bool = False,
        stop: str | Sequence[str] = (),
        tags: ReplyTags = TEXT_TAGS,
    ) -> None:
        self.done: Done | None = None
        self._tags = tags
        self._parser = ReplyParser(thinking=thinking, tools=tools, tags=tags)
        self._stops = StopStrings(stop)
        self._deltas: list[Delta] = []
        self._tokens: list[int] = []
        self._warnings = 0
        self._started, self._first = time.perf_counter(), 0.0

    def of(self, responses: Iterator[GenerationResponse]) -> Iterator[Event]:
        """All events of a reply; its time counts from when the first is asked for."""
        self._started = time.perf_counter()
        for response in responses:
            yield from self.feed(response)
            if self.done is not None:
                return

    def feed(self, response: GenerationResponse) -> Iterator[Event]:
        """Take what the next token adds → what is now certain; the last event is `done`, too.

        Nothing follows `done`: what is fed later is not looked at.
        """
        if self.done is not None:
            return
        self._first = self._first or time.perf_counter()
        self._tokens.append(response.token)
        is_end = response.finish_reason == "stop"  # an end token leaves no text, be it a tag
        deltas = self._parser.feed(response.text if is_end else self._tags.mark(response.token, response.text))
        if response.finish_reason is not None:
            deltas += self._parser.finish()
        self._log_warnings()
        for delta in chain.from_iterable(map(self._before_stop, deltas)):
            self._deltas.append(delta)
            yield delta
        if response.finish_reason is not None and (rest := self._stops.finish()):
            self._deltas.append(Delta(content=rest))
            yield self._deltas[-1]
        if response.finish_reason is not None or self._stops.found:
            self.done = self._make_done(response)
            yield self.done

    def _before_stop(self, delta: Delta) -> Iterator[Delta]:
        """What may be shown of `delta`: all but content that is, or may become, a stop string, and what follows one.

        A stop string has no call in it: what was held back as the beginning of one comes before the call.
        """
        if delta.tool_call is not None and (rest := self._stops.finish()):
            yield Delta(content=rest)
        if self._stops.found:
            return
        if delta.content is None:
            yield delta
        elif shown := self._stops.feed(delta.content)[0]:
            yield Delta(content=shown)

    def _log_warnings(self) -> None:
        for warning in self._parser.warnings[self._warnings :]:
            logger.warning("%s", warning)
        self._warnings = len(self._parser.warnings)

    def _make_done(self, response: GenerationResponse) -> Done:
        reply = join_deltas(self._deltas)
        finish_reason: FinishReason = "stop" if self._stops.found else response.finish_reason or "stop"
        if reply.tool_calls and finish_reason == "stop" and not self._stops.found:
            finish_reason = "tool_calls"
        usage = Usage(
            response.prompt_tokens,
            response.generation_tokens,
            response.reasoning_tokens,
            response.budget_exhausted,
            response.cached_tokens,
            response.drafted_tokens,
            response.accepted_tokens,
        )
        timings = Timings(
            self._first - self._started,
            time.perf_counter() - self._first,
            response.prompt_tps,
            response.generation_tps,
        )
        return Done(reply, finish_reason, usage, timings, tuple(self._tokens))


def split_reply(
    responses: Iterator[GenerationResponse],
    *,
    thinking: bool | None,
    tools: bool = False,
    stop: str | Sequence[str] = (),
    tags: ReplyTags = TEXT_TAGS,
) -> Iterator[Event]:
    """One reply's text as it comes → its events; the arguments are those of `ReplyEvents`."""
    return ReplyEvents(thinking=thinking, tools=tools, stop=stop, tags=tags).of(responses)


def assistant_message(reply: Reply) -> dict[str, Any]:
    """A reply as a message of the conversation, in OpenAI's form with `reasoning_content`."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.reasoning is not None:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
    return message
