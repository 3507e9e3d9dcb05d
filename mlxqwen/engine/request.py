"""A request: one frozen value that holds all that a reply depends on, checked where it is made."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, cast

from mlxqwen.cache import KVCache, check_quantization, check_window, make_cache
from mlxqwen.chat.budget import ThinkingBudget
from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.chat.prompts import extending
from mlxqwen.chat.thinking import EARLY_STOP_TEXT, check_early_stop_text
from mlxqwen.checks import as_integer, as_token_ids, check_integer, check_token_ids, is_integer
from mlxqwen.device import Device
from mlxqwen.engine.logprobs import MAX_ALTERNATIVES
from mlxqwen.engine.options import ReplyOptions
from mlxqwen.engine.speculation.drafter import Drafter, as_drafter
from mlxqwen.errors import CacheError, ContextLengthError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.stop import StopStrings

if TYPE_CHECKING:
    from mlxqwen.text.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_DRAFT_TOKENS",
    "DEFAULT_MAX_TOKENS",
    "MAX_DRAFT_TOKENS",
    "CacheKind",
    "Request",
    "Tokens",
    "check_draft_tokens",
    "check_request",
    "config_of",
    "fitting_prefill_chunk",
    "room_for_answer",
    "scaled_cache",
    "with_yarn_factor",
]

DEFAULT_MAX_TOKENS = 32_768  # the model cards' advice
DEFAULT_DRAFT_TOKENS = 8
MAX_DRAFT_TOKENS = 64  # logits of so many positions are there at once: 39 MB of 151,936 tokens in float32
MOST_URGENT, LEAST_URGENT = -100, 100
UNBOUNDED = 1 << 62
_USUAL_ROOM = 4096  # tokens behind a prompt that gives no limit
_LONGEST_SALT = 1024  # characters
_LONGEST_PREFILL_CHUNK = 512
_SHORTEST_PREFILL_CHUNK = 32
_WORK_SPACE = 44 * 2**20  # bytes; the rest of 64 MiB is scores and slack

Tokens: TypeAlias = Sequence[int] | Any
"""Token ids: a sequence of integers, or an integer array of any library."""


@dataclass(frozen=True, slots=True)
class CacheKind:
    """The options of a cache; see `mlxqwen.make_cache`. Replies of one kind may run in one batch.

    Where the model scales by request, `yarn_factor` None is the one that the request's length asks for.
    """

    max_kv_size: int | None = None
    keep: int = 4
    kv_bits: int | None = None
    kv_group_size: int = 64
    yarn_factor: float | None = None

    def __post_init__(self) -> None:
        checked = (*check_window(self.max_kv_size, self.keep), *check_quantization(self.kv_bits, self.kv_group_size))
        for name, value in zip(("max_kv_size", "keep", "kv_bits", "kv_group_size"), checked, strict=True):
            object.__setattr__(self, name, value)

    def make(self, model: Qwen3ForCausalLM, batch_size: int = 1) -> KVCache:
        """An empty cache of this kind. Raises `OptionError` if the model's cache cannot have these options."""
        return make_cache(
            model,
            max_kv_size=self.max_kv_size,
            keep=self.keep,
            kv_bits=self.kv_bits,
            kv_group_size=self.kv_group_size,
            batch_size=batch_size,
            yarn_factor=self.yarn_factor,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Request(ReplyOptions):
    """What a reply is made from and how: its own fields, and those of `ReplyOptions`.

    Args:
        prompt: token ids.
        sampling: how tokens are drawn.
        max_tokens: the most tokens of the reply, by default 32,768; it never has more than the context has room for.
        end_token_ids: a reply ends after the first of these.
        tokenizer: makes text of the reply. Without one a reply is token ids alone, and options of text are not used.
        begins_in_thought: True if the prompt has opened a think block, False if it has closed one, None if the model
            decides.
        split: whether text is split into reasoning, content and tool calls; else all of it is content, tags included.
        tools: whether the prompt offers tools.
        cache: the kind of cache, or a `KVCache` of the caller's. Such a request shares nothing with others, is never
            preempted, and the cache holds the reply afterwards.
        cache_row: the row of the caller's cache that the prompt follows; None for a new row behind those.
        cached_tokens: how many of the prompt's first tokens the caller's cache holds; it forgets what follows them.
            By default the prompt follows all that the cache holds.
        returns_to: how many of the prompt's tokens a later prompt is expected to share; a window that slides is kept
            there. By default all but the last.
        holds_cache: whether the reply's blocks stay in the store while its pin lives, whatever the store's capacity.
        adapter: the name of the adapter that the weights are used with.
        drafter: guesses tokens for one pass of the model to check.
        draft_tokens: the most that are guessed at once, up to 64.
        reports_progress: whether the handle tells how much of the prompt was read.
        prompt_logprobs: None, or how many of the likeliest tokens are told with the log-probability of each token of
            the prompt, up to 20. All of it is read for that, whatever is known.

    Raises:
        OptionError: a value out of range.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    end_token_ids: frozenset[int] = frozenset()
    tokenizer: Tokenizer | None = None
    begins_in_thought: bool | None = None
    split: bool = True
    tools: bool = False
    cache: CacheKind | KVCache = field(default_factory=CacheKind)
    cache_row: int | None = 0
    cached_tokens: int | None = None
    returns_to: int | None = None
    holds_cache: bool = False
    adapter: str | None = None
    drafter: Drafter | None = None
    draft_tokens: int = DEFAULT_DRAFT_TOKENS
    reports_progress: bool = False
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("prompt", tuple(as_token_ids(self.prompt)))
        if not self.prompt:
            raise OptionError("prompt: found no tokens, expected at least one")
        if not isinstance(self.sampling, SamplingParams):
            raise OptionError(f"sampling: found {type(self.sampling).__name__}, expected SamplingParams")
        if self.max_tokens is not None:
            put("max_tokens", check_integer("max_tokens", self.max_tokens, 1))
        put("priority", check_integer("priority", self.priority, MOST_URGENT, LEAST_URGENT))
        if not isinstance(self.salt, str) or len(self.salt) > _LONGEST_SALT:
            found = f"{len(self.salt):,} characters" if isinstance(self.salt, str) else type(self.salt).__name__
            raise OptionError(f"salt: found {found}, expected text of at most {_LONGEST_SALT:,} characters")
        if not isinstance(self.cache, CacheKind | KVCache):
            raise OptionError(f"cache: found {type(self.cache).__name__}, expected what make_cache(model) returns")
        for name in ("cached_tokens", "cache_row", "returns_to"):
            put(name, as_integer(getattr(self, name)))
        if self.prefill_chunk is not None:
            put("prefill_chunk", check_integer("prefill_chunk", self.prefill_chunk, 1))
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                put(name, check_integer(name, count, 0, MAX_ALTERNATIVES))
        if self.prompt_logprobs is not None and isinstance(self.cache, KVCache):
            raise OptionError("prompt_logprobs: found beside a cache, expected none: what it holds is not read again")
        put("draft_tokens", check_draft_tokens(self.draft_tokens))
        StopStrings(self.stop)  # raises for what is no stop string
        put("drafter", None if self.drafter is None else as_drafter(self.drafter))
        put("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        put("constraints", tuple(self.constraints))
        if self.early_stop_text is not None:
            check_early_stop_text(self.early_stop_text)  # also where no budget makes use of it
        if self.tokenizer is not None and self.thinking_budget is not None:
            self.make_budget(self.make_pipeline(self.tokenizer))  # raises for options that contradict each other

    @property
    def most_tokens(self) -> int:
        """`max_tokens`, or its default."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def make_pipeline(self, tokenizer: Tokenizer) -> ReplyPipeline:
        """The pipeline for the reply's tokens. Raises `OptionError` for stop strings that are empty or no text."""
        return ReplyPipeline(
            tokenizer,
            begins=self.begins_in_thought,
            tools=self.tools,
            stop=self.stop,
            split=self.split,
            skip_special_tokens=self.skip_special_tokens,
        )

    def make_budget(self, pipeline: ReplyPipeline) -> ThinkingBudget | None:
        """The constraint that ends the thought; None without a budget. Raises `OptionError`."""
        if self.thinking_budget is None or self.tokenizer is None:
            return None
        sentence = EARLY_STOP_TEXT if self.early_stop_text is None else self.early_stop_text
        return ThinkingBudget(
            self.tokenizer, pipeline, self.thinking_budget, sentence, self.end_token_ids, prompt=self.prompt
        )


def check_request(request: Request, model: Qwen3ForCausalLM) -> None:
    """Check a request against the model that is to answer it.

    Raises:
        OptionError: ids outside the vocabulary, or a value that does not go with this model's cache.
        ContextLengthError: the prompt leaves no room for an answer.
        CacheError: a cache of another model or number of rows, or one that cannot go back to `cached_tokens`.
    """
    check_token_ids("prompt", request.prompt, model.config.vocab_size)
    if request.drafter is not None:
        as_drafter(request.drafter, model.config)
    for token in request.sampling.logit_bias or ():
        if token >= model.config.vocab_size:
            raise OptionError(f"logit_bias: found {token}, expected token ids from 0 to {model.config.vocab_size - 1}")
    cache = request.cache
    if isinstance(cache, CacheKind):
        if cache != CacheKind():
            cache.make(model)  # raises for values that this model's cache cannot have
        if request.cached_tokens:
            raise OptionError(
                f"cached_tokens: found {request.cached_tokens!r} without a cache, expected both",
                hint="Pass cache=make_cache(model) and what it has read, or leave cached_tokens out.",
            )
        room_for_answer(model.config, len(request.prompt), cache.max_kv_size)
        return
    if not cache.fits(model.config):
        raise CacheError("cache: made for another model", hint="Make it with make_cache and this model.")
    if request.cached_tokens is not None:
        _check_cached_tokens(request.cached_tokens, cache, request.prompt)
    room_for_answer(cache.config, held_tokens(request) + len(request.prompt), cache.max_kv_size)


def with_yarn_factor(request: Request, model: Qwen3ForCausalLM) -> Request:
    """The request with the YaRN factor that its length asks for, if the model scales by request; else as it is.

    What counts is the prompt and the limit that it gives, or without one a little room: the default limit is more than
    all but few replies need, and would scale short texts, which costs them accuracy.
    """
    scaled = scaled_cache(request, model, request.max_tokens)
    return request if scaled is request.cache else replace(request, cache=scaled)


def scaled_cache(request: Request, model: Qwen3ForCausalLM, max_tokens: int | None) -> CacheKind | KVCache:
    """The request's cache under the YaRN factor of `with_yarn_factor`, as if its limit were `max_tokens`."""
    kind, choices = request.cache, model.config.yarn_choices
    if not choices or isinstance(kind, KVCache) or kind.yarn_factor is not None:
        return kind
    room = min(_USUAL_ROOM, choices[0].original_max_position_embeddings // 4)
    tokens = len(request.prompt) + (room if max_tokens is None else max_tokens)
    seen = tokens if kind.max_kv_size is None else min(tokens, kind.max_kv_size)
    return replace(kind, yarn_factor=model.config.yarn_factor_for(seen))


def config_of(cache: CacheKind | KVCache, model: Qwen3ForCausalLM) -> ModelConfig:
    """The model's config under the RoPE of a request's cache."""
    if isinstance(cache, KVCache):
        return cache.config
    return model.config if cache.yarn_factor is None else model.config.at_yarn_factor(cache.yarn_factor)


def held_tokens(request: Request) -> int:
    """Tokens in the caller's cache before the prompt."""
    cache = request.cache
    if isinstance(cache, CacheKind) or request.cache_row is None or request.cached_tokens is not None:
        return 0
    return cache.offsets[request.cache_row]


def _check_cached_tokens(value: object, cache: KVCache, prompt: Sequence[int]) -> None:
    hint = "The prompt's last token has to be read: what it leads to is not in the cache."
    count = int(check_integer("cached_tokens", value, 0, len(prompt) - 1, hint=hint))
    if not cache.can_trim(count):
        raise CacheError(
            f"cache of {min(cache.offsets)} tokens: cannot go back to the first {count}",
            hint="Go on from where it is, or from 0.",
        )


def check_draft_tokens(value: object) -> int:
    """The most tokens to guess at once, 1 to 64. Raises `OptionError`."""
    hint = "Longer drafts gain nothing: few of them are right to the end, and all their logits take memory."
    is_long = is_integer(value) and operator.index(cast(SupportsIndex, value)) > MAX_DRAFT_TOKENS
    return int(check_integer("draft_tokens", value, 1, MAX_DRAFT_TOKENS, hint=hint if is_long else ""))


def room_for_answer(config: ModelConfig, prompt_tokens: int, max_kv_size: int | None) -> int:
    """Tokens that fit after the prompt; `UNBOUNDED` in a window that fits the context.

    Raises `ContextLengthError` if there are none.
    """
    context = config.context_length
    if max_kv_size is not None and max_kv_size <= context:
        return UNBOUNDED
    if prompt_tokens >= context:
        by_yarn = f", by YaRN's factor {config.yarn_choices[-1].factor:g}," if config.yarn_choices else ""
        raise ContextLengthError(
            f"prompt: {prompt_tokens:,} tokens, but the model's context of {context:,}{by_yarn} has to hold prompt and "
            "answer",
            hint=f"Shorten it, {extending(config, prompt_tokens)}or slide over it in a window that fits it "
            "(--max-kv-size; cache=make_cache(model, max_kv_size=…)).",
        )
    return context - prompt_tokens


def fitting_prefill_chunk(config: ModelConfig, device: Device) -> int:
    """Prompt tokens a step: 512 on a GPU; on a CPU as many as work with 64 MiB, but 512 at most and 32 at least.

    MLX's CPU backend computes norms, rotations and gates in steps, with a float32 copy of its input in each. What a
    token took was measured with models of several widths, and is about 16 bytes for each number of the hidden state, 34
    for each of all queries, and 11 for each of the feed-forward.
    """
    if device.is_gpu:
        return _LONGEST_PREFILL_CHUNK
    moe, width = config.moe, config.hidden_size
    inner = config.intermediate_size if moe is None else moe.num_experts_per_tok * (moe.moe_intermediate_size + width)
    token_bytes = 16 * width + 34 * config.num_attention_heads * config.head_dim + 11 * inner
    fitting = _WORK_SPACE // token_bytes // _SHORTEST_PREFILL_CHUNK * _SHORTEST_PREFILL_CHUNK
    return min(max(fitting, _SHORTEST_PREFILL_CHUNK), _LONGEST_PREFILL_CHUNK)
