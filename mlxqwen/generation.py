"""Token ids in → token ids out: prefill, the decode loop, batches. Knows nothing of text.

Rows of a batch are padded on the right and masked by position, so that each gets what it would get alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import mlx.core as mx

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.device import Device, current_device
from mlxqwen.errors import CacheError, ContextLengthError, OptionError
from mlxqwen.model import Qwen3ForCausalLM
from mlxqwen.sampling import BAD_TOKEN, Sampler, check_token
from mlxqwen.sampling_params import SamplingParams

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "DEFAULT_PREFILL_CHUNK",
    "GeneratedToken",
    "TokenStream",
    "Tokens",
    "as_token_ids",
    "generate_tokens",
]

DEFAULT_MAX_TOKENS = 32_768  # the model cards' advice
DEFAULT_PREFILL_CHUNK = 512
_CLEAR_EVERY = 256  # tokens
UNBOUNDED = 1 << 62

# How a reply ends: tokens know the first two, their text the third, what it means the last.
FinishReason = Literal["stop", "length", "loop", "tool_calls"]
Tokens: TypeAlias = Sequence[int] | mx.array
Prompts: TypeAlias = Tokens | Sequence[Tokens]


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of one row.

    On the row's last, `finish_reason` is "stop" (an end token) or "length" (the limit); `forced` tells that the token
    comes from `TokenStream.force`.
    """

    row: int
    token: int
    finish_reason: FinishReason | None = None
    forced: bool = False


def generate_tokens(
    model: Qwen3ForCausalLM,
    prompts: Prompts,
    *,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    max_tokens: int | Sequence[int] = DEFAULT_MAX_TOKENS,
    eos_token_ids: Collection[int] | None = None,
    cache: KVCache | None = None,
    cached_tokens: int | None = None,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    on_prefill: Callable[[int, int], None] | None = None,
    device: Device | None = None,
) -> TokenStream:
    """Continue one prompt, or many at once, token by token.

    Args:
        model: the model.
        prompts: ids of one prompt, or of one a row; lists or integer arrays.
        sampling: how to draw, for all rows or for each; by default from the model's own distribution. A row with a seed
            draws what it would draw alone with that seed.
        max_tokens: at most this many tokens, for all rows or for each, and never more than the context has room for.
        eos_token_ids: a row ends after drawing one of these; by default those of the model's `config.json`.
        cache: holds what came before the prompts, and at the end everything but the last token (a device that overlaps
            steps may have added that too: `offsets` tell). Rows that end before others leave it. Made if not given.
        cached_tokens: that the cache's first so many tokens are the first of each prompt: these are not read again, and
            what the cache holds behind them is forgotten as generation starts. By default prompts follow all it holds.
        prefill_chunk: prompt tokens a step; memory grows with it.
        on_prefill: called with (tokens done, tokens in all) before the first chunk and after each; cached ones do not
            count.
        device: the machine; by default this one.

    Returns:
        An iterator of `GeneratedToken`; rows come in order within a step. Nothing runs before the first is asked for.

    Raises:
        ContextLengthError: a prompt leaves no room for an answer.
        OptionError: an empty prompt, ids outside the vocabulary, or values out of range.
        CacheError: a cache of another model or number of rows, or one that cannot go back to `cached_tokens`.
        GenerationError: while iterating, if the model's logits are NaN.
    """
    rows = _rows(prompts, model.config.vocab_size)
    check_count("prefill_chunk", prefill_chunk)
    most = [*max_tokens] if isinstance(max_tokens, Sequence) else [max_tokens] * len(rows)
    for limit in most:
        check_count("max_tokens", limit)
    if len(most) != len(rows):
        raise OptionError(f"max_tokens: found {len(most)} for {len(rows)} prompts")
    params = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(rows)
    if len(params) != len(rows):
        raise OptionError(f"sampling: found {len(params)} sets of parameters for {len(rows)} prompts")
    for one in params:
        if not isinstance(one, SamplingParams):
            raise OptionError(f"sampling: found {type(one).__name__}, expected SamplingParams")
    if cache is None:
        cache = make_cache(model, batch_size=len(rows))
    elif not isinstance(cache, KVCache):
        raise OptionError(f"cache: found {type(cache).__name__}, expected what make_cache(model) returns")
    elif cache.batch_size != len(rows):
        raise CacheError(f"cache: made for {cache.batch_size} rows, found {len(rows)} prompts")
    elif not cache.fits(model.config):
        raise CacheError("cache: made for another model", hint="Make it with make_cache and this model.")
    if cached_tokens is not None:
        _check_cached_tokens(cached_tokens, cache, rows)
    held = cache.offsets if cached_tokens is None else [0] * len(rows)
    limits = [
        min(limit, room_for_answer(model, offset + len(row), cache.max_kv_size))
        for limit, offset, row in zip(most, held, rows, strict=True)
    ]
    return TokenStream(
        model,
        [row[cached_tokens or 0 :] for row in rows],
        Sampler(params, rows, model.config.vocab_size),
        limits,
        frozenset(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids),
        cache,
        cached_tokens,
        prefill_chunk,
        on_prefill,
        device or current_device(),
    )


def room_for_answer(model: Qwen3ForCausalLM, prompt_tokens: int, max_kv_size: int | None) -> int:
    """Tokens that fit behind the prompt; without end in a window within the context.

    Raises `ContextLengthError` if there are none.
    """
    context = model.config.context_length
    if max_kv_size is not None and max_kv_size <= context:
        return UNBOUNDED
    if prompt_tokens >= context:
        raise ContextLengthError(
            f"prompt: {prompt_tokens:,} tokens, but the model's context of {context:,} has to hold prompt and answer",
            hint="Shorten it, extend the context (--yarn-factor; in Python load(yarn_factor=…)), or slide over it "
            "in a window that fits it (--max-kv-size; cache=make_cache(model, max_kv_size=…)).",
        )
    return context - prompt_tokens


def as_token_ids(tokens: object) -> list[Any]:
    """A sequence, or an array of any library, as a list; what it holds is not looked at. Raises `OptionError`."""
    found = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(found, Sequence) and not isinstance(found, str | bytes):
        return list(found)
    raise OptionError(f"prompt: found {type(tokens).__name__}, expected text or token ids")


def _check_cached_tokens(count: object, cache: KVCache, rows: Sequence[Sequence[int]]) -> None:
    shortest = min(map(len, rows))
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < shortest:
        raise OptionError(
            f"cached_tokens: found {count!r}, expected an integer from 0 to {shortest - 1}",
            hint="The prompt's last token has to be read: what it leads to is not in the cache.",
        )
    if not cache.can_trim(count):
        raise CacheError(
            f"cache of {min(cache.offsets)} tokens: cannot go back to the first {count}",
            hint="Go on from where it is, or from 0.",
        )


def check_count(name: str, value: object) -> None:
    """Refuse what is no integer from 1. Raises `OptionError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}: found {value!r}, expected an integer from 1")


def _rows(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """One list of ids a row, checked."""
    given = as_token_ids(prompts)
    rows = [given] if not given or isinstance(given[0], int) else [as_token_ids(row) for row in given]
    for row in rows:
        check_prompt(row, vocab_size)
    return rows


def _check_ids(name: str, tokens: Sequence[Any], vocab_size: int) -> None:
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise OptionError(f"{name}: found {token!r}, expected token ids from 0 to {vocab_size - 1}")


def check_prompt(tokens: Sequence[Any], vocab_size: int) -> None:
    """Refuse an empty prompt and what is no token id of the model. Raises `OptionError`."""
    if not tokens:
        raise OptionError("prompt: found no tokens, expected at least one")
    _check_ids("prompt", tokens, vocab_size)


class TokenStream:
    """The running generation behind `generate_tokens`: iterate it, `force` what a row says next, `stop` rows early."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        rows: list[list[int]],
        sampler: Sampler,
        limits: list[int],
        eos_token_ids: frozenset[int],
        cache: KVCache,
        cached_tokens: int | None,
        prefill_chunk: int,
        on_prefill: Callable[[int, int], None] | None,
        device: Device,
    ) -> None:
        self.cache = cache
        self._cached_tokens = cached_tokens
        self._model = model
        self._rows = rows
        self._sampler = sampler
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._prefill_chunk = prefill_chunk
        self._on_prefill = on_prefill
        self._overlap = device.overlaps_steps
        self._finished: set[int] = set()
        self._pending: list[deque[int]] = [deque() for _ in rows]
        self._unless: dict[int, frozenset[int]] = {}
        self._tokens = self._run()

    def __iter__(self) -> Iterator[GeneratedToken]:
        return self

    def __next__(self) -> GeneratedToken:
        return next(self._tokens)

    def force(self, row: int, tokens: Sequence[int], *, unless: Collection[int] = ()) -> None:
        """Let `row` go on with `tokens`, whatever is drawn.

        They follow the row's token of the step that is being told, and those forced before. They are tokens like any
        other: told, fed to the model, counted against the limits, remembered for penalties, and an end token among
        them ends the row. The row's random stream goes on as if they had been drawn.

        Args:
            row: a row that has ended takes none.
            tokens: ids.
            unless: if the model itself draws one of these next, it is kept, and nothing is forced. Ignored while other
                forced tokens are pending.

        Raises:
            OptionError: no such row, or ids outside the vocabulary.
        """
        if not 0 <= row < len(self._rows):
            raise OptionError(f"force: found row {row}, expected a row from 0 to {len(self._rows) - 1}")
        _check_ids("force", tokens, self._model.config.vocab_size)
        if not self._pending[row]:
            self._unless[row] = frozenset(unless)
        self._pending[row].extend(tokens)

    def stop(self, row: int) -> None:
        """End `row` here: no further token of it is computed."""
        self._finished.add(row)

    def close(self) -> None:
        """End all rows."""
        self._tokens.close()

    def _run(self) -> Generator[GeneratedToken, None, None]:
        active = list(range(len(self._rows)))
        drawn = self._sampler(self._prefill())
        mx.async_eval(drawn)
        count = 0
        while active:
            count += 1
            if count % _CLEAR_EVERY == 0:
                mx.clear_cache()  # buffers that the cache has outgrown, and that nothing else is large enough for
            forced: set[int] = set()
            if any(self._pending[row] for row in active):
                drawn, forced = self._enforce(drawn, active)
            ahead = None
            if self._overlap and any(count < self._limits[row] for row in active):
                ahead = self._step(drawn)
            numbers = active if len(self._rows) > 1 else [None] * len(active)
            tokens = list(map(check_token, cast(list[int], drawn.tolist()), numbers))
            for row, token in zip(active, tokens, strict=True):
                reason = self._reason(row, token, count)
                if row not in self._finished:
                    yield GeneratedToken(row, token, reason, row in forced)
                if reason is not None:
                    self._finished.add(row)
            going = [place for place, row in enumerate(active) if row not in self._finished]
            active = [active[place] for place in going]
            if not active:
                return
            if ahead is None:
                if len(going) < len(tokens):
                    drawn = self._leave(drawn, going)
                drawn = self._step(drawn)
            else:
                drawn = self._leave(ahead, going) if len(going) < len(tokens) else ahead

    def _reason(self, row: int, token: int, count: int) -> FinishReason | None:
        if token in self._eos_token_ids:
            return "stop"
        return "length" if count >= self._limits[row] else None

    def _enforce(self, drawn: mx.array, active: list[int]) -> tuple[mx.array, set[int]]:
        """Put pending tokens in the place of those drawn → the step's tokens, and the rows that were forced."""
        tokens = cast(list[int], drawn.tolist())
        forced = set()
        for place, row in enumerate(active):
            kept = {BAD_TOKEN, *self._unless.pop(row, ())} if self._pending[row] else set()
            if tokens[place] in kept:
                self._pending[row].clear()
            elif self._pending[row]:
                tokens[place] = self._pending[row].popleft()
                forced.add(row)
        replaced = mx.array(tokens, dtype=mx.int32)
        self._sampler.replace(drawn, replaced)
        return replaced, forced

    def _step(self, tokens: mx.array) -> mx.array:
        """Feed one token a row → the next ones, on their way."""
        hidden = self._model.model(tokens[:, None], self.cache)
        drawn = self._sampler(self._model.logits(hidden)[:, -1])
        mx.async_eval(drawn)
        return drawn

    def _leave(self, tokens: mx.array, going: list[int]) -> mx.array:
        """Drop the rows that have ended, so that nobody pays for them."""
        self.cache.keep_rows(going)
        self._sampler.keep_rows(going)
        return tokens[mx.array(going, dtype=mx.int32)]

    def _prefill(self) -> mx.array:
        """All prompts through the model in chunks → the logits `[B, vocab_size]` behind each one's last token."""
        if self._cached_tokens is not None:
            self.cache.trim(self._cached_tokens)
        longest = max(map(len, self._rows))
        self.cache.reserve(self.cache.offset + longest + 1)
        last_hidden: list[mx.array | None] = [None] * len(self._rows)
        if self._on_prefill:
            self._on_prefill(0, longest)
        for start in range(0, longest, self._prefill_chunk):
            length = min(self._prefill_chunk, longest - start)
            pieces = [row[start : start + length] for row in self._rows]
            lengths = [len(piece) for piece in pieces]
            padded = mx.array([piece + [0] * (length - len(piece)) for piece in pieces], dtype=mx.int32)
            hidden = self._model.model(padded, self.cache, lengths=lengths)
            for place, row in enumerate(self._rows):
                if start < len(row) <= start + length:
                    last_hidden[place] = hidden[place, len(row) - start - 1]
            mx.eval(self.cache.state, [one for one in last_hidden if one is not None])
            mx.clear_cache()  # the chunk's work space, which decoding has no use for
            if self._on_prefill:
                self._on_prefill(start + length, longest)
        return self._model.logits(mx.stack([one for one in last_hidden if one is not None]))
