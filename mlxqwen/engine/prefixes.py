"""The prefix store as the scheduler uses it: blocks by generation rather than by tokens and cache."""

from __future__ import annotations

import ctypes
import struct
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.cache.fingerprint import model_fingerprint
from mlxqwen.cache.prefix_store import Match, PrefixStore, namespace
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.request import CacheKind, Request
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from mlxqwen.cache.disk_tier import DiskTier

__all__ = ["SharedPrefixes", "common_prefix"]

_SAMPLED = 8  # numbers of each weight


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    shorter = min(len(first), len(second))
    if list(first[:shorter]) == list(second[:shorter]):  # one may be a tuple
        return shorter
    return next(n for n in range(shorter) if first[n] != second[n])


class SharedPrefixes:
    """The prefix store of one model, which is referred to weakly.

    Args:
        model: whose keys and values are stored. Replaced weights make the stored ones invalid.
        capacity: bytes of the store.

    Attributes:
        store: the `PrefixStore` in use.
        has_looked: whether weights were looked at in this step; whoever takes steps sets it back between them.
    """

    def __init__(self, model: Qwen3ForCausalLM, capacity: int) -> None:
        self._model = weakref.ref(model)
        self._weights = _Weights(model)
        self._looked = 0.0
        self._epoch = 0
        self.has_looked = False
        self.store = self._make_store(capacity, None)

    def use_store(self, capacity: int, disk: DiskTier | None) -> None:
        """Replace the store by an empty one of `capacity` bytes, with a disk tier; write the old one's new blocks."""
        self.store.flush()
        self.store = self._make_store(capacity, disk)

    def look_at_weights(self, *, within: float = 0.0) -> bool:
        """Replace the store if weights were changed → whether they were; see `_Weights` for what is seen.

        Args:
            within: seconds; nothing is done if they were looked at so lately.
        """
        model, now = self._model(), time.monotonic()
        if model is None or now - self._looked < within:
            return False
        self._looked, self.has_looked = now, True
        if not self._weights.differ(model):
            return False
        self._weights = _Weights(model)
        self._epoch += 1
        self.use_store(self.store.capacity, self.store.disk)
        return True

    def _make_store(self, capacity: int, disk: DiskTier | None) -> PrefixStore:
        reference = self._model

        def fingerprint() -> str:
            model = reference()
            return "" if model is None else model_fingerprint(model)

        return PrefixStore(fingerprint, capacity, disk)

    def match(self, one: Generation) -> Match:
        """The blocks that the store has for a generation's text.

        There are none for a generation with its caller's cache, and for one that has to read its prompt.
        """
        kind = one.request.cache
        one.epoch = self._epoch
        if not isinstance(kind, CacheKind) or one.lacks_prompt_logprobs:
            return Match(())
        ring = None if kind.max_kv_size is None else (kind.max_kv_size, kind.keep)
        return self.store.match(_space(one, kind.make(one.model)), one.text, ring=ring)

    def reader_of(self, one: Generation, known: int, others: Iterable[Generation]) -> Generation | None:
        """Which of `others` is reading a block of this text, beyond `known` tokens, that the store lacks."""
        length = (known // BLOCK + 1) * BLOCK
        if not self.store.keeps or one.lacks_prompt_logprobs or length >= len(one.text):
            return None
        shared, sharing = one.text[:length], _sharing(one.request)
        for other in others:
            if other.own_cache is None and other.text[:length] == shared and _sharing(other.request) == sharing:
                return other
        return None

    def keep(self, one: Generation, cache: KVCache, row: int, what: str, *, at_mark: bool) -> None:
        """Put the row of a generation into the store, and pin it if the request asks for that.

        Args:
            one: the generation.
            cache, row: what holds its text.
            what: the name of the pin, "prompt" or "reply".
            at_mark: whether a window that has slid is to be kept as it is now.
        """
        holds = one.request.holds_cache
        if one.own_cache is not None or not (self.store.keeps or holds):
            return
        if not self.has_looked:
            self.look_at_weights()
        if one.epoch != self._epoch:  # part of it was read with other weights
            return
        window = cache.max_kv_size
        if window is None or cache.offsets[row] <= window:
            pin = self.store.put(_space(one, cache), one.text, cache, row, pin=holds)
        elif at_mark:
            pin = self.store.put_ring(_space(one, cache), one.text, cache, row)
        else:
            return
        if holds:
            one.pins[what] = pin

    def demote(self, generations: Iterable[Generation]) -> None:
        """Evict the blocks of these generations first: their own buffers hold the same."""
        for one in generations:
            if isinstance(kind := one.request.cache, CacheKind):
                self.store.demote(_space(one, kind.make(one.model)), one.text)


def _space(one: Generation, cache: KVCache) -> str:
    return namespace(cache, one.model.dtype, adapter=one.request.adapter or "", salt=one.request.salt)


def _sharing(request: Request) -> tuple[object, ...]:
    """What must be equal for two requests to share blocks."""
    cache = request.cache
    factor = cache.yarn_factor if isinstance(cache, CacheKind) else None
    return cache.kv_bits, cache.kv_group_size, factor, request.salt, request.adapter


class _Weights:
    """The weights of a model as they were, to see that they were changed.

    Seen are arrays that were replaced, and changes of an array in place that touch the middle of it, as training or
    merging an adapter does: a few numbers of the middle row of each array are compared.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        arrays = _parameters(model)
        self._arrays = [weakref.ref(array) for array in arrays]
        self._samples = [_sample(array) for array in arrays]

    def differ(self, model: Qwen3ForCausalLM) -> bool:
        """Whether the model has other weights now."""
        arrays = _parameters(model)
        if len(arrays) != len(self._arrays):
            return True
        if any(array is not reference() for array, reference in zip(arrays, self._arrays, strict=True)):
            return True
        return any(_sample(array) != sample for array, sample in zip(arrays, self._samples, strict=True))


def _parameters(model: Qwen3ForCausalLM) -> list[mx.array]:
    """The arrays of `model.parameters()`, found in a fifth of its time: each prompt that begins alone waits for it."""
    arrays: list[mx.array] = []
    left: list[Any] = [model]
    while left:
        one = left.pop()
        if isinstance(one, mx.array):
            arrays.append(one)
        elif isinstance(one, dict):
            left += [value for name, value in one.items() if not name.startswith("_")]
        elif isinstance(one, list):
            left += one
    return arrays


def _sample(array: mx.array) -> bytes:
    """The first numbers of the array's middle row.

    They are read where they lie: computing copies of those of all weights takes longer than a short prompt's first
    layer.
    """
    if array.size == 0 or array.ndim == 0:
        return repr(array.tolist()).encode()
    *rows, width = array.shape
    middle, count = [size // 2 for size in rows], min(_SAMPLED, width)
    view = memoryview(cast(Any, array))
    if view.c_contiguous:
        place = 0
        for size, index in zip(rows, middle, strict=True):
            place = place * size + index
        row = ctypes.c_char * (count * array.itemsize)
        return bytes(row.from_buffer(cast(Any, array), place * width * array.itemsize))
    if array.itemsize == 2:  # half floats, which `memoryview` cannot read
        view = memoryview(cast(Any, array.view(mx.uint16)))
    return struct.pack(f"{count}{view.format}", *[view[(*middle, column)] for column in range(count)])
