"""What a token is drawn from, and the draw.

The order is that of Hugging Face transformers and vLLM: logit bias, penalties, temperature, top-k, top-p,
min-p. Arrays in, arrays out; the only thing taken from outside is a random seed where none was given.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from mlxqwen.errors import GenerationError, OptionError

__all__ = [
    "NON_THINKING",
    "THINKING",
    "Sampler",
    "SamplingParams",
    "check_token",
    "resolve_sampling",
    "token_logprobs",
]

BAD_TOKEN = -1
_BLOCK = 128
_NO_DISTRIBUTION = "logits: found NaN, +inf or nothing but -inf, expected numbers to draw a token from"
_SMALLEST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the next token. Every default leaves the model's distribution as it is.

    Args:
        temperature: divides the logits, 0 to 100; 0 is greedy.
        top_k: keep the k most likely tokens and all that tie with the k-th; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches this, in (0, 1]; of equals the lower ids.
        min_p: keep tokens at least this fraction as likely as the most likely one, 0 to 1.
        presence_penalty: subtracted from the logit of each token already in the reply, -2 to 2.
        frequency_penalty: the same, times how often the token is in the reply, -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the
            reply, 0.01 to 100.
        logit_bias: token id to a number in [-100, 100] that is added to its logit before everything else.
        seed: 0 to 2**64 - 1; the same seed draws the same tokens. None draws anew each time.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, low_is_open) in _RANGES.items():
            value = _real(name, getattr(self, name), low, high, low_is_open=low_is_open)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "top_k", _integer("top_k", self.top_k, 2**31))
        if self.seed is not None:
            object.__setattr__(self, "seed", _integer("seed", self.seed, 2**64))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether every draw is the most likely token."""
        return self.temperature == 0.0


_RANGES = {
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.01, 100.0, False),
}


def _real(name: str, value: object, low: float, high: float, *, low_is_open: bool = False) -> float:
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if low <= number <= high and not (low_is_open and number == low):
            return number
    interval = f"{'(' if low_is_open else '['}{low:g}, {high:g}]"
    raise OptionError(f"{name}: found {value!r}, expected a number in {interval}")


def _integer(name: str, value: object, end: int) -> int:
    if not isinstance(value, bool) and isinstance(value, Integral) and 0 <= int(value) < end:
        return int(value)
    raise OptionError(f"{name}: found {value!r}, expected an integer from 0 to {end - 1}")


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias: found {value!r}, expected a mapping of token ids to numbers")
    return {
        _integer("logit_bias token id", token, 2**31): _real(f"logit_bias of token {token}", bias, -100.0, 100.0)
        for token, bias in value.items()
    }


THINKING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
NON_THINKING = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0)

_PROFILE_KEYS = ("temperature", "top_p", "top_k", "min_p")
_FILE_KEYS = (*_PROFILE_KEYS, "presence_penalty", "frequency_penalty", "repetition_penalty")
_OPTION_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams))


def resolve_sampling(
    generation_config: object, *, thinking: bool, overrides: Mapping[str, Any]
) -> tuple[SamplingParams, tuple[str, ...]]:
    """The parameters to use, and one line for each value of the file that had to be ignored.

    Three layers, each over the one before: the checkpoint's file, the model card's profile of the mode
    (temperature, top-p, top-k and min-p, so that greedy is never a default), the user's options.

    Args:
        generation_config: the parsed `generation_config.json`, whatever it holds; other keys play no part.
        thinking: which profile.
        overrides: the user's options by the names of `SamplingParams`; None means not given.

    Raises:
        OptionError: an override that is unknown or out of range.
    """
    from_file, notes = _from_generation_config(generation_config)
    profile = THINKING if thinking else NON_THINKING
    for name in overrides:
        if name not in _OPTION_KEYS:
            raise OptionError(f"sampling option: found {name!r}, expected one of {', '.join(_OPTION_KEYS)}")
    chosen = {name: value for name, value in overrides.items() if value is not None}
    card = {name: getattr(profile, name) for name in _PROFILE_KEYS}
    return SamplingParams(**{**from_file, **card, **chosen}), notes


def _from_generation_config(config: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    if not isinstance(config, Mapping):
        return {}, (f"generation_config.json: found {type(config).__name__}, expected an object; ignored",)
    values: dict[str, Any] = {}
    notes: list[str] = []
    for name in _FILE_KEYS:
        if config.get(name) is None:
            continue
        try:
            values[name] = getattr(SamplingParams(**{name: config[name]}), name)
        except OptionError as error:
            notes.append(f"generation_config.json: {error.problem}; ignored")
    return values, tuple(notes)


def token_logprobs(
    logits: mx.array,
    params: SamplingParams,
    prompt_tokens: Sequence[int] | Sequence[Sequence[int]],
    generated_tokens: Sequence[int] | Sequence[Sequence[int]],
) -> mx.array:
    """Log-probabilities of the distribution that the sampler draws from.

    Args:
        logits: `[V]` or `[B, V]`, any float dtype; computed in float32.
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
        return _row_logprobs(logits, params, _flat(prompt_tokens), _flat(generated_tokens))
    if logits.ndim != 2:
        raise OptionError(f"logits: found shape {logits.shape}, expected [V] or [B, V]")
    rows = logits.shape[0]
    if not rows == len(prompt_tokens) == len(generated_tokens):
        raise OptionError(
            f"token_logprobs: found {len(prompt_tokens)} prompts and {len(generated_tokens)} replies, "
            f"expected {rows} of each, one for each row of logits"
        )
    return mx.stack(
        [
            _row_logprobs(logits[row], params, _nested(prompt_tokens[row]), _nested(generated_tokens[row]))
            for row in range(rows)
        ]
    )


def _flat(tokens: Sequence[int] | Sequence[Sequence[int]]) -> list[int]:
    return [_integer("token id", token, 2**31) for token in tokens]


def _nested(tokens: int | Sequence[int]) -> list[int]:
    if isinstance(tokens, Sequence):
        return _flat(tokens)
    raise OptionError(f"token_logprobs: found {tokens!r} in a batch, expected a sequence of ids per row")


def _row_logprobs(
    logits: mx.array, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> mx.array:
    _check_ids("reply", generated, logits.size)
    history = _History(params, prompt, logits.size)
    history.add(mx.array(list(generated), dtype=mx.int32))
    scores = history.adjust(logits)
    if not mx.isfinite(scores.peak).item():
        raise GenerationError(_NO_DISTRIBUTION)
    if params.greedy:
        return mx.where(mx.arange(logits.size) == scores.best, 0.0, -mx.inf)
    scaled = scores.scaled(params.temperature)
    kept = _Ranking(scores, params).mask() if _is_ranked(params) else scaled >= _min_p_floor(params)
    total = _running_sum(mx.where(kept, mx.exp(scaled), 0.0))[-1]
    return mx.where(kept, scaled - mx.log(total), -mx.inf)


class Sampler:
    """Draws one token for each row of a batch, lazily, and remembers what it drew.

    Every row has its own parameters, penalties and random stream, and is computed by the same operations on
    the same shapes whatever else is in the batch: a row draws the tokens that it would draw alone.

    Args:
        params: one for each row.
        prompts: the ids of each row's prompt, for the repetition penalty.
        vocab_size: length of a row of logits.

    Raises:
        OptionError: lengths that differ, or token ids outside the vocabulary.
    """

    def __init__(self, params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        if len(params) != len(prompts):
            raise OptionError(f"Sampler: found {len(params)} params and {len(prompts)} prompts, expected as many")
        self._vocab_size = vocab_size
        self._rows = [_Row(one, prompt, vocab_size) for one, prompt in zip(params, prompts, strict=True)]

    def __call__(self, logits: mx.array) -> mx.array:
        """Draw from logits `[B, V]` of any float dtype; int32 `[B]`, not evaluated.

        A row of NaN, +inf or nothing but -inf gives a token that `check_token` refuses.
        """
        expected = (len(self._rows), self._vocab_size)
        if logits.shape != expected:
            raise OptionError(f"logits: found shape {logits.shape}, expected {expected}")
        return mx.stack([row.draw(logits[i]) for i, row in enumerate(self._rows)])

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order."""
        self._rows = [self._rows[row] for row in rows]


def check_token(token: int) -> int:
    """The token, unless it says that its row of logits was no distribution.

    Raises:
        GenerationError: the logits were NaN, +inf or nothing but -inf.
    """
    if token == BAD_TOKEN:
        raise GenerationError(
            _NO_DISTRIBUTION,
            hint="the weights may be damaged, or the compute dtype too narrow: try --dtype float32",
        )
    return token


class _Row:
    """One row of a batch: its parameters, history and random stream."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._history = _History(params, prompt, vocab_size)
        self._key = mx.random.key(secrets.randbits(64) if params.seed is None else params.seed)

    def draw(self, logits: mx.array) -> mx.array:
        scores = self._history.adjust(logits)
        token = mx.where(mx.isfinite(scores.peak), self._pick(scores), BAD_TOKEN)
        self._history.add(token[None])
        return token

    def _pick(self, scores: _Scores) -> mx.array:
        if self._params.greedy:
            return scores.best
        keys = mx.random.split(self._key, 3)
        self._key = keys[0]
        # The other two keys are random bits themselves: 24 of each word make a float32 in [0, 1).
        uniform = (keys[1:].reshape(-1) >> 8).astype(mx.float32) * 2.0**-24
        if _is_ranked(self._params):
            return _Ranking(scores, self._params).draw(uniform)
        scaled = scores.scaled(self._params.temperature)
        return _pick(mx.where(scaled >= _min_p_floor(self._params), mx.exp(scaled), 0.0), uniform)


class _Scores:
    """One row of float32 logits `[V]`, and what rounding took from them where a penalty changed them.

    Tokens are ordered by their float32 `values`. Weights also use the rest, as float32 alone puts up to 5e-4
    on a penalised logit of 1e4.
    """

    def __init__(self, values: mx.array, rest: mx.array | None = None) -> None:
        self.values = values
        self._rest = rest
        self.block_peaks = mx.max(_in_blocks(values, -mx.inf), axis=-1)
        self.peak = mx.max(self.block_peaks)

    @property
    def best(self) -> mx.array:
        """The most likely token, the lowest id among equals: an argmax in two steps, which is quicker."""
        block = mx.argmax(self.block_peaks)
        return (block * _BLOCK + mx.argmax(_in_blocks(self.values, -mx.inf)[block])).astype(mx.int32)

    def scaled(self, temperature: float, ids: mx.array | None = None) -> mx.array:
        """Log-weights of all tokens or of `ids`, 0 at the peak. Subtracting first keeps huge logits exact."""
        values = self.values if ids is None else self.values[ids]
        gap = values - self.peak
        if self._rest is not None:
            gap = gap + ((self._rest if ids is None else self._rest[ids]) - self._rest[self.best])
        return gap / max(temperature, _SMALLEST_TEMPERATURE)


class _History:
    """What bias and penalties need to know of one row; holds nothing while they are off.

    Only the tokens that something can change are computed, and those with twice float32's digits.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._counts: mx.array | None = None
        self._seen: mx.array | None = None
        self._bias: _Pair | None = None
        touched: set[int] = set()
        if params.presence_penalty or params.frequency_penalty:
            self._counts = mx.zeros(vocab_size)
        if params.repetition_penalty != 1.0:
            _check_ids("prompt", prompt, vocab_size)
            touched.update(prompt)
            self._seen = mx.zeros(vocab_size).at[mx.array(list(prompt), dtype=mx.int32)].add(1.0)
        if params.logit_bias:
            _check_ids("logit_bias", params.logit_bias, vocab_size)
            touched.update(params.logit_bias)
            ids = mx.array(list(params.logit_bias), dtype=mx.int32)
            high, low = zip(*(_split(bias) for bias in params.logit_bias.values()), strict=True)
            zeros = mx.zeros(vocab_size)
            self._bias = zeros.at[ids].add(mx.array(high)), zeros.at[ids].add(mx.array(low))
        self._touched = mx.array(sorted(touched), dtype=mx.int32)

    def add(self, tokens: mx.array) -> None:
        """Take note of drawn tokens, int32 `[n]`."""
        if self._counts is None and self._seen is None:
            return
        if self._touched.size + tokens.size < self._vocab_size:
            self._touched = mx.concatenate([self._touched, tokens])
        else:
            self._touched = mx.arange(self._vocab_size)
        if self._counts is not None:
            self._counts = self._counts.at[tokens].add(1.0)
        if self._seen is not None:
            self._seen = self._seen.at[tokens].add(1.0)

    def adjust(self, logits: mx.array) -> _Scores:
        """Bias and penalties on logits `[V]` of any float dtype."""
        scores = logits.astype(mx.float32)
        ids = self._touched
        if ids.size == 0:
            return _Scores(scores)
        pair = scores[ids], mx.zeros(ids.shape)
        if self._bias is not None:
            pair = _add(pair, (self._bias[0][ids], self._bias[1][ids]))
        if self._seen is not None:
            pair = self._repeated(pair, self._seen[ids] > 0)
        if self._counts is not None:
            counts = self._counts[ids]
            pair = _add(pair, _times((counts, mx.zeros(ids.shape)), -self._params.frequency_penalty))
            present = (counts > 0).astype(mx.float32)
            pair = _add(pair, _times((present, mx.zeros(ids.shape)), -self._params.presence_penalty))
        values = mx.put_along_axis(scores, ids, pair[0], axis=0)
        return _Scores(values, mx.put_along_axis(mx.zeros_like(scores), ids, pair[1], axis=0))

    def _repeated(self, pair: _Pair, seen: mx.array) -> _Pair:
        penalty = self._params.repetition_penalty
        less, more = _times(pair, 1.0 / penalty), _times(pair, penalty)
        positive = pair[0] > 0
        high, low = (mx.where(seen, mx.where(positive, a, b), c) for a, b, c in zip(less, more, pair, strict=True))
        return high, low


# A number as the unevaluated sum of two float32: the rounded value and what rounding took from it.
# Sums and products after Knuth, "The Art of Computer Programming", volume 2, 4.2.2, and Dekker (1971).
_Pair = tuple[mx.array, mx.array]


def _split(number: float) -> tuple[float, float]:
    """A Python float as the sum of two float32."""
    high = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


def _normalised(value: mx.array, rest: mx.array) -> _Pair:
    high = value + rest
    return high, mx.where(mx.isfinite(high), rest - (high - value), 0.0)


def _add(left: _Pair, right: _Pair) -> _Pair:
    total = left[0] + right[0]
    added = total - left[0]
    lost = (left[0] - (total - added)) + (right[0] - added)
    return _normalised(total, mx.where(mx.isfinite(total), lost + left[1] + right[1], 0.0))


def _times(pair: _Pair, number: float) -> _Pair:
    high, low = _split(number)
    product = pair[0] * high
    upper = _upper_bits(pair[0])
    factor = mx.array(high)
    factor_upper = _upper_bits(factor)
    lower, factor_lower = pair[0] - upper, factor - factor_upper
    lost = upper * factor_upper - product + upper * factor_lower + lower * factor_upper + lower * factor_lower
    rest = lost + pair[0] * low + pair[1] * high
    return _normalised(product, mx.where(mx.isfinite(product), rest, 0.0))


def _upper_bits(values: mx.array) -> mx.array:
    """float32 with the lower 12 bits of the fraction cleared, so that products of such are exact."""
    return mx.view(mx.view(values, mx.uint32) & 0xFFFFF000, mx.float32)


def _check_ids(name: str, ids: Sequence[int] | Mapping[int, float], vocab_size: int) -> None:
    for token in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token < vocab_size:
            raise OptionError(f"{name}: found token {token}, expected ids below the vocabulary size {vocab_size}")


def _is_ranked(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _min_p_floor(params: SamplingParams) -> float:
    return math.log(params.min_p) if params.min_p > 0.0 else -math.inf


class _Ranking:
    """The tokens that top-k, top-p and min-p leave of one row.

    All three keep a prefix of the tokens in the order of falling score, equals by rising id. It is held as
    the scores and weights of the best n, and how many are kept: all of them, fewer, or more where tokens
    outside the n tie with the last.
    """

    def __init__(self, scores: _Scores, params: SamplingParams) -> None:
        size = min(params.top_k or scores.values.size, scores.values.size)
        self._all = scores.values
        self._size = size
        self._ids = _largest(scores, size)
        self._best = scores.values[self._ids]
        scaled = scores.scaled(params.temperature, self._ids)
        self._weights = mx.exp(scaled)
        last = self._best[-1]
        ties = mx.sum(self._all == last) - mx.sum(self._best == last)
        kept = size + ties
        if params.top_p < 1.0:
            kept = self._reaching(params.top_p, ties)
        if params.min_p > 0.0:
            likely = mx.sum(scaled >= _min_p_floor(params))
            kept = mx.where(likely < size, mx.minimum(likely, kept), kept)
        self._kept = kept

    def _reaching(self, top_p: float, ties: mx.array) -> mx.array:
        """How many tokens have less than `top_p` of the mass before them."""
        mass = _running_sum(self._weights)
        weight = self._weights[-1]
        target = top_p * (mass[-1] + ties * weight)
        inside = mx.sum(mass[:-1] < target) + 1
        beyond = mx.clip(mx.ceil((target - mass[-1]) / weight), 0, ties).astype(mx.int32)
        return mx.where(mass[-1] < target, self._size + beyond, inside)

    def mask(self) -> mx.array:
        """Which of the vocabulary are kept: bool `[V]`."""
        lowest = self._best[mx.minimum(self._kept, self._size) - 1]
        equal = self._all == lowest
        above = mx.sum(self._best > lowest)
        return (self._all > lowest) | (equal & (mx.cumsum(equal.astype(mx.int32)) <= self._kept - above))

    def draw(self, uniform: mx.array) -> mx.array:
        """A kept token, from three uniform numbers; int32, no shape."""
        weights = mx.where(mx.arange(self._size) < self._kept, self._weights, 0.0)
        beyond = mx.maximum(self._kept - self._size, 0)
        rank = _pick(mx.concatenate([weights, (beyond * self._weights[-1])[None]]), uniform)
        outside = self._size + mx.minimum((uniform[2] * beyond).astype(mx.int32), beyond - 1)
        return self._token(mx.where(rank == self._size, outside, rank))

    def _token(self, rank: mx.array) -> mx.array:
        """The id at a rank: among equals the lowest id comes first."""
        score = self._best[mx.minimum(rank, self._size - 1)]
        index = rank - mx.sum(self._best > score)
        equal = _in_blocks(self._all, mx.nan) == score
        per_block = mx.sum(equal, axis=-1)
        running = mx.cumsum(per_block)
        block = mx.argmax(running > index)
        place = mx.argmax(mx.cumsum(equal[block].astype(mx.int32)) > index - (running - per_block)[block])
        return (block * _BLOCK + place).astype(mx.int32)


def _largest(scores: _Scores, size: int) -> mx.array:
    """The ids of `size` tokens with the largest values, falling.

    Blocks that hold one of them are among the `size` with the highest peaks, so few need a closer look.
    """
    values = scores.values
    if 2 * size * _BLOCK > values.size:
        return mx.argsort(-values)[:size]
    blocks = mx.argpartition(-scores.block_peaks, size)[:size]
    candidates = _in_blocks(values, -mx.inf)[blocks].reshape(-1)
    ids = (blocks[:, None] * _BLOCK + mx.arange(_BLOCK)).reshape(-1)
    best = mx.argpartition(-candidates, size)[:size]
    return ids[best[mx.argsort(-candidates[best])]]


def _in_blocks(values: mx.array, filler: float) -> mx.array:
    """`[n]` as `[ceil(n / 128), 128]`."""
    missing = -values.size % _BLOCK
    if missing:
        values = mx.pad(values, (0, missing), constant_values=filler)
    return values.reshape(-1, _BLOCK)


def _running_sum(values: mx.array) -> mx.array:
    """Cumulative sum of `[n]` in blocks, whose rounding error grows with log n instead of n."""
    if values.size <= _BLOCK:
        return mx.cumsum(values)
    within = mx.cumsum(_in_blocks(values, 0.0), axis=-1)
    before = mx.concatenate([mx.zeros(1), _running_sum(within[:, -1])[:-1]])
    return (within + before[:, None]).reshape(-1)[: values.size]


def _pick(weights: mx.array, uniform: mx.array) -> mx.array:
    """An index of `[n]` with the probability of its weight, from two numbers in [0, 1); int32, no shape.

    A long row is drawn from in two steps, block and place within it: 24 random bits are too coarse for one.
    """
    if weights.size <= _BLOCK:
        return _invert(weights, uniform[0])
    blocks = _in_blocks(weights, 0.0)
    block = _invert(mx.sum(blocks, axis=-1), uniform[0])
    return block * _BLOCK + _invert(blocks[block], uniform[1])


def _invert(weights: mx.array, uniform: mx.array) -> mx.array:
    """The first index of positive weight at which the running sum exceeds its share of the total."""
    mass = mx.where(weights > 0, _running_sum(weights), 0.0)
    return mx.argmax(mass > uniform * mx.max(mass)).astype(mx.int32)
