"""Replies whose prompts are read from where they differ from what a cache holds."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import cast

from mlxqwen.cache.prefix import PrefixCache, common_prefix
from mlxqwen.chat.prompts import render_prompt
from mlxqwen.chat.reply import Delta, Reply, join_deltas
from mlxqwen.engine.chat_options import ChatOptions, Messages, ReplyOptions
from mlxqwen.engine.events import Done, Event, assistant_message
from mlxqwen.engine.generation import chosen_prefill_chunk
from mlxqwen.engine.requests import PreparedRequest
from mlxqwen.errors import MlxqwenError, OptionError
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["stream_cached"]

_QUESTION = {"role": "user", "content": "Hello"}
_REPLY_NAMES = ("early_stop_text", "stop", "stop_on_loop", "prefill_chunk", "on_prefill")


def stream_cached(
    answer: Callable[..., Iterator[Event]],
    tokenizer: Tokenizer,
    held: PrefixCache,
    request: PreparedRequest,
    options: ChatOptions,
    *,
    on_end: Callable[[Reply], None] | None = None,
    keep_partial: bool = False,
    keep_prompt: bool = False,
) -> Generator[Event]:
    """The events of one reply. Afterwards `held` has what a prompt with another question behind it would share.

    A reply that fails, or that is abandoned, leaves `held` as it was before, but for `keep_prompt`.

    Args:
        answer: `Engine.reply`.
        request: the conversation, and how it is answered.
        options: those of `Engine.stream` that are not in `request`.
        on_end: told of the reply as it ends.
        keep_partial: whether one that is abandoned after its first delta counts as far as it went.
        keep_prompt: whether the prompt of one that is abandoned counts as read, if all of it was.
    """
    deltas: list[Delta] = []
    is_over = is_read = is_abandoned = False
    turn = 0
    on_prefill = options.get("on_prefill")

    def note_progress(done: int, total: int) -> None:
        nonlocal is_read
        is_read = done >= total
        if on_prefill is not None:
            on_prefill(done, total)

    def end(reply: Reply, reply_tokens: Sequence[int]) -> None:
        tokens = (*request.prompt, *reply_tokens)
        held.commit(tokens, _shared_with_next(tokenizer, request, options, reply, tokens))
        if on_end is not None:
            on_end(reply)

    try:
        cached_tokens = held.begin(request.prompt)
        turn = held.turn
        noted: ChatOptions = {**options, "on_prefill": note_progress}
        reply_options = _reply_options(tokenizer, held, request, noted, cached_tokens)
        for event in answer(request.prompt, **reply_options):
            if isinstance(event, Done):
                end(event.reply, event.tokens)
                is_over = True
            else:
                deltas.append(event)
            yield event
            if held.turn != turn:
                raise OptionError(
                    "prompt cache: found in use for another reply, expected the first one to end before",
                    hint="Take a reply to its end, or close its stream, before the next one.",
                )
    except (GeneratorExit, KeyboardInterrupt):
        is_abandoned = True
        raise
    finally:
        if is_over or held.turn != turn:
            pass
        elif keep_partial and deltas:
            end(join_deltas(deltas), ())
        elif keep_prompt and is_abandoned and is_read:
            shared = _shared_with_next(tokenizer, request, options, join_deltas(deltas), request.prompt)
            held.commit(request.prompt, shared)
        else:
            held.roll_back()


def _shared_with_next(
    tokenizer: Tokenizer, request: PreparedRequest, options: ChatOptions, reply: Reply, tokens: Sequence[int]
) -> int:
    """How many of `tokens`, prompt and reply, the next prompt has as well."""
    if reply.tool_calls:  # their results come next, and all stays
        return len(tokens)
    answered = [*request.messages, assistant_message(reply)]
    return common_prefix(tokens, _prompt_to_come(tokenizer, answered, options) or tokens)


def _reply_options(
    tokenizer: Tokenizer, held: PrefixCache, request: PreparedRequest, options: ChatOptions, cached_tokens: int
) -> ReplyOptions:
    options = _marking(tokenizer, held, request, options, cached_tokens)
    named = {name: value for name, value in options.items() if name in _REPLY_NAMES}
    return {
        **cast(ReplyOptions, named),
        "sampling": request.sampling,
        "thinking_budget": request.thinking_budget,
        "expect_thought": request.expect_thought,
        "tools": request.tools,
        "max_tokens": request.max_tokens,
        "cache": held.cache,
        "cached_tokens": cached_tokens,
    }


def _marking(
    tokenizer: Tokenizer, held: PrefixCache, request: PreparedRequest, options: ChatOptions, cached_tokens: int
) -> ChatOptions:
    """The options with what marks the cache where the next prompt will go on; only a ring needs it."""
    if held.cache.max_kv_size is None:
        return options
    answered = [*request.messages, {**_QUESTION, "role": "assistant"}]
    latest = common_prefix(request.prompt, _prompt_to_come(tokenizer, answered, options) or ())
    latest = min(latest, len(request.prompt) - 1)  # so that the same question can be answered anew
    on_prefill = options.get("on_prefill")

    def mark(done: int, total: int) -> None:
        held.mark(latest)
        if on_prefill is not None:
            on_prefill(done, total)

    # Chunks of one length such that one of them ends at most a few tokens before that place.
    chunk = chosen_prefill_chunk(options.get("prefill_chunk"), held.cache.config)
    new = latest - cached_tokens
    return {**options, "on_prefill": mark, "prefill_chunk": new // -(-new // chunk) if new > 0 else chunk}


def _prompt_to_come(tokenizer: Tokenizer, messages: Messages, options: ChatOptions) -> list[int] | None:
    """The ids of `messages` with another question behind them; None if the template cannot have that."""
    try:
        return render_prompt(
            tokenizer,
            [*messages, _QUESTION],
            tools=options.get("tools"),
            trust_special_tokens=options.get("trust_special_tokens", False),
        )
    except MlxqwenError:
        return None
