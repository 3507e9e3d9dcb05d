"""The sampler: the truncated distribution of the next token, and the draw from it.

The order is that of Hugging Face transformers and vLLM: logit bias, penalties, temperature, top-k, top-p, min-p.
Arrays in, arrays out; only the random seed comes from outside, where none was given. The steps stand in one file, as
their order and the rows that they share are what has to be right.
"""

from __future__ import annotations

import copy
import dataclasses
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import mlx.core as mx

from mlxqwen.checks import check_integer
from mlxqwen.errors import GenerationError, OptionError
from mlxqwen.sampling.params import SamplingParams

__all__ = [
    "BAD_TOKEN",
    "Sampler",
    "SamplerState",
    "SamplingParams",
    "check_token",
    "token_logprobs",
]

BAD_TOKEN = -1
_BLOCK = 128
_SMALLEST_TEMPERATURE = 1e-30

_Rows: TypeAlias = Sequence[Sequence[int]]
_HistoryState: TypeAlias = tuple[mx.array, mx.array, list[int]]  # replaced by later tokens, never changed
_GroupState: TypeAlias = tuple[mx.array, _HistoryState]


def token_logprobs(
    logits: mx.array,
    params: SamplingParams,
    prompt_tokens: Sequence[int] | _Rows,
    generated_tokens: Sequence[int] | _Rows,
) -> mx.array:
    """Log-probabilities of the distribution that the sampler draws from.

    Computed in float32: the distance between two tokens' scores is right to about 2**-24 of itself and of what bias
    and penalties add to it, over the temperature.

    Args:
        logits: `[V]` or `[B, V]`, any float dtype.
        params: the same for every row; `seed` plays no part.
        prompt_tokens: ids, or for `[B, V]` a sequence of ids per row.
        generated_tokens: the reply so far, likewise.

    Returns:
        float32 of the logits' shape, -inf outside the truncated distribution. Greedy is 0 at the most likely
        token, the lowest id among equals, and -inf elsewhere.

    Raises:
        OptionError: shapes that do not match, or token ids outside the vocabulary.
        GenerationError: a row with NaN or +inf, or with nothing above -inf.
    """
    if logits.ndim == 1:
        return _logprobs(logits[None], params, [_ids(prompt_tokens)], [_ids(generated_tokens)])[0]
    if logits.ndim != 2:
        raise OptionError(f"logits: found shape {logits.shape}, expected [V] or [B, V]")
    rows = logits.shape[0]
    if not rows == len(prompt_tokens) == len(generated_tokens):
        raise OptionError(
            f"token_logprobs: found {len(prompt_tokens)} prompts and {len(generated_tokens)} replies, "
            f"expected {rows} of each, one for each row of logits"
        )
    return _logprobs(logits, params, [_ids(row) for row in prompt_tokens], [_ids(row) for row in generated_tokens])


def _ids(tokens: object) -> list[int]:
    if isinstance(tokens, Sequence):
        return [check_integer("token id", token, 0, 2**31 - 1) for token in tokens]
    raise OptionError(f"token_logprobs: found {tokens!r}, expected a sequence of ids per row")


def _logprobs(logits: mx.array, params: SamplingParams, prompts: _Rows, replies: _Rows) -> mx.array:
    vocab_size = logits.shape[1]
    for reply in replies:
        _check_ids("reply", reply, vocab_size)
    scores = _Scores(_History(params, prompts, replies, vocab_size).adjust(logits), params.temperature)
    for row, token in enumerate(cast(list[int], mx.where(scores.usable, 0, BAD_TOKEN).tolist())):
        check_token(token, row if len(replies) > 1 else None)
    if params.greedy:
        return mx.where(mx.arange(vocab_size) == scores.best[:, None], 0.0, -mx.inf)
    logprobs = mx.where(_Ranking(scores, params).mask(), scores.log_weights(scores.values), -mx.inf)
    return (logprobs - mx.log(_running_sum(mx.exp(logprobs))[:, -1:]))[:, :vocab_size]


class Sampler:
    """Draws one token for each row of a batch, lazily, and remembers what it drew.

    Every row has its own parameters, penalties and random stream, and draws the tokens that it would draw alone. Rows
    that differ only in the seed are computed together.

    Args:
        params: one for each row.
        prompts: the ids of each row's prompt, for the repetition penalty.
        vocab_size: length of a row of logits.

    Raises:
        OptionError: lengths that differ, or token ids outside the vocabulary.
    """

    def __init__(self, params: Sequence[SamplingParams], prompts: _Rows, vocab_size: int) -> None:
        if len(params) != len(prompts):
            raise OptionError(f"Sampler: found {len(params)} params and {len(prompts)} prompts, expected as many")
        self._shape = len(params), vocab_size
        alike: dict[SamplingParams, list[int]] = {}
        for row, one in enumerate(params):
            alike.setdefault(dataclasses.replace(one, seed=None), []).append(row)
        self._groups = [_Group(rows, params, prompts, vocab_size) for rows in alike.values()]

    def __call__(self, logits: mx.array, *, remember: mx.array | None = None) -> mx.array:
        """Draw from logits `[B, V]` of any float dtype; int32 `[B]`, not evaluated.

        A row of NaN, +inf or nothing but -inf gives BAD_TOKEN, which `check_token` refuses.

        Args:
            logits: of the next token.
            remember: the tokens that the replies continue with, int32 `[B]`; by default those drawn.
        """
        if logits.shape != self._shape:
            raise OptionError(f"logits: found shape {logits.shape}, expected {self._shape}")
        if len(self._groups) == 1:
            return self._groups[0].draw(logits, remember)
        tokens = mx.zeros(self._shape[0], dtype=mx.int32)
        for group in self._groups:
            rows = mx.array(group.rows)
            tokens[rows] = group.draw(logits[rows], None if remember is None else remember[rows])
        return tokens

    @property
    def state(self) -> SamplerState:
        """The state after all draws so far, for `restore`; nothing is copied."""
        return SamplerState(tuple(group.state for group in self._groups))

    def restore(self, state: SamplerState) -> None:
        """Return to a `state` of this sampler with the same rows."""
        for group, one in zip(self._groups, state.groups, strict=True):
            group.restore(one)

    def replace(self, drawn: mx.array, tokens: mx.array) -> None:
        """Let the replies continue with `tokens` instead of `drawn`; both int32 `[B]`.

        `drawn` is what was remembered of the last draw. Penalties forget it; the random streams continue as if it had
        been used.
        """
        for group in self._groups:
            rows = mx.array(group.rows)
            group.replace(drawn[rows], tokens[rows])

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays that change with a draw, for `mx.eval`."""
        return [array for group in self._groups for array in group.arrays]

    def extract(self, rows: Sequence[int]) -> Sampler:
        """A sampler of these rows, in this order; this sampler keeps them too."""
        taken = copy.copy(self)
        taken._groups = [group.copy() for group in self._groups]
        taken.keep_rows(rows)
        return taken

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order."""
        self._shape = len(rows), self._shape[1]
        for group in self._groups:
            group.keep_rows(rows)
        self._groups = [group for group in self._groups if group.rows]

    def join(self, others: Sequence[Sampler]) -> None:
        """Append the rows of `others`, with their state; `others` must not be used any more.

        Raises `OptionError` for samplers of another vocabulary.
        """
        rows, vocab_size = self._shape
        alike = {group.params: [group] for group in self._groups}
        for other in others:
            if other._shape[1] != vocab_size:
                raise OptionError(f"join: found a vocabulary of {other._shape[1]}, expected {vocab_size}")
            for group in other._groups:
                group.rows = [rows + row for row in group.rows]
                alike.setdefault(group.params, []).append(group)
            rows += other._shape[0]
        for group, *more in alike.values():
            if more:
                group.join(more)
        self._groups = [group for group, *_ in alike.values()]
        self._shape = rows, vocab_size


def check_token(token: int, row: int | None = None) -> int:
    """The token, unless it is BAD_TOKEN; `row` is named in the error if given.

    Raises:
        GenerationError: the logits were NaN, +inf or nothing but -inf.
    """
    if token == BAD_TOKEN:
        where = "logits" if row is None else f"logits of row {row}"
        raise GenerationError(
            f"{where}: found NaN, +inf or nothing but -inf, expected numbers to draw a token from",
            hint="Try --dtype float32: a narrower one may not hold these weights. If it is in use, some weights are "
            "NaN, infinite or far too large.",
        )
    return token


class SamplerState(NamedTuple):
    """The state of a `Sampler`: the random keys and the history of each of its groups."""

    groups: tuple[_GroupState, ...]


# The same for each key, so that a row's random numbers do not depend on the other rows.
_split_keys = mx.vmap(lambda key: mx.random.split(key, 3))


class _Group:
    """The rows of a batch that share their parameters: their places, history and random streams."""

    def __init__(self, rows: list[int], params: Sequence[SamplingParams], prompts: _Rows, vocab_size: int) -> None:
        self.rows = rows
        self.params = dataclasses.replace(params[rows[0]], seed=None)
        self._history = _History(self.params, [prompts[row] for row in rows], [[]] * len(rows), vocab_size)
        seeds = [params[row].seed for row in rows]
        self._keys = mx.stack([mx.random.key(secrets.randbits(64) if seed is None else seed) for seed in seeds])

    @property
    def state(self) -> _GroupState:
        """The random keys and the history; later draws do not change it."""
        return self._keys, self._history.state

    @property
    def arrays(self) -> list[mx.array]:
        """Random keys and history."""
        return [self._keys, *self._history.arrays]

    def copy(self) -> _Group:
        """The same rows; arrays are shared, as they are replaced and never changed."""
        twin = copy.copy(self)
        twin._history = copy.copy(self._history)
        return twin

    def restore(self, state: _GroupState) -> None:
        """Return to a state."""
        self._keys, self._history.state = state

    def draw(self, logits: mx.array, remember: mx.array | None = None) -> mx.array:
        """One token of each row of logits `[B, V]`, int32 `[B]`; `remember` or the token itself is added to each."""
        scores = _Scores(self._history.adjust(logits), self.params.temperature)
        tokens = mx.where(scores.usable, self._pick(scores).astype(mx.int32), BAD_TOKEN)
        self._history.add(tokens if remember is None else remember)
        return tokens

    def _pick(self, scores: _Scores) -> mx.array:
        if self.params.greedy:
            return scores.best
        keys = _split_keys(self._keys)
        self._keys = keys[:, 0]
        # The other two keys are random bits themselves: 24 of each word make a float32 in [0, 1).
        uniform = (keys[:, 1:].reshape(-1, 4) >> 8).astype(mx.float32) * 2.0**-24
        if self.params.top_k > 0 or self.params.top_p < 1.0:
            return _Ranking(scores, self.params).draw(uniform)
        weights = mx.exp(scores.log_weights(scores.values))
        return _pick(weights * (weights >= self.params.min_p) if self.params.min_p else weights, uniform)

    def replace(self, drawn: mx.array, tokens: mx.array) -> None:
        """Let the rows continue with `tokens` instead of `drawn`, the last draw; both int32 `[B]`."""
        self._history.replace(drawn, tokens)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only the rows of the batch that `rows` lists, in the order that it gives."""
        places = {row: place for place, row in enumerate(self.rows)}
        kept = [(new, places[old]) for new, old in enumerate(rows) if old in places]
        if [place for _, place in kept] != list(range(len(self.rows))):
            chosen = mx.array([place for _, place in kept], dtype=mx.int32)
            self._keys = self._keys[chosen]
            self._history.keep_rows(chosen)
        self.rows = [new for new, _ in kept]

    def join(self, others: Sequence[_Group]) -> None:
        """Append the rows of groups with the same parameters."""
        self.rows = [*self.rows, *(row for other in others for row in other.rows)]
        self._keys = mx.concatenate([self._keys, *(other._keys for other in others)])
        self._history.join([other._history for other in others])


class _History:
    """The counts of tokens for bias and penalties, of rows with the same parameters; empty if they are off."""

    def __init__(self, params: SamplingParams, prompts: _Rows, replies: _Rows, vocab_size: int) -> None:
        self._params = params
        self._bias = self._prompt = self._reply = mx.zeros(0)
        # Ids that penalties may concern, on the right of each row; on the left any, as none is harmed by being listed.
        self._touched, self._widths = mx.zeros(0), list[int]()
        self._penalised = params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)
        if params.logit_bias:
            _check_ids("logit_bias", params.logit_bias, vocab_size)
            ids = mx.array(list(params.logit_bias), dtype=mx.int32)
            self._bias = mx.zeros(vocab_size).at[ids].add(mx.array(list(params.logit_bias.values())))
        if self._penalised:
            self._reply = _count("reply", replies, vocab_size)
            touched: list[Collection[int]] = [set(reply) for reply in replies]
            if params.repetition_penalty != 1.0:
                self._prompt = _count("prompt", prompts, vocab_size)
                touched = [{*prompt, *reply} for prompt, reply in zip(prompts, replies, strict=True)]
            self._widths = [len(tokens) for tokens in touched]
            self._touched = _rectangle(touched)

    @property
    def arrays(self) -> list[mx.array]:
        """What is computed from tokens."""
        return [self._reply, self._touched, self._prompt, self._bias] if self._penalised else []

    @property
    def state(self) -> _HistoryState:
        """What changes as tokens are added."""
        return self._reply, self._touched, self._widths

    @state.setter
    def state(self, state: _HistoryState) -> None:
        self._reply, self._touched, self._widths = state

    def add(self, tokens: mx.array) -> None:
        """Count the token of each row, int32 `[B]`."""
        if self._penalised:
            rows, vocab_size = self._reply.shape
            self._reply = self._reply.at[mx.arange(rows), tokens].add(1.0)
            self._touched = mx.concatenate([self._touched, tokens[:, None]], axis=1)
            self._widths = [width + 1 for width in self._widths]
            if self._touched.shape[1] >= vocab_size:
                self._touch_all()

    def replace(self, old: mx.array, new: mx.array) -> None:
        """Count `new` instead of `old`, the tokens added last; both int32 `[B]`."""
        if self._penalised:
            rows, vocab_size = self._reply.shape
            places = mx.arange(rows)
            self._reply = self._reply.at[places, old].add(-1.0).at[places, new].add(1.0)
            if self._touched.shape[1] < vocab_size:  # else it holds every token
                self._touched = mx.concatenate([self._touched[:, :-1], new[:, None]], axis=1)

    def keep_rows(self, rows: mx.array) -> None:
        """Keep only these rows, in this order."""
        if self._penalised:
            self._reply, self._touched = self._reply[rows], self._touched[rows]
            self._widths = [self._widths[row] for row in cast(list[int], rows.tolist())]
            self._touched = self._touched[:, -max([1, *self._widths]) :]
        if self._params.repetition_penalty != 1.0:
            self._prompt = self._prompt[rows]

    def join(self, others: Sequence[_History]) -> None:
        """Append the rows of histories with the same parameters."""
        if not self._penalised:
            return
        both = [self, *others]
        self._reply = mx.concatenate([one._reply for one in both])
        self._widths = [width for one in both for width in one._widths]
        widest = max(one._touched.shape[1] for one in both)
        if widest >= self._reply.shape[1]:
            self._touch_all()
        else:
            padding = [[(0, 0), (widest - one._touched.shape[1], 0)] for one in both]
            self._touched = mx.concatenate([mx.pad(one._touched, p) for one, p in zip(both, padding, strict=True)])
        if self._params.repetition_penalty != 1.0:
            self._prompt = mx.concatenate([one._prompt for one in both])

    def _touch_all(self) -> None:
        rows, vocab_size = self._reply.shape
        self._widths = [vocab_size] * rows
        self._touched = mx.broadcast_to(mx.arange(vocab_size), (rows, vocab_size))

    def adjust(self, logits: mx.array) -> mx.array:
        """Logits `[B, V]` of any float dtype with bias and penalties; float32, and with any of these less a constant.

        The peak is taken off first: next to logits of 1e4, float32 would round a penalty to 5e-4.
        """
        scores = logits.astype(mx.float32)
        if not self._penalised and not self._params.logit_bias:
            return scores
        peak = _peak(scores)
        scores = scores - peak
        if self._params.logit_bias:
            scores = scores + self._bias
        if not self._penalised:
            return scores
        touched = mx.take_along_axis(scores, self._touched, axis=1)
        counts = mx.take_along_axis(self._reply, self._touched, axis=1)
        if self._params.repetition_penalty != 1.0:
            seen = counts + mx.take_along_axis(self._prompt, self._touched, axis=1) > 0
            scores, touched = self._repeated(scores, touched, seen, peak)
        penalty = self._params.presence_penalty * (counts > 0) + self._params.frequency_penalty * counts
        return mx.put_along_axis(scores, self._touched, touched - penalty, axis=1)

    def _repeated(
        self, scores: mx.array, touched: mx.array, seen: mx.array, peak: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The repetition penalty on `touched + peak` where seen; all scores and those touched, less about the maximum.

        What the penalty makes of the peak is the same for all tokens of one sign: taken off the maximum before the
        rest is added, it leaves their distances as they are.
        """
        penalty = self._params.repetition_penalty
        change = seen * mx.where(touched > -peak, 1.0 / penalty - 1.0, penalty - 1.0)
        spread, shift = touched * (1.0 + change), peak * change
        peak = _peak(mx.put_along_axis(scores, self._touched, spread + shift, axis=1))
        return scores - peak, spread + (shift - peak)


def _count(name: str, rows: _Rows, vocab_size: int) -> mx.array:
    """How often each token is in each row: float32 `[B, V]`."""
    for tokens in rows:
        _check_ids(name, tokens, vocab_size)
    places = mx.array([place for place, tokens in enumerate(rows) for _ in tokens], dtype=mx.int32)
    ids = mx.array([token for tokens in rows for token in tokens], dtype=mx.int32)
    return mx.zeros((len(rows), vocab_size)).at[places, ids].add(1.0)


def _rectangle(rows: Sequence[Collection[int]]) -> mx.array:
    """Ids as int32 `[B, n]`; shorter rows have token 0 on their left."""
    width = max(1, *map(len, rows))
    return mx.array([[*[0] * (width - len(tokens)), *tokens] for tokens in rows], dtype=mx.int32)


def _peak(scores: mx.array) -> mx.array:
    """The largest of each row, `[B, 1]`: in two steps, which is quicker."""
    return mx.max(mx.max(_in_blocks(scores, -mx.inf), axis=-1), axis=-1, keepdims=True)


def _check_ids(name: str, ids: Sequence[int] | Mapping[int, float], vocab_size: int) -> None:
    for token in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token < vocab_size:
            raise OptionError(f"{name}: found token {token}, expected ids below the vocabulary size {vocab_size}")


class _Scores:
    """Float32 scores, filled up with -inf to whole blocks `[B, n, 128]`, and the blocks' and rows' peaks."""

    def __init__(self, scores: mx.array, temperature: float) -> None:
        self.blocks = _in_blocks(scores, -mx.inf)
        self.values = self.blocks.flatten(1)
        self.block_peaks = mx.max(self.blocks, axis=-1)
        self.peak = mx.max(self.block_peaks, axis=-1)
        self._temperature = max(temperature, _SMALLEST_TEMPERATURE)

    @property
    def usable(self) -> mx.array:
        """Whether a token can be drawn from each row; NaN and infinities show in the peak."""
        return mx.abs(self.peak) < mx.inf

    @property
    def best(self) -> mx.array:
        """The most likely token, the lowest id among equals: an argmax in two steps, which is quicker."""
        block = mx.argmax(self.block_peaks, axis=-1)
        return block * _BLOCK + mx.argmax(_at(self.blocks, block), axis=-1)

    def log_weights(self, scores: mx.array) -> mx.array:
        """Log-probabilities of scores `[B, n]` relative to the best token's."""
        return (scores - self.peak[:, None]) / self._temperature


class _Ranking:
    """The tokens that top-k, top-p and min-p leave of each row.

    All three keep a prefix of the tokens in the order of falling score, equals by rising id. It is held as the
    best n scores with their weights, and how many tokens of each are kept: 0 or 1, but of the last, which stands
    for all that tie with it outside the n too, any number.
    """

    def __init__(self, scores: _Scores, params: SamplingParams) -> None:
        size = min(params.top_k or scores.values.shape[1], scores.values.shape[1])
        self._scores = scores
        self._best = _largest(scores, size)
        self._weights = mx.exp(scores.log_weights(self._best))
        last = mx.sum(scores.values >= self._best[:, -1:], axis=-1, keepdims=True) - (size - 1.0)
        kept = mx.concatenate([mx.ones((last.shape[0], size - 1)), last], axis=-1)
        if params.top_p < 1.0:
            kept = self._reaching(params.top_p, kept)
        if params.min_p > 0.0:
            kept = kept * (self._weights >= params.min_p)
        self._kept = kept

    def _reaching(self, top_p: float, counts: mx.array) -> mx.array:
        """How many of each are needed until their mass is `top_p` of the whole."""
        masses = counts * self._weights
        running = _running_sum(masses)
        missing = top_p * running[:, -1:] - (running - masses)
        needed = mx.minimum(mx.ceil(missing / self._weights), counts)
        return mx.where(missing > 0, needed, 0.0)

    def mask(self) -> mx.array:
        """Which of `scores.values` are kept: bool `[B, n]`."""
        values = self._scores.values
        lowest = mx.min(mx.where(self._kept > 0, self._best, mx.inf), axis=-1, keepdims=True)
        equal = values == lowest
        room = mx.sum(self._kept * (self._best == lowest), axis=-1, keepdims=True)
        return (values > lowest) | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= room))

    def draw(self, uniform: mx.array) -> mx.array:
        """A kept token of each row, from uniform numbers `[B, 4]`: first its score, then which of its equals."""
        score = _at(self._best, _pick(self._kept * self._weights, uniform))[:, None]
        equals = mx.sum(self._kept * (self._best == score), axis=-1, keepdims=True)
        index = (uniform[:, 3:] * equals).astype(mx.int32)
        equal = self._scores.blocks == score[..., None]
        running = mx.cumsum(mx.sum(equal, axis=-1), axis=-1)
        block = mx.argmax(running > index, axis=-1)
        after = _at(running, block)[:, None] - index
        running = mx.cumsum(_at(equal, block), axis=-1)
        return block * _BLOCK + mx.argmax(running > running[:, -1:] - after, axis=-1)


def _largest(scores: _Scores, size: int) -> mx.array:
    """The `size` largest scores of each row, falling.

    Blocks that hold one of them are among the `size` with the highest peaks, so few need a closer look.
    """
    candidates = scores.values
    if 2 * size * _BLOCK <= candidates.shape[1]:
        chosen = mx.argpartition(scores.block_peaks, -size, axis=-1)[:, -size:]
        candidates = mx.take_along_axis(scores.blocks, chosen[..., None], axis=1).flatten(1)
    return mx.sort(mx.topk(candidates, size, axis=-1), axis=-1)[:, ::-1]


def _at(values: mx.array, index: mx.array) -> mx.array:
    """`values[row, index[row]]` for each row: `[B, n, ...]` and `[B]` to `[B, ...]`."""
    index = index.reshape(-1, *[1] * (values.ndim - 1))
    return mx.take_along_axis(values, index, axis=1).squeeze(1)


def _in_blocks(values: mx.array, filler: float) -> mx.array:
    """`[B, n]` as `[B, ceil(n / 128), 128]`."""
    missing = -values.shape[1] % _BLOCK
    if missing:
        values = mx.pad(values, [(0, 0), (0, missing)], constant_values=filler)
    return values.reshape(values.shape[0], -1, _BLOCK)


def _running_sum(values: mx.array) -> mx.array:
    """Cumulative sums of `[B, n]` in blocks, whose rounding error grows with log n instead of n."""
    rows, size = values.shape
    if size <= _BLOCK:
        return mx.cumsum(values, axis=-1)
    within = mx.cumsum(_in_blocks(values, 0.0), axis=-1)
    before = mx.pad(_running_sum(within[..., -1])[:, :-1], [(0, 0), (1, 0)])
    return (within + before[..., None]).reshape(rows, -1)[:, :size]


def _pick(weights: mx.array, uniform: mx.array) -> mx.array:
    """An index of each row `[B, n]` with the probability of its weight, from numbers in [0, 1), `[B, 4]`.

    A long row is drawn from in steps, block and place within it: 24 random bits are too coarse for one.
    """
    if weights.shape[1] <= _BLOCK:
        running = mx.cumsum(weights, axis=-1)
        return mx.argmax(running > uniform[:, :1] * running[:, -1:], axis=-1)
    blocks = _in_blocks(weights, 0.0)
    block = _pick(mx.sum(blocks, axis=-1), uniform[:, 1:])
    return block * _BLOCK + _pick(_at(blocks, block), uniform)
