"""Conversations with their options → prompts of one model, checked, in its context, and what replies are made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

from mlxqwen.cache import KVCache
from mlxqwen.chat.prompts import asks_for_thought, drop_oldest_turns, hard_switch, least_tokens, render_prompt
from mlxqwen.chat.thinking import ThinkingBudget, check_early_stop_text
from mlxqwen.chat.turns import count_turns, without_oldest_turns
from mlxqwen.engine.chat_options import ChatRequest, Messages, RequestOptions, check_option_names
from mlxqwen.engine.completion import resolve_params
from mlxqwen.engine.generation import DEFAULT_MAX_TOKENS, check_count, room_for_answer
from mlxqwen.errors import ContextLengthError, MlxqwenError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.stop import StopStrings
from mlxqwen.text.tokenizer import Tokenizer

__all__ = [
    "PreparedRequest",
    "check_shared_options",
    "choose_sampling",
    "fit_messages",
    "prepare_request",
    "prepare_requests",
]


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A conversation, its ids, and what its reply is made with; `messages` are those that were not dropped."""

    messages: Messages
    prompt: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    thinking_budget: int | None
    tools: bool
    expect_thought: bool


def prepare_request(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    messages: Messages,
    cache: KVCache | None = None,
    **options: Unpack[RequestOptions],
) -> PreparedRequest:
    """For the options, and what is raised, see `Engine.stream`."""
    max_tokens, budget, tools = options.get("max_tokens"), options.get("thinking_budget"), options.get("tools")
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
    trust = options.get("trust_special_tokens", False)
    if not options.get("drop_oldest", False):
        _check_length(model, tokenizer, messages, cache, trust_special_tokens=trust)
    messages, prompt = _fitted_prompt(model, tokenizer, messages, cache, options)
    turns = count_turns(messages, trust_special_tokens=trust)
    _check_room(model, len(prompt), cache, turns=turns)
    ThinkingBudget(tokenizer, prompt, budget=budget)  # complains here, where it is known which conversation has it
    sampling = _resolve_sampling(model, tokenizer, prompt, messages, options)
    _check_bias(sampling, model.config.vocab_size)
    expect_thought = options.get("thinking") is True and asks_for_thought(tokenizer, prompt, messages)
    return PreparedRequest(
        messages,
        prompt,
        sampling,
        DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        budget,
        bool(tools),
        expect_thought,
    )


def check_shared_options(tokenizer: Tokenizer, options: Mapping[str, Any]) -> None:
    """Refuse what no conversation could be answered with, of the options that none has for itself."""
    StopStrings(options.get("stop", ()))
    if options.get("prefill_chunk") is not None:
        check_count("prefill_chunk", options["prefill_chunk"])
    if (sentence := options.get("early_stop_text")) is not None:
        tokenizer.encode_plain(check_early_stop_text(sentence))


def prepare_requests(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    conversations: Iterable[Messages | ChatRequest],
    shared: Mapping[str, Any],
    on_error: Callable[[int, MlxqwenError], None] | None,
    cache: KVCache | None = None,
) -> Iterator[tuple[int, PreparedRequest]]:
    """Each conversation with its number, as it is asked for; see `Engine.batch`.

    Args:
        shared: options for all; those that no conversation has for itself are left aside.
        on_error: told of conversations that cannot be answered; without it they are errors that name the number.
        cache: an empty one such as each conversation will have; its window tells how long they may be.
    """
    names = RequestOptions.__annotations__
    for_all = {name: value for name, value in shared.items() if name in names}
    for index, one in enumerate(conversations):
        request = one if isinstance(one, ChatRequest) else ChatRequest(one)
        try:
            check_option_names("one conversation", request.options, names)
            options = cast(RequestOptions, {**for_all, **request.options})
            prepared = prepare_request(model, tokenizer, request.messages, cache, **options)
        except MlxqwenError as error:
            if on_error is None:
                raise type(error)(f"conversations[{index}]: {error.problem}", hint=error.hint) from error
            on_error(index, error)
            continue
        yield index, prepared


def fit_messages(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    messages: Messages,
    cache: KVCache | None = None,
    *,
    max_tokens: int | None = None,
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    trust_special_tokens: bool = False,
) -> list[Mapping[str, Any]]:
    """See `Engine.fit`."""
    context = model.config.context_length
    reserve = max(1, context // 4)
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
        reserve = min(reserve, max_tokens)  # the most that a reply may have is seldom what it has
    held, window = _held(cache)

    def tokens_of(kept: Messages) -> int:
        least = least_tokens(tokenizer, kept, trust_special_tokens=trust_special_tokens)
        if least >= context:  # no need to know by how much it is too long
            return least
        return len(
            render_prompt(tokenizer, kept, thinking=thinking, tools=tools, trust_special_tokens=trust_special_tokens)
        )

    if window is not None and window <= context:
        return list(messages)
    turns = count_turns(messages, trust_special_tokens=trust_special_tokens)
    last = without_oldest_turns(messages, turns - 1, trust_special_tokens=trust_special_tokens)
    _check_length(model, tokenizer, last, cache, trust_special_tokens=trust_special_tokens)
    return drop_oldest_turns(
        messages, tokens_of, room=context - held, reserve=reserve, trust_special_tokens=trust_special_tokens
    )


def choose_sampling(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    messages: Messages,
    cache: KVCache | None = None,
    **options: Unpack[RequestOptions],
) -> SamplingParams:
    """See `Engine.sampling_for`."""
    messages, prompt = _fitted_prompt(model, tokenizer, messages, cache, options)
    return _resolve_sampling(model, tokenizer, prompt, messages, options)


def _fitted_prompt(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, messages: Messages, cache: KVCache | None, options: RequestOptions
) -> tuple[Messages, list[int]]:
    """The messages that are sent, and their ids."""
    thinking = hard_switch(options.get("thinking"), options.get("thinking_budget"))
    tools, trust = options.get("tools"), options.get("trust_special_tokens", False)
    if options.get("drop_oldest", False):
        messages = fit_messages(
            model,
            tokenizer,
            messages,
            cache,
            max_tokens=options.get("max_tokens"),
            thinking=thinking,
            tools=tools,
            trust_special_tokens=trust,
        )
    return messages, render_prompt(tokenizer, messages, thinking=thinking, tools=tools, trust_special_tokens=trust)


def _resolve_sampling(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    messages: Messages,
    options: RequestOptions,
) -> SamplingParams:
    thinks = options.get("thinking_budget") != 0 and asks_for_thought(
        tokenizer, prompt, messages, thinking=options.get("thinking")
    )
    sampling, seed = resolve_params(model, options.get("sampling"), thinking=thinks), options.get("seed")
    return sampling if seed is None else replace(sampling, seed=seed)


def _check_bias(sampling: SamplingParams, vocab_size: int) -> None:
    for token in sampling.logit_bias or ():
        if token >= vocab_size:
            raise OptionError(f"logit_bias: found {token}, expected token ids from 0 to {vocab_size - 1}")


def _check_length(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    messages: Messages,
    cache: KVCache | None,
    *,
    trust_special_tokens: bool,
) -> None:
    """Refuse what no tokens could make short enough: to encode millions of characters takes minutes."""
    least = least_tokens(tokenizer, messages, trust_special_tokens=trust_special_tokens)
    turns = count_turns(messages, trust_special_tokens=trust_special_tokens)
    _check_room(model, least, cache, turns=turns, is_bound=True)


def _check_room(
    model: Qwen3ForCausalLM, prompt_tokens: int, cache: KVCache | None, *, turns: int, is_bound: bool = False
) -> None:
    """Raises `ContextLengthError`; `is_bound` if the prompt has that many tokens or more."""
    held, window = _held(cache)
    try:
        room_for_answer(model, held + prompt_tokens, window)
    except ContextLengthError as error:
        drop = "Drop the oldest turns (drop_oldest=True, or messages = engine.fit(messages)). " if turns > 1 else ""
        problem = error.problem.replace("prompt: ", "prompt: at least ", 1) if is_bound else error.problem
        raise ContextLengthError(problem, hint=f"{drop}{error.hint}") from None


def _held(cache: KVCache | None) -> tuple[int, int | None]:
    """The tokens that a cache holds, and its window; what is no cache is refused where it is used."""
    return (cache.offset, cache.max_kv_size) if isinstance(cache, KVCache) else (0, None)
