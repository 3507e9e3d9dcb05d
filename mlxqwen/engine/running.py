"""Replies that decode together: one cache, one sampler, one forward pass for all of their next tokens."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.logprobs import begin_logprobs
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.constraint import apply_masks
from mlxqwen.sampling.sampler import Sampler, SamplerState

if TYPE_CHECKING:
    from mlxqwen.engine.speculation.guesses import Guesser, Guesses

__all__ = ["RunningBatch", "masks_of"]


class RunningBatch:
    """Rows of one kind of cache, in the order of their requests.

    Between two steps the cache holds every token that was told, and `drawn` the next one of each row, on its way.
    Within a step, once these are told, `tokens` are what the rows go on with.

    Only its generations refer to a batch: when the last of them goes, so does the cache.

    Args:
        generations: one a row.
        cache, sampler: of these rows.
        drawn: int32 `[B]`; may be on its way.
        owner: the caller's cache that the rows belong in; None for one of the scheduler's own.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        cache: KVCache,
        sampler: Sampler,
        drawn: mx.array | None,
        owner: KVCache | None = None,
    ) -> None:
        first = generations[0]
        self.model: Qwen3ForCausalLM = first.model
        self.kind = None if owner is not None else (first.request.cache, first.request.adapter)
        self.number = first.number
        self.rows = [weakref.ref(generation) for generation in generations]
        self.cache = cache
        self.sampler = sampler
        self.owner = owner
        self.drawn = drawn
        self.tokens: list[int] = []
        self.logits: mx.array | None = None  # behind `drawn`, where the forward pass is queued ahead
        self.guesses: Guesses | None = None
        self._before_ahead: _Checkpoint | None = None
        for generation in generations:
            generation.prefill, generation.batch, generation.sampler, generation.match = None, self, None, None

    @property
    def generations(self) -> list[Generation | None]:
        """One generation a row; None where it is over or gone."""
        return [row() for row in self.rows]

    @property
    def going(self) -> list[Generation]:
        """The generations that are not over."""
        return [one for one in self.generations if one is not None and not one.is_over]

    @property
    def is_parked(self) -> bool:
        """Whether all rows are parked."""
        return all(one.is_parked for one in self.going)

    @property
    def may_change(self) -> bool:
        """Whether rows may move to other batches: not in a caller's cache, and not with a queued pass."""
        return self.owner is None and self.logits is None and self.guesses is None

    @property
    def may_merge(self) -> bool:
        """Whether rows of other batches may join."""
        return self.logits is None and self.guesses is None and not self.is_parked

    def queue_ahead(self) -> None:
        """Start the forward pass after the tokens being drawn, unless a constraint will replace one of them."""
        going = self.going
        if self.drawn is None or any(one.is_forcing for one in going):
            return
        if any(one.count + 1 < one.limit for one in going):
            before = _Checkpoint(self)
            try:
                logits = self._forward(self.drawn)
                mx.async_eval(logits, self.cache.state)
            except BaseException as error:
                before.restore(self)
                if not isinstance(error, Exception):
                    raise
                self.fail(error)
                return
            self._before_ahead, self.logits = before, logits

    def tell(self) -> None:
        """Record the drawn tokens with their generations. Those that end stay until `drop_ended`."""
        if self.guesses is not None:
            self._tell_guesses(self.guesses)
        elif self.drawn is not None:
            self._tell_drawn(cast(list[int], self.drawn.tolist()))

    def _tell_drawn(self, drawn: list[int]) -> None:
        generations = self.generations
        tokens = [self._token_used(one, token) for one, token in zip(generations, drawn, strict=True)]
        if tokens != drawn:
            if self._before_ahead is not None:
                self._before_ahead.restore(self)  # what was queued followed other tokens
                self.logits = None
            kept = [max(token, 0) for token in drawn]  # a row that failed remembers nothing of use
            self.sampler.replace(mx.array(kept, dtype=mx.int32), mx.array(tokens, dtype=mx.int32))
        self.drawn, self.tokens, self._before_ahead = None, tokens, None

    @staticmethod
    def _token_used(generation: Generation | None, drawn: int) -> int:
        """The token that is used where `drawn` was drawn; any token for a row that is over."""
        if generation is None or generation.is_over:
            return max(drawn, 0)
        try:
            return generation.tell(drawn)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a constraint's, be it SystemExit
            generation.fail(error)
            return max(drawn, 0)

    def _tell_guesses(self, guesses: Guesses) -> None:
        (generation,) = self.generations
        self.guesses = None
        if generation is None:
            return
        try:
            self.tokens = [guesses.tell(generation, self.sampler)]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            generation.fail(error)
        mx.async_eval(self.cache.state, self.sampler.arrays)

    def drop_ended(self) -> None:
        """Drop the rows that are over; a caller's cache keeps the last one."""
        generations = self.generations
        places = [place for place, one in enumerate(generations) if one is not None and not one.is_over]
        for one in generations:
            if one is not None and one.is_over:
                one.batch = None
        if places:
            self.keep(places)
        else:
            self.rows = []

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places, in this order."""
        if list(places) == list(range(len(self.rows))):
            return
        self.cache.keep_rows(places)
        self.sampler.keep_rows(places)
        chosen = mx.array(list(places), dtype=mx.int32)
        if self.drawn is not None:
            self.drawn = self.drawn[chosen]
        if self.logits is not None:
            self.logits = self.logits[chosen]
        self.tokens = [self.tokens[place] for place in places] if self.tokens else []
        self.rows = [self.rows[place] for place in places]

    def take(self, places: Sequence[int]) -> RunningBatch:
        """Take out the rows at these places, as a batch of their own. No pass may be queued."""
        generations = [one for place in places if (one := self.generations[place]) is not None]
        places = [place for place in places if self.generations[place] in generations]
        cache = self.cache.like(len(places))
        cache.assemble([(self.cache, places)])
        taken = RunningBatch(generations, cache, self.sampler.extract(places), None)
        taken.tokens = [self.tokens[place] for place in places] if self.tokens else []
        if self.drawn is not None:
            taken.drawn = self.drawn[mx.array(places, dtype=mx.int32)]
        self.keep([place for place in range(len(self.rows)) if place not in places])
        return taken

    def settle(self) -> None:
        """Leave nothing lazy: another thread may take the next step."""
        begun = [one for one in (self.drawn, self.logits) if one is not None]
        mx.async_eval(self.cache.state, self.sampler.arrays, begun)

    def adopt(self) -> None:
        """Move the rows into the caller's cache, if they belong there and are elsewhere."""
        if self.owner is not None and self.cache is not self.owner:
            self.owner.assemble([(self.cache, range(len(self.rows)))])
            self.cache = self.owner

    def guess(self, guesser: Guesser) -> bool:
        """Take a step with guesses for the only row → False if nothing is worth guessing."""
        (generation,) = self.generations
        if generation is None:
            return False
        before = _Checkpoint(self)
        try:
            self.guesses = guesser.guess(generation, self.cache, self.sampler)
        except BaseException as error:
            before.restore(self)
            if isinstance(error, KeyboardInterrupt):
                raise
            self.fail(error)
            return True
        if self.guesses is None:
            return False
        self.tokens = []
        return True

    def merge(self, others: Sequence[RunningBatch]) -> None:
        """Take in the rows of other batches in the same state; all rows are in the order of their requests."""
        batches = [self, *others]
        rows = [(batch, place, row) for batch in batches for place, row in enumerate(batch.rows)]
        numbers = [-1 if (one := row()) is None else one.number for _, _, row in rows]
        order = sorted(range(len(rows)), key=lambda n: numbers[n])
        if order == sorted(order):
            self.cache.assemble([(batch.cache, range(len(batch.rows))) for batch in batches])
        else:
            self.cache.assemble([(rows[n][0].cache, [rows[n][1]]) for n in order])
        self.sampler.join([other.sampler for other in others])
        self.sampler.keep_rows(order)
        if self.drawn is not None:
            drawn = mx.concatenate([batch.drawn for batch in batches if batch.drawn is not None])
            self.drawn = drawn[mx.array(order, dtype=mx.int32)]
        tokens = [token for batch in batches for token in batch.tokens]
        self.tokens = [tokens[n] for n in order] if tokens else []
        self.rows = [rows[n][2] for n in order]
        for one in self.generations:
            if one is not None:
                one.batch = self
        for other in others:
            other.rows = []

    def advance(self) -> None:
        """Feed the tokens that were recorded, and begin to draw the next ones."""
        before = _Checkpoint(self)
        try:
            logits = self.logits
            if logits is None:
                logits = self._forward(mx.array(self.tokens, dtype=mx.int32))
            drawn = self._draw(logits)
        except BaseException as error:
            before.restore(self)
            if not isinstance(error, Exception):
                raise
            self.fail(error)
            return
        self.drawn, self.logits, self.tokens = drawn, None, []

    def _forward(self, tokens: mx.array) -> mx.array:
        """Feed one token a row → logits `[B, vocab_size]`."""
        return self.model.logits(self.model.model(tokens[:, None], self.cache))[:, -1]

    def _draw(self, logits: mx.array) -> mx.array:
        """Begin to draw the next tokens, int32 `[B]`; nothing lazy is left for another thread."""
        drawn = self.sampler(apply_masks(logits, masks_of(self.generations)))
        mx.async_eval(drawn, self.sampler.arrays, self.cache.state, begin_logprobs(self.generations, logits))
        return drawn

    def fail(self, error: BaseException) -> None:
        """End all rows with an error."""
        for one in self.going:
            one.fail(error)
        self.rows = []


class _Checkpoint:
    """The state of a batch before a step, to return to after an interrupt, or to compute the step again.

    Only offsets are remembered, no buffers: slots beyond the offsets are written before anyone reads them, and the slot
    of a full ring is written again by the same position.
    """

    def __init__(self, batch: RunningBatch) -> None:
        self._offsets = list(batch.cache.placement.offsets)
        self._sampler: SamplerState = batch.sampler.state

    def restore(self, batch: RunningBatch) -> None:
        batch.cache.placement.offsets = list(self._offsets)
        batch.sampler.restore(self._sampler)
        batch.settle()


def masks_of(generations: Sequence[Generation | None]) -> list[mx.array | None]:
    """The mask of each row for the next draw; a constraint that raises ends its own reply."""
    masks: list[mx.array | None] = []
    for one in generations:
        masks.append(None)
        if one is not None and one.constraints and not one.is_over:
            try:
                masks[-1] = one.mask()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                one.fail(error)
    return masks
