"""A conversation with its options → the request that answers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from mlxqwen.cache import KVCache
from mlxqwen.chat.prompts import (
    asks_for_thought,
    drop_oldest_turns,
    extending,
    hard_switch,
    least_tokens,
    prepare_for,
    render_prompt,
)
from mlxqwen.chat.structured.tool_choice import read_tool_choice
from mlxqwen.chat.thinking_modes import note_switch
from mlxqwen.chat.turns import count_turns, without_oldest_turns
from mlxqwen.checks import as_integer, check_integer
from mlxqwen.engine.options import ReplyOptions
from mlxqwen.engine.request import DEFAULT_DRAFT_TOKENS, CacheKind, Request, room_for_answer
from mlxqwen.engine.text_generation import Sampling, resolve_params, text_request
from mlxqwen.errors import ContextLengthError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxqwen.engine.speculation.drafter import Speculative

__all__ = ["ChatOptions", "ChatRequest", "Messages", "Responder", "as_messages", "option_names"]

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChatOptions(ReplyOptions):
    """The options of `Engine.stream`, whose docstring explains them."""

    thinking: bool | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    sampling: Sampling = None
    max_tokens: int | None = None
    seed: int | None = None
    trust_special_tokens: bool = False
    drop_oldest: bool = False
    template_variables: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None
    cache: object = None
    max_kv_size: int | None = None
    keep: int = 4
    kv_bits: int | None = None
    on_prefill: Callable[[int, int], None] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "thinking_budget", as_integer(self.thinking_budget))


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation of a batch, or what a user says, with its own options, which replace those of the batch."""

    messages: Messages | str
    options: Mapping[str, Any] = field(default_factory=dict)


def as_messages(given: Messages | str) -> Messages:
    """A conversation, or what a user says as one."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def option_names(what: str, given: Iterable[str], *without: str) -> None:
    """Check that all names in `given` are options of a chat and none is in `without`. Raises `OptionError`."""
    known = [one.name for one in fields(ChatOptions) if one.name not in without]
    for name in given:
        if name not in known:
            is_sampling = any(one.name == name for one in fields(SamplingParams))
            raise OptionError(
                f"option of {what}: found {name!r}, expected one of {', '.join(known)}",
                hint=f'Say how to sample in sampling, here sampling={{"{name}": …}}.' if is_sampling else "",
            )


@dataclass(frozen=True, slots=True)
class Responder:
    """Makes requests from conversations, for one model with its tokenizer and its drafter.

    `noted` holds what was noted of `generation_config.json`, so that a batch notes it once.
    """

    model: Qwen3ForCausalLM
    tokenizer: Tokenizer
    speculative: Speculative = None
    draft_tokens: int = DEFAULT_DRAFT_TOKENS
    noted: set[str] = field(default_factory=set)

    def request(self, messages: Messages, options: ChatOptions, **more: Any) -> tuple[Request, Messages]:
        """The request that answers a conversation, and the messages that it sends: all, or fewer with `drop_oldest`.

        Args:
            **more: further fields of `Request`.

        Raises:
            MessagesError, TemplateError, OptionError, ContextLengthError, CacheError: it cannot be answered.
        """
        if options.max_tokens is not None:
            check_integer("max_tokens", options.max_tokens, 1)
        cache = self.cache_of(options)
        messages = prepare_for(self.tokenizer, messages)  # once: later checks accept prepared messages as they are
        if not options.drop_oldest:
            self._refuse_if_too_long(messages, options, cache)
        messages, prompt = self._prompt(messages, options, cache)
        turns = count_turns(messages, trust_special_tokens=options.trust_special_tokens)
        self._refuse_without_room(len(prompt), cache, turns=turns)
        if options.thinking_budget != 0:  # which ends a thought that no switch keeps from beginning
            note_switch(self.tokenizer, options.thinking, tools=bool(options.tools))
        request = text_request(
            self.model,
            self.tokenizer,
            prompt,
            sampling=self._sampling(prompt, messages, options),
            max_tokens=options.max_tokens,
            expect_thought=options.thinking is True and self._asks_for_thought(prompt, messages, options),
            cache=cache,
            speculative=self.speculative,
            draft_tokens=self.draft_tokens,
            tools=bool(options.tools) and options.tool_choice != "none",
            reports_progress=options.on_prefill is not None,
            calls=read_tool_choice(options.tools, options.tool_choice, options.parallel_tool_calls),
            **options.passed_on(),
            **more,
        )
        return request, messages

    def sampling(self, messages: Messages, options: ChatOptions) -> SamplingParams:
        """See `Engine.sampling_for`."""
        messages, prompt = self._prompt(prepare_for(self.tokenizer, messages), options, self.cache_of(options))
        return self._sampling(prompt, messages, options)

    def fit(self, messages: Messages, options: ChatOptions) -> list[Mapping[str, Any]]:
        """See `Engine.fit`."""
        trust, cache = options.trust_special_tokens, self.cache_of(options)
        context = self.model.config.context_length
        reserve = max(1, context // 4)
        if options.max_tokens is not None:
            # Few replies reach max_tokens, so at most a quarter of the context is reserved.
            reserve = min(reserve, check_integer("max_tokens", options.max_tokens, 1))

        def tokens_of(kept: Messages) -> int:
            least = least_tokens(self.tokenizer, kept, trust_special_tokens=trust)
            return (
                least if least >= context else len(self.render(kept, options))
            )  # the exact length of a prompt that is too long does not matter

        if cache.max_kv_size is not None and cache.max_kv_size <= context:
            return list(messages)
        turns = count_turns(messages, trust_special_tokens=trust)
        last = without_oldest_turns(messages, turns - 1, trust_special_tokens=trust)
        self._refuse_if_too_long(last, options, cache)
        held = _held(cache)
        return drop_oldest_turns(
            messages,
            tokens_of,
            room=context - held,
            reserve=reserve,
            extending=lambda tokens: extending(self.model.config, held + tokens),
            trust_special_tokens=trust,
        )

    def render(self, messages: Messages, options: ChatOptions) -> list[int]:
        """The ids of a conversation; see `Engine.prompt`."""
        return render_prompt(
            self.tokenizer,
            messages,
            thinking=hard_switch(options.thinking, options.thinking_budget),
            tools=options.tools,
            trust_special_tokens=options.trust_special_tokens,
            variables=options.template_variables,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
        )

    def cache_of(self, options: ChatOptions) -> KVCache | CacheKind:
        """The caller's cache, or the kind of a new one. Raises `OptionError` for values out of range."""
        kind = CacheKind(options.max_kv_size, options.keep, options.kv_bits)
        if options.cache is None:
            if kind != CacheKind():
                kind.make(self.model)  # raises for values that this model's cache cannot have
            return kind
        if not isinstance(options.cache, KVCache):
            found = type(options.cache).__name__
            raise OptionError(f"cache: found {found}, expected what make_cache(model) returns")
        if kind != CacheKind():
            raise OptionError(
                "cache: found beside max_kv_size, keep or kv_bits, expected one or the other",
                hint="Give them to make_cache, or leave out the cache.",
            )
        return options.cache

    def _prompt(
        self, messages: Messages, options: ChatOptions, cache: KVCache | CacheKind
    ) -> tuple[Messages, list[int]]:
        """The messages that are sent, and their ids."""
        hard_switch(options.thinking, options.thinking_budget)
        if options.drop_oldest:
            messages = self.fit(messages, options)
        return messages, self.render(messages, options)

    def _sampling(self, prompt: Sequence[int], messages: Messages, options: ChatOptions) -> SamplingParams:
        thinks = options.thinking_budget != 0 and self._asks_for_thought(prompt, messages, options)
        sampling = resolve_params(self.model, options.sampling, thinking=thinks, noted=self.noted)
        return sampling if options.seed is None else replace(sampling, seed=options.seed)

    def _asks_for_thought(self, prompt: Sequence[int], messages: Messages, options: ChatOptions) -> bool:
        return asks_for_thought(
            self.tokenizer,
            prompt,
            messages,
            thinking=options.thinking,
            tools=bool(options.tools),
            continue_final_message=options.continue_final_message,
        )

    def _refuse_if_too_long(self, messages: Messages, options: ChatOptions, cache: KVCache | CacheKind) -> None:
        """Check a lower bound of the tokens before encoding, as millions of characters take minutes to encode."""
        trust = options.trust_special_tokens
        least = least_tokens(self.tokenizer, messages, trust_special_tokens=trust)
        turns = count_turns(messages, trust_special_tokens=trust)
        self._refuse_without_room(least, cache, turns=turns, is_bound=True)

    def _refuse_without_room(
        self, prompt_tokens: int, cache: KVCache | CacheKind, *, turns: int, is_bound: bool = False
    ) -> None:
        """Raise `ContextLengthError` if the prompt leaves no room; with `is_bound` its tokens are a lower bound."""
        try:
            room_for_answer(self.model.config, _held(cache) + prompt_tokens, cache.max_kv_size)
        except ContextLengthError as error:
            drop = (
                "Drop the oldest turns (--drop-oldest; in Python drop_oldest=True or engine.fit(messages)). "
                if turns > 1
                else ""
            )
            problem = error.problem.replace("prompt: ", "prompt: at least ", 1) if is_bound else error.problem
            raise ContextLengthError(problem, hint=f"{drop}{error.hint}") from None


def _held(cache: KVCache | CacheKind) -> int:
    """The tokens that a caller's cache holds."""
    return cache.offset if isinstance(cache, KVCache) else 0
