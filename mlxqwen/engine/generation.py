"""Token ids in → token ids out: prefill, the decode loop, batches. Knows nothing of text.

Rows of a batch are padded on the right and masked by position, so that each gets what it would get alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import mlx.core as mx

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.device import Device, current_device
from mlxqwen.errors import CacheError, ContextLengthError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import BAD_TOKEN, Sampler, check_token

__all__ = [
    "DEFAULT_DRAFT_TOKENS",
    "DEFAULT_MAX_TOKENS",
    "MAX_DRAFT_TOKENS",
    "FinishReason",
    "GeneratedToken",
    "TokenStream",
    "Tokens",
    "as_token_ids",
    "check_cache",
    "check_count",
    "check_draft_tokens",
    "check_ids",
    "check_prompt",
    "generate_tokens",
    "room_for_answer",
]

DEFAULT_MAX_TOKENS = 32_768  # the model cards' advice
_LONGEST_PREFILL_CHUNK = 512
_SHORTEST_PREFILL_CHUNK = 32
_WORK_SPACE = 44 * 2**20  # bytes; the rest of 64 MiB is scores and slack
DEFAULT_DRAFT_TOKENS = 8
MAX_DRAFT_TOKENS = 64  # logits of so many positions are there at once: 39 MB of 151,936 tokens in float32
_CLEAR_EVERY = 256  # tokens
_PADDING = 16  # tokens a row: reading so many more costs less than one step more
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
    prefill_chunk: int | None = None,
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
            steps may have added that too: `offsets` tell). Rows that end before others leave it, those that
            `TokenStream.add` takes in join it. Made if not given.
        cached_tokens: that the cache's first so many tokens are the first of each prompt: these are not read again, and
            what the cache holds behind them is forgotten as generation starts. By default prompts follow all it holds.
        prefill_chunk: prompt tokens a step, over all rows; memory grows with it, and by default `fitting_prefill_chunk`
            keeps it small. Only prompts of about one length are
            read together.
        on_prefill: called with (tokens done, tokens in all) before the first chunk and after each; those of all
            prompts that are read at one time count, cached ones do not.
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
    device = device or current_device()
    prefill_chunk = chosen_prefill_chunk(prefill_chunk, model.config, device)
    most = [*max_tokens] if isinstance(max_tokens, Sequence) else [max_tokens] * len(rows)
    if len(most) != len(rows):
        raise OptionError(f"max_tokens: found {len(most)} for {len(rows)} prompts")
    params = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(rows)
    if len(params) != len(rows):
        raise OptionError(f"sampling: found {len(params)} sets of parameters for {len(rows)} prompts")
    cache = make_cache(model, batch_size=len(rows)) if cache is None else cache
    check_cache(cache, model, rows, cached_tokens)
    held = cache.offsets if cached_tokens is None else [0] * len(rows)
    return TokenStream(
        model,
        [
            _new_row(model, number, row, one, limit, cache.max_kv_size, held=offset, cached_tokens=cached_tokens or 0)
            for number, (row, one, limit, offset) in enumerate(zip(rows, params, most, held, strict=True))
        ],
        frozenset(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids),
        cache,
        cached_tokens,
        prefill_chunk,
        on_prefill,
        device,
    )


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


def chosen_prefill_chunk(value: int | None, config: ModelConfig, device: Device | None = None) -> int:
    """What is asked for, or what fits. Raises `OptionError` for what is no number of tokens."""
    if value is None:
        return fitting_prefill_chunk(config, device or current_device())
    check_count("prefill_chunk", value)
    return value


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


def check_cache(
    cache: KVCache, model: Qwen3ForCausalLM, rows: Sequence[Sequence[int]], cached_tokens: int | None
) -> None:
    """Refuse a cache that these prompts cannot go on with. Raises `OptionError` or `CacheError`."""
    if not isinstance(cache, KVCache):
        raise OptionError(f"cache: found {type(cache).__name__}, expected what make_cache(model) returns")
    if cache.batch_size != len(rows):
        raise CacheError(f"cache: made for {cache.batch_size} rows, found {len(rows)} prompts")
    if not cache.fits(model.config):
        raise CacheError("cache: made for another model", hint="Make it with make_cache and this model.")
    if cached_tokens is not None:
        _check_cached_tokens(cached_tokens, cache, rows)


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


def check_draft_tokens(value: object) -> None:
    """Refuse what is no number of tokens to guess at once. Raises `OptionError`."""
    check_count("draft_tokens", value)
    if cast(int, value) > MAX_DRAFT_TOKENS:
        raise OptionError(
            f"draft_tokens: found {value:,}, expected at most {MAX_DRAFT_TOKENS}",
            hint="Longer drafts gain nothing: few of them are right to the end, and all their logits take memory.",
        )


def _rows(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """One list of ids a row, checked."""
    given = as_token_ids(prompts)
    rows = [given] if not given or isinstance(given[0], int) else [as_token_ids(row) for row in given]
    for row in rows:
        check_prompt(row, vocab_size)
    return rows


def check_ids(name: str, tokens: Sequence[Any], vocab_size: int) -> None:
    """Refuse what is no token id of the model. Raises `OptionError`."""
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise OptionError(f"{name}: found {token!r}, expected token ids from 0 to {vocab_size - 1}")


def check_prompt(tokens: Sequence[Any], vocab_size: int) -> None:
    """Refuse an empty prompt and what is no token id of the model. Raises `OptionError`."""
    if not tokens:
        raise OptionError("prompt: found no tokens, expected at least one")
    check_ids("prompt", tokens, vocab_size)


@dataclass(slots=True)
class _Row:
    """A prompt and its answer.

    Args:
        number: counts the stream's rows.
        follows: whether what comes before it is in the stream's cache, in the row of its number.
        unread: what of the prompt the cache does not hold.
        sampler: its own, until it joins that of the batch.
        limit: tokens that it may have.
        count: tokens that it has.
        ended: no further token of it is told.
        pending: forced tokens to come.
        unless: tokens that are kept in place of the forced ones.
    """

    number: int
    follows: bool
    unread: list[int]
    sampler: Sampler
    limit: int
    count: int = 0
    ended: bool = False
    pending: deque[int] = field(default_factory=deque)
    unless: frozenset[int] = frozenset()


def _new_row(
    model: Qwen3ForCausalLM,
    number: int,
    prompt: list[int],
    sampling: SamplingParams,
    max_tokens: int,
    max_kv_size: int | None,
    *,
    held: int | None = None,
    cached_tokens: int = 0,
) -> _Row:
    """A row whose prompt, less `cached_tokens`, follows the `held` tokens of the stream's cache, or begins anew.

    Refused as `generate_tokens` says.
    """
    check_count("max_tokens", max_tokens)
    if not isinstance(sampling, SamplingParams):
        raise OptionError(f"sampling: found {type(sampling).__name__}, expected SamplingParams")
    room = room_for_answer(model, (held or 0) + len(prompt), max_kv_size)
    sampler = Sampler([sampling], [prompt], model.config.vocab_size)
    return _Row(number, held is not None, prompt[cached_tokens:], sampler, min(max_tokens, room))


class TokenStream:
    """The running generation behind `generate_tokens`: iterate it, `add` rows, `force` what one says, `stop` it early.

    A prompt is read apart from the rows that are running, and then joins them. Those that are read at one time are
    sorted by length: what goes through the model together is about equally long and no more than a chunk, so padding
    stays below a quarter of the prompts, or 16 tokens a row.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        rows: list[_Row],
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
        self._rows = {row.number: row for row in rows}  # that have not ended
        self._row_count = len(rows)
        self._waiting = rows
        self._active: list[_Row] = []
        self._sampler = Sampler([], [], model.config.vocab_size)
        self._eos_token_ids = eos_token_ids
        self._prefill_chunk = prefill_chunk
        self._on_prefill = on_prefill
        self._overlap = device.overlaps_steps
        self._over = False
        self._tokens = self._run()

    def __iter__(self) -> Iterator[GeneratedToken]:
        return self

    def __next__(self) -> GeneratedToken:
        try:
            return next(self._tokens)
        except BaseException:
            self._over = True
            raise

    def add(
        self, prompt: Tokens, *, sampling: SamplingParams | None = None, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> int:
        """Take in one more prompt → the number of its row. It joins after the step that is being told.

        It begins anew, whatever the stream's cache held at first, and gets the tokens that it would get alone.

        Args:
            prompt: ids, a list or an integer array.
            sampling, max_tokens: see `generate_tokens`.

        Raises:
            ContextLengthError, OptionError: as `generate_tokens`; also once the stream is over. The others go on.
        """
        if self._over:
            raise OptionError("add: found a stream that is over", hint="Add rows while others run, or start anew.")
        tokens = as_token_ids(prompt)
        check_prompt(tokens, self._model.config.vocab_size)
        sampling = SamplingParams() if sampling is None else sampling
        row = _new_row(self._model, self._row_count, tokens, sampling, max_tokens, self.cache.max_kv_size)
        self._rows[row.number] = row
        self._row_count += 1
        self._waiting.append(row)
        return row.number

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
        self._check_row("force", row)
        check_ids("force", tokens, self._model.config.vocab_size)
        going = self._rows.get(row)
        if going is None:
            return
        if not going.pending:
            going.unless = frozenset(unless)
        going.pending.extend(tokens)

    def stop(self, row: int) -> None:
        """End `row` here: no further token of it is computed. Raises `OptionError` for no such row."""
        self._check_row("stop", row)
        if row in self._rows:
            self._end(self._rows[row])

    def _check_row(self, name: str, row: int) -> None:
        if not 0 <= row < self._row_count:
            raise OptionError(f"{name}: found row {row}, expected a row from 0 to {self._row_count - 1}")

    def _end(self, row: _Row) -> None:
        """A stream may run for hours: of a row that has ended nothing stays but what the step that runs has of it."""
        row.ended = True
        self._rows.pop(row.number, None)

    def close(self) -> None:
        """End all rows."""
        self._over = True
        self._tokens.close()

    def _run(self) -> Generator[GeneratedToken, None, None]:
        if self._cached_tokens is not None:
            self.cache.trim(self._cached_tokens)
        self._forget_stopped()
        drawn = self._admit(mx.zeros(0, dtype=mx.int32), []) if self._waiting else mx.zeros(0, dtype=mx.int32)
        steps = 0
        while self._active:
            steps += 1
            if steps % _CLEAR_EVERY == 0:
                mx.clear_cache()  # buffers that the cache has outgrown, and that nothing else is large enough for
            forced: set[int] = set()
            if any(row.pending for row in self._active):
                drawn, forced = self._enforce(drawn)
            ahead = None
            if self._overlap and any(row.count + 1 < row.limit for row in self._active):
                ahead = self._step(drawn)
            numbers = [row.number if self._row_count > 1 else None for row in self._active]
            tokens = list(map(check_token, cast(list[int], drawn.tolist()), numbers))
            for row, token in zip(self._active, tokens, strict=True):
                row.count += 1
                reason = self._reason(row, token)
                if not row.ended:
                    yield GeneratedToken(row.number, token, reason, row.number in forced)
                if reason is not None:
                    self._end(row)
            going = [place for place, row in enumerate(self._active) if not row.ended]
            self._forget_stopped()
            if not going and not self._waiting:
                return
            drawn = self._go_on(drawn, ahead, going)

    def _forget_stopped(self) -> None:
        """Rows that are stopped before they join are not read."""
        self._waiting = [row for row in self._waiting if not row.ended]

    def _go_on(self, drawn: mx.array, ahead: mx.array | None, going: list[int]) -> mx.array:
        """The next tokens, of the rows that are going and of those that join.

        Where some join, those that have ended take part in one step more, so that the cache is put together only once.
        """
        if self._waiting:
            if going and ahead is None:
                ahead = self._step(drawn)
            return self._admit(drawn if ahead is None else ahead, going)
        if ahead is None:
            return self._step(self._leave(drawn, going))
        return self._leave(ahead, going)

    def _reason(self, row: _Row, token: int) -> FinishReason | None:
        if token in self._eos_token_ids:
            return "stop"
        return "length" if row.count >= row.limit else None

    def _enforce(self, drawn: mx.array) -> tuple[mx.array, set[int]]:
        """Put pending tokens in the place of those drawn → the step's tokens, and the rows that were forced."""
        tokens = cast(list[int], drawn.tolist())
        forced = set()
        for place, row in enumerate(self._active):
            if not row.pending:
                continue
            kept, row.unless = {BAD_TOKEN, *row.unless}, frozenset()
            if tokens[place] in kept:
                row.pending.clear()
            else:
                tokens[place] = row.pending.popleft()
                forced.add(row.number)
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
        if going == list(range(len(self._active))):
            return tokens
        self.cache.keep_rows(going)
        self._sampler.keep_rows(going)
        self._active = [self._active[place] for place in going]
        return tokens[mx.array(going, dtype=mx.int32)]

    def _admit(self, tokens: mx.array, going: list[int]) -> mx.array:
        """Read the prompts that wait, and let them join the rows at the places `going` → `tokens` of all."""
        waiting, self._waiting = self._waiting, []
        progress = _Progress(self._on_prefill, sum(len(row.unread) for row in waiting))
        parts: list[tuple[KVCache, Sequence[int]]] = [(self.cache, going)] if going else []
        drawn, samplers = [tokens[mx.array(going, dtype=mx.int32)]], []
        active = [self._active[place] for place in going]
        for group in _alike(waiting, self._prefill_chunk):
            cache = self._cache_for(group)
            sampler, *others = [row.sampler for row in group]
            sampler.join(others)
            drawn.append(sampler(self._prefill(group, cache, progress)))
            mx.async_eval(drawn[-1])
            parts.append((cache, range(len(group))))
            samplers.append(sampler)
            active += group
            for row in group:
                del row.unread, row.sampler
        if len(parts) > 1 or parts[0][0] is not self.cache:
            self.cache.assemble(parts)
        self._sampler.keep_rows(going)
        self._sampler.join(samplers)
        self._active = active
        in_order = sorted(range(len(active)), key=lambda place: active[place].number)
        return self._leave(mx.concatenate(drawn), in_order)

    def _cache_for(self, group: list[_Row]) -> KVCache:
        """What holds all that comes before the prompts of `group`, and nothing else."""
        places = [row.number for row in group if row.follows]
        if places == list(range(self.cache.batch_size)):
            return self.cache
        cache = self.cache.like(len(group))
        if places and self.cache.offset:
            cache.assemble([(self.cache, places)])
        return cache

    def _prefill(self, rows: list[_Row], cache: KVCache, progress: _Progress) -> mx.array:
        """Prompts through the model in chunks → the logits `[B, vocab_size]` behind each one's last token."""
        longest = max(len(row.unread) for row in rows)
        cache.reserve(cache.offset + longest + 1)
        last_hidden: list[mx.array | None] = [None] * len(rows)
        for start in range(0, longest, self._prefill_chunk):
            length = min(self._prefill_chunk, longest - start)
            pieces = [row.unread[start : start + length] for row in rows]
            lengths = [len(piece) for piece in pieces]
            padded = mx.array([piece + [0] * (length - len(piece)) for piece in pieces], dtype=mx.int32)
            hidden = self._model.model(padded, cache, lengths=lengths, last_only=True)
            for place, row in enumerate(rows):
                if start < len(row.unread) <= start + length:
                    last_hidden[place] = hidden[place, 0]
            mx.eval(cache.state, [one for one in last_hidden if one is not None])
            mx.clear_cache()  # the chunk's work space, which decoding has no use for
            progress.advance(sum(lengths))
        return self._model.logits(mx.stack([one for one in last_hidden if one is not None]))


def _alike(rows: list[_Row], chunk: int) -> list[list[_Row]]:
    """Groups of rows to be read together: about equally long, and padded no more than a chunk in all."""

    def may_join(row: _Row, group: list[_Row]) -> bool:
        shortest, length = len(group[0].unread), len(row.unread)
        close = length <= shortest + max(_PADDING, shortest // 4)
        return row.follows == group[0].follows and close and (len(group) + 1) * length <= chunk

    groups: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: (row.follows, len(row.unread))):
        if groups and may_join(row, groups[-1]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=lambda row: row.number) for group in groups]


class _Progress:
    """How many tokens of the prompts that are read at one time have been read."""

    def __init__(self, told: Callable[[int, int], None] | None, total: int) -> None:
        self._told = told
        self._done, self._total = 0, total
        self.advance(0)

    def advance(self, tokens: int) -> None:
        self._done += tokens
        if self._told:
            self._told(self._done, self._total)
