"""Prompts that are being read: one chunk a step, from where the blocks of the store end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.interrupts import ReadingPace, interrupts_deferred
from mlxqwen.engine.logprobs import begin_logprobs, logprobs_of
from mlxqwen.engine.memory import buffer_bytes
from mlxqwen.engine.running import RunningBatch, masks_of
from mlxqwen.sampling.constraint import apply_masks
from mlxqwen.sampling.sampler import Sampler

__all__ = ["Prefill", "read_together"]

_LOGPROBS_AT_ONCE = 16  # places of which all logits are there: 10 MB of 151,936 tokens in float32
_PADDING = 16  # tokens a row: attention alone sees them, which costs less than one step more


class Prefill:
    """Prompts of one kind of cache that are read together: one prompt, or several whole ones in a single chunk.

    Args:
        generations: one a row; their `text` is read.
        cache: of these rows; holds the first tokens of each.
        owner: the caller's cache that the rows belong to, if there is one.
    """

    def __init__(self, generations: Sequence[Generation], cache: KVCache, owner: KVCache | None = None) -> None:
        self.rows = [weakref.ref(generation) for generation in generations]
        self.cache = cache
        self.owner = owner
        # Where in its text each row goes on: behind what was copied, or at its beginning behind a caller's own tokens.
        begins = [
            0 if owner is not None and one.request.cached_tokens is None else offset
            for one, offset in zip(generations, cache.offsets, strict=True)
        ]
        self._before = [offset - begin for offset, begin in zip(cache.offsets, begins, strict=True)]
        self._begins = begins
        for one, begin in zip(generations, begins, strict=True):
            one.prefill = self
            one.cached_tokens = begin if one.count == 0 else one.cached_tokens
            one.progress(0, len(one.text) - begin)

    @property
    def generations(self) -> list[Generation]:
        """The generations that are not over."""
        alive = [row() for row in self.rows]
        return [one for one in alive if one is not None and not one.is_over]

    @property
    def urgency(self) -> tuple[int, int]:
        """The urgency of its most urgent generation."""
        return min((one.urgency for one in self.generations), default=(0, 0))

    def done(self, row: int = 0) -> int:
        """How many tokens of a row's text have been read."""
        return self.cache.offsets[row] - self._before[row]

    @property
    def left(self) -> int:
        """Tokens that remain to be read in all rows, with their padding."""
        unread = [len(one.text) - self.done(row) for row, one in enumerate(map(_alive, self.rows)) if one is not None]
        return max(unread, default=0) * len(unread)

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers at the size that they will have once all is read."""
        texts = [
            len(one.text) + before for one, before in zip(map(_alive, self.rows), self._before, strict=True) if one
        ]
        cache, model = self.cache, next((one.model for one in map(_alive, self.rows) if one), None)
        if model is None:
            return cache.nbytes
        return max(cache.nbytes, buffer_bytes(model, cache, max(texts) + 1, len(self.rows)))

    def drop_ended(self) -> list[Generation]:
        """Drop the rows whose generations are over → the generations of the rows that stay."""
        generations = [row() for row in self.rows]
        places = [place for place, one in enumerate(generations) if one is not None and not one.is_over]
        for one in generations:
            if one is not None and one.is_over:
                one.prefill = None
        if 0 < len(places) < len(generations):
            self.cache.keep_rows(places)
            self._before = [self._before[place] for place in places]
            self._begins = [self._begins[place] for place in places]
        self.rows = [self.rows[place] for place in places]
        return [one for place in places if (one := generations[place]) is not None]

    def read(
        self,
        generations: Sequence[Generation],
        chunk: int,
        begin: Callable[[RunningBatch], None],
        pace: ReadingPace,
    ) -> None:
        """Read at most `chunk` tokens of each row; once all is read, call `begin` with the batch that decodes.

        An interrupt leaves everything as before. An exception ends these generations.

        Args:
            generations: what `drop_ended` returned.
            chunk: tokens.
            begin: takes the batch.
            pace: by which a long chunk is computed in parts.
        """
        self.cache.reserve(max(self._before[row] + len(one.text) for row, one in enumerate(generations)) + 1)
        pieces = [one.text[self.done(row) : self.done(row) + chunk] for row, one in enumerate(generations)]
        lengths = [len(piece) for piece in pieces]
        padded = [piece + [0] * (max(lengths) - len(piece)) for piece in pieces]
        before, model = _Checkpoint(self.cache), generations[0].model
        tokens, began = sum(lengths), pace.clock()
        tells = generations[0].lacks_prompt_logprobs  # such a prompt is read alone
        start = self.done()
        at_once = pace.layers_at_once(tokens)

        def after_layer(index: int, hidden: mx.array) -> None:
            if (index + 1) % at_once == 0:
                mx.eval(hidden)

        try:
            hidden = model.model(
                mx.array(padded, dtype=mx.int32),
                self.cache,
                lengths=lengths,
                last_only=not tells,
                after_layer=after_layer,
            )
            mx.eval(self.cache.state, hidden)
            pace.took(tokens, pace.clock() - began)
            if tells:
                _tell_prompt(generations[0], start, hidden[0])
            mx.clear_cache()  # the chunk's work space, which decoding has no use for
            if all(self.done(row) == len(one.text) for row, one in enumerate(generations)):
                sampler, drawn = self._draw(generations, model.logits(hidden[:, -1]))
                with interrupts_deferred():
                    begin(RunningBatch(generations, self.cache, sampler, drawn, self.owner))
                    self.rows = []
        except BaseException as error:
            if self.rows:
                before.restore()
            if not isinstance(error, Exception):
                raise
            for one in generations:
                one.fail(error)
            self.rows = []
            return
        for row, one in enumerate(generations):
            one.progress(self.done(row) - self._begins[row], len(one.text) - self._begins[row])

    def _draw(self, generations: Sequence[Generation], logits: mx.array) -> tuple[Sampler, mx.array]:
        """The sampler of all rows, and their first tokens, which are being computed."""
        samplers = [one.make_sampler() for one in generations]
        mx.eval([sampler.arrays for sampler in samplers])  # another thread may go on with them
        sampler, *others = [one.extract([0]) for one in samplers]
        sampler.join(others)
        drawn = sampler(apply_masks(logits, masks_of(generations)))
        mx.async_eval(drawn, sampler.arrays, self.cache.state, begin_logprobs(generations, logits))
        return sampler, drawn


def _tell_prompt(one: Generation, start: int, hidden: mx.array) -> None:
    """Take the log-probabilities of the prompt's tokens that follow those of a chunk.

    Args:
        one: asks for them.
        start: the place of the chunk's first token in its text.
        hidden: `[L, hidden_size]`, normalised, of the chunk's tokens.
    """
    prompt, count = one.request.prompt, one.request.prompt_logprobs or 0
    first = len(one.prompt_logprobs)  # of the token before the one that is told next
    last = min(start + hidden.shape[0], len(prompt) - 1)
    for place in range(first, last, _LOGPROBS_AT_ONCE):
        end = min(place + _LOGPROBS_AT_ONCE, last)
        logits = one.model.logits(hidden[place - start : end - start])
        one.prompt_logprobs += logprobs_of(logits, prompt[place + 1 : end + 1], count)


def _alive(row: weakref.ref[Generation]) -> Generation | None:
    return row()


class _Checkpoint:
    """The state of a cache before a chunk. A ring replaces its buffers where a chunk pushes tokens out."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._offsets = list(cache.placement.offsets)
        self._buffers: list[Any] = []
        if cache.max_kv_size is not None:
            self._buffers = [(layer.keys, layer.values) for layer in cache]

    def restore(self) -> None:
        self._cache.placement.offsets = list(self._offsets)
        for layer, (keys, values) in zip(self._cache, self._buffers, strict=False):
            layer.keys, layer.values = keys, values
        mx.async_eval(self._cache.state)


def read_together(unread: Sequence[int], chunk: int) -> list[list[int]]:
    """Group prompts with `unread` tokens each into those that go through the model together → groups of indices.

    The prompts of a group are about equally long. With padding they are no more than a chunk, and padding stays below a
    quarter of them or 16 tokens a row.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(unread)), key=lambda place: unread[place]):
        if groups:
            shortest, length = unread[groups[-1][0]], unread[place]
            close = length <= shortest + max(_PADDING, shortest // 4)
            if close and (len(groups[-1]) + 1) * length <= chunk:
                groups[-1].append(place)
                continue
        groups.append([place])
    return [sorted(group) for group in groups]
