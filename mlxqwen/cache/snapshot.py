"""A cache's way back: what it held is set aside, so that it can be written over and still be had again."""

from __future__ import annotations

import mlx.core as mx

from mlxqwen.cache.kv_cache import KVCache
from mlxqwen.cache.storage import Stored

__all__ = ["Snapshot"]


class Snapshot:
    """What a cache holds now, to go back to.

    A cache that keeps everything loses nothing but what is written over: slots from `start` on are copied. A ring may
    lose any slot: its buffers are shared with the snapshot, and MLX copies them when they are next written to, once.

    Args:
        cache: any number of rows.
        start: the first position that may be written over before `restore`; nobody needs to say for a ring.
    """

    def __init__(self, cache: KVCache, start: int = 0) -> None:
        self._cache = cache
        self._offsets = cache.offsets
        self._start = min(start, cache.offset)
        self._is_ring = cache.max_kv_size is not None
        self._parts = [(self._set_aside(layer.keys), self._set_aside(layer.values)) for layer in cache]
        if not self._is_ring:
            mx.eval([part for pair in self._parts for stored in pair for part in stored])

    @property
    def offset(self) -> int:
        """Tokens that the longest row had seen."""
        return max(self._offsets)

    @property
    def nbytes(self) -> int:
        """Bytes set aside; those of a ring are its own until it is written to."""
        return sum(part.nbytes for pair in self._parts for stored in pair for part in stored)

    def restore(self) -> None:
        """Go back; as often as need be."""
        for layer, (keys, values) in zip(self._cache, self._parts, strict=True):
            layer.keys, layer.values = self._put_back(layer.keys, keys), self._put_back(layer.values, values)
        self._cache.placement.offsets = list(self._offsets)

    def _set_aside(self, stored: Stored) -> Stored:
        if self._is_ring:
            return _shared(stored)
        if self._start == self.offset:
            return ()
        return tuple(mx.contiguous(part[..., self._start : self.offset, :]) for part in stored)

    def _put_back(self, stored: Stored, kept: Stored) -> Stored:
        if self._is_ring:
            return _shared(kept)
        for part, old in zip(stored, kept, strict=False):
            part[..., self._start : self.offset, :] = old
        return stored


def _shared(stored: Stored) -> Stored:
    """Arrays of their own over the same numbers: writing into the slots of one leaves the other as it is."""
    return tuple(part[...] for part in stored)
