"""A step whose tokens are taken back but for the first few: how many is decided once their logits are known."""

from __future__ import annotations

from collections.abc import Sequence

from mlxqwen.cache.kv_cache import KVCache
from mlxqwen.cache.layer import KVLayer
from mlxqwen.errors import CacheError
from mlxqwen.files.config import ModelConfig

__all__ = ["TentativeStep"]


class TentativeStep:
    """Handed to the model in a cache's place, for one step: the cache goes on only as far as `settle` says.

    Until then it holds what it held, so that a step that fails or is interrupted leaves it whole. Nothing is copied but
    what a ring's window shows to the new tokens, which any step of several tokens copies, and buffers that grow.

    Args:
        cache: of rows that stand at one position. Between the step and the last `settle` others leave it alone.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._start, self._length, self._settled = cache.offset, 0, 0

    def fits(self, config: ModelConfig) -> bool:
        """Whether the cache was made for a model of this shape."""
        return self._cache.fits(config)

    def begin(self, batch_size: int, length: int, lengths: Sequence[int] | None = None) -> Sequence[KVLayer]:
        """See `KVCache.begin`; but all tokens of all rows count, and nothing moves."""
        offsets = self._cache.offsets
        if batch_size != len(offsets) or lengths is not None or min(offsets) != max(offsets):
            raise CacheError(
                f"cache: found {batch_size} rows in a tentative step of a cache with rows at {list(offsets)}, expected "
                "all of its rows, none of them padded, at one position"
            )
        self._start, self._length, self._settled = self._cache.offset, length, 0
        plan = self._cache.placement.plan_tentative(length)
        if not plan.stores_later:
            self._cache.make_room(plan.capacity)
        for layer in self._cache:
            layer.plan = plan
        return self._cache.layers

    def settle(self, count: int) -> None:
        """Let the cache hold the step's first `count` tokens; it may be called again for more, never for fewer.

        Raises `CacheError` for what is no number of tokens from those settled to those of the step.
        """
        if not self._settled <= count <= self._length:
            raise CacheError(
                f"cache: found {count} tokens to settle, expected {self._settled} to {self._length} of this step"
            )
        placement, start = self._cache.placement, self._start
        plan = self._cache[0].plan
        if plan.stores_later:
            self._cache.make_room(plan.capacity)
            for first, end, slot in placement.runs(start + self._settled, start + count):
                for layer in self._cache:
                    layer.store(first - start, end - start, slot)
        self._settled = count
        placement.offsets = [start + count] * self._cache.batch_size
