"""A tentative step: the cache keeps only its first tokens, as many as the logits show to be right."""

from __future__ import annotations

from collections.abc import Sequence

from mlxqwen.cache.kv_cache import KVCache
from mlxqwen.cache.layer import KVLayer
from mlxqwen.errors import CacheError
from mlxqwen.files.config import ModelConfig

__all__ = ["TentativeStep"]


class TentativeStep:
    """Takes the place of a cache in one step of the model; `settle` decides how many tokens the cache keeps.

    Until then the cache is unchanged, so that a step that fails or is interrupted leaves it whole. Nothing is copied
    except a ring's window, which any step of several tokens copies, and buffers that grow.

    Args:
        cache: its rows are at one position. Nothing else may use it between the step and the last `settle`.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._start, self._length, self._settled = cache.offset, 0, 0

    def fits(self, config: ModelConfig) -> bool:
        """Whether the cache was made for a model of this shape."""
        return self._cache.fits(config)

    def begin(self, batch_size: int, length: int, lengths: Sequence[int] | None = None) -> Sequence[KVLayer]:
        """See `KVCache.begin`; all tokens of all rows count, and the cache does not change."""
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
        """Let the cache keep the first `count` tokens of the step. Later calls may keep more, never fewer.

        Raises `CacheError` if `count` is below the last one or above the tokens of the step.
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
