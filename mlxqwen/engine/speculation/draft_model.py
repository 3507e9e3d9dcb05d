"""A drafter that is a smaller model of the same family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from mlxqwen.cache import make_cache
from mlxqwen.checks import check_integer
from mlxqwen.device import current_device
from mlxqwen.engine.prefixes import common_prefix
from mlxqwen.engine.request import fitting_prefill_chunk
from mlxqwen.engine.speculation.reading import read_tokens
from mlxqwen.model.given import check_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.sampler import BAD_TOKEN, Sampler

__all__ = ["DraftModel"]


class DraftModel:
    """A model that guesses what another one draws, with that one's parameters, penalties and random numbers.

    Two models that mostly agree then mostly draw the same token, however high the temperature. Its cache follows the
    text: what the text did not continue with is forgotten, and what is new is read with the next guess. A text longer
    than the cache is read anew from its latest half when the cache is full.

    Args:
        model: has the vocabulary of the model that it guesses for.
        max_kv_size: the most tokens that its cache holds; by default, and at most, its context.
        kv_bits: of its cache; see `mlxqwen.make_cache`.
        prefill_chunk: tokens of a text that are read at once.

    Raises:
        OptionError: a value out of range.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        *,
        max_kv_size: int | None = None,
        kv_bits: int | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        check_model(model, "DraftModel(model)")
        if max_kv_size is not None:
            max_kv_size = check_integer("max_kv_size", max_kv_size, 1)
        self.model = model
        self._cache = make_cache(model, kv_bits=kv_bits)
        context = self._cache.config.context_length
        self._room = min(max_kv_size or context, context)
        if prefill_chunk is not None:
            prefill_chunk = check_integer("prefill_chunk", prefill_chunk, 1)
        self._prefill_chunk = prefill_chunk or fitting_prefill_chunk(model.config, current_device())
        self._held: list[int] = []  # what the cache holds, at least
        self._start = 0  # where in the text that begins
        self._text: Sequence[int] = ()
        self._agreed = 0  # how many tokens of `_held` are known to be those of `_text`

    @property
    def nbytes(self) -> int:
        """Bytes of its cache."""
        return self._cache.nbytes

    def read(self, text: Sequence[int], stop: int) -> None:
        """Read the first `stop` tokens of a text that will be guessed on.

        If the text is longer than the cache, its latest half is read once `stop` reaches its end.
        """
        fits = len(text) < self._room
        if self._room > 1 and (fits or stop == len(text)):
            self._read(text[:stop], 1)
            mx.eval(self._cache.state)

    def catch_up(self, text: Sequence[int]) -> bool:
        """Read at most one chunk of a text → whether guessing on reads no more than another."""
        shared = self._shared(text)
        new = text[self._start + shared :]
        if len(new) <= self._prefill_chunk or len(text) >= self._room or self._start:
            return True
        self._extend(shared, new[: self._prefill_chunk])
        mx.eval(self._cache.state)
        return False

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> list[int]:
        """See `Drafter`; no guess for a text that leaves no room in the cache."""
        count = min(count, self._room - 1)
        if count < 1:
            return []
        logits = self._read(text, count)
        state, drawn = sampler.state, []
        try:
            for _ in range(count - 1):
                drawn.append(sampler(logits))
                logits = self.model.logits(self.model.model(drawn[-1][:, None], self._cache))[:, -1]
            drawn.append(sampler(logits))
            drafts = cast(list[int], mx.concatenate(drawn).tolist())
        finally:
            sampler.restore(state)
        self._held += drafts[:-1]
        return drafts[: drafts.index(BAD_TOKEN)] if BAD_TOKEN in drafts else drafts

    def _read(self, text: Sequence[int], count: int) -> mx.array:
        """Bring the cache up to date, with room for `count` more → the logits `[1, V]` after the text."""
        shared = self._shared(text)
        if not shared or len(text) - self._start + count > self._room:
            fits = len(text) + count <= self._room
            self._start, shared = 0 if fits else len(text) - max(1, (self._room - count) // 2), 0
        shared = min(shared, len(text) - self._start - 1)  # the last token leads to the logits
        return self.model.logits(self._extend(shared, text[self._start + shared :]))

    def _shared(self, text: Sequence[int]) -> int:
        """How many tokens of the cache are those of the text, from where it begins."""
        if text is not self._text:
            self._text, self._agreed = text, 0
        known = self._start + self._agreed
        return self._agreed + common_prefix(self._held[self._agreed :], text[known:])

    def _extend(self, shared: int, new: Sequence[int]) -> mx.array:
        """Keep the first `shared` tokens of the cache and read new ones → the last hidden state `[1, hidden_size]`."""
        self._cache.trim(shared)
        del self._held[shared:]
        hidden = read_tokens(self.model, self._cache, new, self._prefill_chunk)
        self._held += new
        self._agreed = len(self._held)
        return hidden
