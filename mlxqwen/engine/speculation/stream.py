"""A reply of one row, several tokens a pass of the model where a drafter guesses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import mlx.core as mx

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.cache.tentative import TentativeStep
from mlxqwen.engine.generation import (
    DEFAULT_DRAFT_TOKENS,
    DEFAULT_MAX_TOKENS,
    FinishReason,
    GeneratedToken,
    Tokens,
    as_token_ids,
    check_cache,
    check_count,
    check_draft_tokens,
    check_ids,
    check_prompt,
    chosen_prefill_chunk,
    room_for_answer,
)
from mlxqwen.engine.speculation.draft_model import DraftModel
from mlxqwen.engine.speculation.drafter import DraftCounts, Drafter, DraftLength
from mlxqwen.engine.speculation.reading import read_tokens
from mlxqwen.errors import OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import BAD_TOKEN, Sampler, SamplerState, check_token

__all__ = ["SpeculativeStream", "check_vocabulary", "speculate_tokens"]

_CLEAR_EVERY = 256  # passes


def speculate_tokens(
    model: Qwen3ForCausalLM,
    prompt: Tokens,
    drafter: Drafter,
    *,
    draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    sampling: SamplingParams | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    eos_token_ids: Collection[int] | None = None,
    cache: KVCache | None = None,
    cached_tokens: int | None = None,
    prefill_chunk: int | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> SpeculativeStream:
    """Continue one prompt with the tokens that `generate_tokens` gives, in fewer passes where guesses are right.

    With a seed they are the very tokens, without one they follow the same distribution, up to the rounding of logits
    that are computed for several positions at once.

    Args:
        drafter: guesses.
        draft_tokens: the most that are guessed at once, up to 64; as many as have been right lately.
        model, prompt, sampling, max_tokens, eos_token_ids, cache, cached_tokens, prefill_chunk, on_prefill: see
            `generate_tokens`; of one row. At each token the cache holds everything before it.

    Raises:
        ContextLengthError, OptionError, CacheError, GenerationError: see `generate_tokens`. Also an `OptionError` for a
            draft model of another vocabulary, and while iterating for a drafter that guesses what is no token.
    """
    tokens = as_token_ids(prompt)
    check_prompt(tokens, model.config.vocab_size)
    check_count("max_tokens", max_tokens)
    check_draft_tokens(draft_tokens)
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise OptionError(f"sampling: found {type(sampling).__name__}, expected SamplingParams")
    if isinstance(drafter, DraftModel):
        check_vocabulary(drafter.model.config, model.config)
    cache = make_cache(model) if cache is None else cache
    check_cache(cache, model, [tokens], cached_tokens)
    held = cache.offset if cached_tokens is None else 0
    return SpeculativeStream(
        model,
        tokens,
        drafter,
        draft_tokens,
        Sampler([sampling or SamplingParams()], [tokens], model.config.vocab_size),
        min(max_tokens, room_for_answer(model, held + len(tokens), cache.max_kv_size)),
        frozenset(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids),
        cache,
        cached_tokens,
        chosen_prefill_chunk(prefill_chunk, model.config),
        on_prefill,
    )


def check_vocabulary(draft: ModelConfig, model: ModelConfig) -> None:
    """Refuse a draft model of another vocabulary. Raises `OptionError`."""
    found, expected = draft.vocab_size, model.vocab_size
    if found != expected:
        raise OptionError(
            f"draft model: found a vocabulary of {found:,} tokens, expected the model's own of {expected:,}",
            hint="Take a smaller model of the same family, which shares its tokenizer.",
        )


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass of the model has come to.

    Args:
        drafts: the tokens that were fed behind the last one told.
        drawn: what the sampler draws behind that one and behind each draft; worth something up to the first that is
            not its draft.
        states: of the sampler, behind each draw.
        step: what settles the cache; None if that has been moved on already.
        is_forced: whether the drafts are tokens that are to be forced, rather than guesses.
    """

    drafts: list[int]
    drawn: list[int]
    states: list[SamplerState]
    step: TentativeStep | None = None
    is_forced: bool = False


class SpeculativeStream:
    """The running generation behind `speculate_tokens`, to be used as a `TokenStream` of one row.

    Tokens are told one by one. What has not been told, and what it takes to go on from it, is in neither the cache nor
    the random stream, so that a reply can be forced elsewhere, stopped or left at any of them.

    Attributes:
        cache: at each token, all that comes before it.
        counts: of guesses, so far.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        prompt: list[int],
        drafter: Drafter,
        draft_tokens: int,
        sampler: Sampler,
        limit: int,
        eos_token_ids: frozenset[int],
        cache: KVCache,
        cached_tokens: int | None,
        prefill_chunk: int,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        self.cache = cache
        self.counts = DraftCounts()
        self._cached_tokens = cached_tokens
        self._model = model
        self._text = prompt
        self._drafter = drafter
        self._most_drafts = draft_tokens
        self._draft_length = DraftLength(draft_tokens)
        self._sampler = sampler
        self._limit = limit
        self._count = 0
        self._eos_token_ids = eos_token_ids
        self._prefill_chunk = prefill_chunk
        self._on_prefill = on_prefill
        self._is_stopped = False
        self._pending: deque[int] = deque()
        self._unless: frozenset[int] = frozenset()
        self._tokens = self._run()

    def __iter__(self) -> Iterator[GeneratedToken]:
        return self

    def __next__(self) -> GeneratedToken:
        return next(self._tokens)

    def force(self, row: int, tokens: Sequence[int], *, unless: Collection[int] = ()) -> None:
        """See `mlxqwen.engine.generation.TokenStream.force`."""
        if row != 0:
            raise OptionError(f"force: found row {row}, expected a row from 0 to 0")
        check_ids("force", tokens, self._model.config.vocab_size)
        if not self._pending:
            self._unless = frozenset(unless)
        self._pending.extend(tokens)

    def add(
        self, prompt: Tokens, *, sampling: SamplingParams | None = None, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> int:
        """No other prompt can join. Raises `OptionError`."""
        raise OptionError(
            "add: found a stream that decodes speculatively, expected a plain one",
            hint="Leave out speculative=… where prompts are to share a stream.",
        )

    def stop(self, row: int) -> None:
        """End the reply here: no further token of it is computed."""
        self._is_stopped = True

    def close(self) -> None:
        """End the reply."""
        self._tokens.close()

    def _run(self) -> Generator[GeneratedToken, None, None]:
        if self._cached_tokens is not None:
            self.cache.trim(self._cached_tokens)
        if self._is_stopped:
            return
        found, place, passes = self._prefill(), 0, 1
        while True:
            if found.step is not None:
                found.step.settle(place + 1)
            token, forced = self._enforced(found.drawn[place])
            check_token(token)
            is_right = place < len(found.drafts) and token == found.drafts[place]
            self._count += 1
            self._text.append(token)
            self.counts.accepted += is_right and not forced and not found.is_forced
            reason = self._reason(token)
            if not self._is_stopped:
                yield GeneratedToken(0, token, reason, forced)
            if reason is not None or self._is_stopped:
                return
            if is_right:
                place += 1
                continue
            if found.drafts and not found.is_forced and not forced:
                self._draft_length.record(len(found.drafts), place)
            self._settle_sampler(found, place, token)
            passes += 1
            if passes % _CLEAR_EVERY == 0:
                mx.clear_cache()  # buffers that the cache has outgrown, and that nothing else is large enough for
            found, place = self._pass(token), 0

    def _reason(self, token: int) -> FinishReason | None:
        if token in self._eos_token_ids:
            return "stop"
        return "length" if self._count >= self._limit else None

    def _enforced(self, drawn: int) -> tuple[int, bool]:
        """The token to tell where `drawn` was drawn, and whether it was forced."""
        if not self._pending:
            return drawn, False
        unless, self._unless = self._unless, frozenset()
        if drawn == BAD_TOKEN or drawn in unless:
            self._pending.clear()
            return drawn, False
        return self._pending.popleft(), True

    def _settle_sampler(self, found: _Pass, place: int, token: int) -> None:
        """Let the sampler go on behind its draw at `place`, where `token` was told."""
        self._sampler.restore(found.states[place])
        remembered = [*found.drafts, found.drawn[-1]][place]
        if token != remembered:
            self._sampler.replace(_one(remembered), _one(token))

    def _pass(self, last: int) -> _Pass:
        """Feed `last`, the token told last, with what may come behind it."""
        room = self._limit - self._count - 1  # one token more is drawn than is fed behind the last
        is_forced = bool(self._pending)
        drafts = list(islice(self._pending, min(room, self._most_drafts))) if is_forced else self._guesses(room)
        if not drafts:
            hidden = self._model.model(mx.array([[last]], dtype=mx.int32), self.cache)
            return self._draw(hidden, [])
        step = TentativeStep(self.cache)
        hidden = self._model.model(mx.array([[last, *drafts]], dtype=mx.int32), step)
        if not is_forced:
            self.counts.drafted += len(drafts)
        return self._draw(hidden, drafts, step, is_forced)

    def _guesses(self, room: int) -> list[int]:
        count = min(room, self._draft_length.next())
        drafts = self._drafter.propose(self._text, count, self._sampler)[:count] if count else []
        check_ids("draft", drafts, self._model.config.vocab_size)
        return drafts

    def _draw(
        self, hidden: mx.array, drafts: list[int], step: TentativeStep | None = None, is_forced: bool = False
    ) -> _Pass:
        """Draw behind each of the hidden states `[1, n, hidden_size]`, as if all drafts before it had been told."""
        logits = self._model.logits(hidden)
        drawn, states = [], []
        for place, draft in enumerate([*drafts, None]):
            drawn.append(self._sampler(logits[:, place], remember=None if draft is None else _one(draft)))
            states.append(self._sampler.state)
        return _Pass(drafts, cast(list[int], mx.concatenate(drawn).tolist()), states, step, is_forced)

    def _prefill(self) -> _Pass:
        prompt = self._text[self._cached_tokens or 0 :]
        self.cache.reserve(self.cache.offset + len(prompt) + 1)
        hidden = read_tokens(self._model, self.cache, prompt, self._prefill_chunk, self._on_chunk())
        return self._draw(hidden[:, None], [])

    def _on_chunk(self) -> Callable[[int, int], None] | None:
        """Let a draft model read along, so that its reading is part of the prompt's, in progress and in time."""
        drafter, told = self._drafter, self._on_prefill
        if not isinstance(drafter, DraftModel):
            return told

        def read_along(done: int, total: int) -> None:
            if done:
                drafter.read(self._text, len(self._text) - total + done)
            if told is not None:
                told(done, total)

        return read_along


def _one(token: int) -> mx.array:
    return mx.array([token], dtype=mx.int32)
