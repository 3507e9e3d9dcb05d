"""The events of a reply: its pieces as they become certain, and `Done` with the whole reply at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxqwen.chat.reply import Delta, Reply
from mlxqwen.engine.generation import FinishReason
from mlxqwen.engine.logprobs import TokenLogprobs

__all__ = ["Done", "Event", "Timings", "Usage", "assistant_message"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one reply.

    Args:
        prompt_tokens: those of the prompt.
        completion_tokens: all that were generated.
        reasoning_tokens: those of the thought, its tags not counted; 0 while they are but line breaks.
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
    """Seconds to the first token and from there to the last, and tokens per second of both, without cached tokens."""

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Done:
    """The last event: the whole reply, why it ended, and what it took.

    Args:
        reply: reasoning, content and tool calls.
        finish_reason: "stop" for an end token or a stop string, "tool_calls" for an end token after a reply that calls
            tools, "length" where `max_tokens` or the context is used up, "loop" where the reply repeats itself.
        usage: tokens counted.
        timings: seconds and speeds.
        tokens: ids of the reply, with its tags and end token.
        yarn_factor: what YaRN scaled the reply by, 1 for not at all, if the model scales by request
            (`load(…, yarn="auto")`); else None.
        stop_string: what it ended before, if one of `stop` was found.
        logprobs: how likely each of them was, if that was asked for.
    """

    reply: Reply
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    tokens: tuple[int, ...] = ()
    yarn_factor: float | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_string: str | None = None


Event = Delta | Done


def assistant_message(reply: Reply) -> dict[str, Any]:
    """A reply as an assistant's message in OpenAI's form, with `reasoning_content`; without a call that was cut off."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.reasoning is not None:
        message["reasoning_content"] = reply.reasoning
    if reply.whole_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.whole_calls
        ]
    return message
