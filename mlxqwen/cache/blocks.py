"""Blocks: keys and values of 16 consecutive tokens of one row, copied out of a cache and into another.

The parts of a block are arrays of its own, evaluated and contiguous: one for plain storage, `[2 * layers, kv_heads,
BLOCK, head_dim]` with the keys of all layers before the values of all layers; codes, scales and biases for quantized
storage. The whole window of a ring has the same form, with as many slots as the ring.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxqwen.cache.kv_cache import KVCache
from mlxqwen.cache.storage import Stored
from mlxqwen.errors import CacheError

__all__ = ["BLOCK", "block_nbytes", "has_slid", "put_blocks", "put_window", "take_blocks", "take_window"]

BLOCK = 16  # tokens


def block_nbytes(cache: KVCache) -> int:
    """Bytes of a block of a cache that is not empty."""
    buffers = cache.state
    return sum(part.nbytes // (part.shape[0] * part.shape[2]) for part in buffers) * BLOCK


def has_slid(cache: KVCache, row: int) -> bool:
    """Whether the row belongs to a ring and has dropped tokens."""
    return cache.max_kv_size is not None and cache.offsets[row] > cache.max_kv_size


def take_blocks(cache: KVCache, row: int, start: int, stop: int) -> list[Stored]:
    """Copy the tokens `start` to `stop` of a row, which are whole blocks → the parts of each block, evaluated.

    Raises `CacheError` if the row does not hold them, each in the slot of its position.
    """
    if start % BLOCK or stop % BLOCK or not 0 <= start <= stop <= cache.offsets[row] or has_slid(cache, row):
        raise CacheError(
            f"cache row of {cache.offsets[row]} tokens: cannot take blocks from {start} to {stop}",
            hint=f"Take whole blocks of {BLOCK} tokens that the row holds, of a ring only before its window is full.",
        )
    if start == stop:
        return []
    blocks = list(zip(*(_cut(buffers, row, start, stop) for buffers in _buffers(cache)), strict=True))
    mx.eval(blocks)
    return blocks


def put_blocks(cache: KVCache, blocks: Sequence[Stored], *, joins: bool = False) -> None:
    """Fill an empty cache of one row with copies of blocks, from the first block of the row on; evaluated.

    Where the row only `joins` another cache, it is not evaluated, and has no room to grow.

    Raises `CacheError` for a cache that is not empty, or blocks of another kind of cache.
    """
    length = len(blocks) * BLOCK
    _check_fits(cache, blocks, BLOCK, length)
    if not blocks:
        return
    capacity = length if joins else cache.placement.capacity_for(length)
    parts = [_joined([_layers(part) for part in same], capacity) for same in zip(*blocks, strict=True)]
    _fill(cache, parts, length)
    if not joins:
        mx.eval(cache.state)


def take_window(cache: KVCache, row: int) -> Stored:
    """Copy all slots of a ring's row that has dropped tokens → the parts, evaluated. Raises `CacheError` for others."""
    if not has_slid(cache, row):
        raise CacheError(
            f"cache row of {cache.offsets[row]} tokens: not a ring that has dropped tokens",
            hint="Take its blocks.",
        )
    window = tuple(mx.concatenate([buffer[row : row + 1] for buffer in buffers]) for buffers in _buffers(cache))
    mx.eval(window)
    return window


def put_window(cache: KVCache, window: Stored, offset: int) -> None:
    """Fill an empty ring of one row with a window that `take_window` copied at position `offset`; evaluated.

    Raises `CacheError` for a cache that is not empty, or a window of another kind of cache.
    """
    size = cache.max_kv_size
    if size is None or offset <= size:
        raise CacheError("cache: not a ring that such a window belongs to", hint="Make it with like(1).")
    _check_fits(cache, [window], size, 0)
    _fill(cache, [[mx.contiguous(layer) for layer in _layers(part)] for part in window], offset)
    mx.eval(cache.state)


def _buffers(cache: KVCache) -> list[list[mx.array]]:
    """The buffers of each part, the keys of all layers before the values of all layers."""
    keys, values = [layer.keys for layer in cache], [layer.values for layer in cache]
    return [
        [*of_keys, *of_values]
        for of_keys, of_values in zip(zip(*keys, strict=True), zip(*values, strict=True), strict=True)
    ]


def _cut(buffers: Sequence[mx.array], row: int, start: int, stop: int) -> list[mx.array]:
    """One part of the blocks from `start` to `stop`; each block is copied once, straight from the buffers."""
    count = (stop - start) // BLOCK
    views = [mx.split(buffer[row : row + 1, :, start:stop], count, axis=2) for buffer in buffers]
    return [mx.concatenate(list(layers)) for layers in zip(*views, strict=True)]


def _layers(part: mx.array) -> list[mx.array]:
    """Views of one part, one a layer."""
    return list(mx.split(part, part.shape[0]))


def _joined(blocks: Sequence[list[mx.array]], capacity: int) -> list[mx.array]:
    """The buffers of one part, made of the layers of each block."""
    _, heads, slots, width = blocks[0][0].shape
    missing = capacity - len(blocks) * slots
    room = [mx.zeros((1, heads, missing, width), dtype=blocks[0][0].dtype)] if missing else []
    return [mx.concatenate([*layer, *room], axis=2) for layer in zip(*blocks, strict=True)]


def _fill(cache: KVCache, parts: Sequence[Sequence[mx.array]], offset: int) -> None:
    count = len(cache)
    for number, layer in enumerate(cache):
        layer.keys = tuple(buffers[number] for buffers in parts)
        layer.values = tuple(buffers[count + number] for buffers in parts)
    cache.placement.offsets = [offset]


def _check_fits(cache: KVCache, blocks: Sequence[Stored], slots: int, length: int) -> None:
    if cache.batch_size != 1 or cache.offset:
        raise CacheError(
            f"cache of {cache.batch_size} rows and {cache.offset} tokens: expected one empty row",
            hint="Make it with like(1).",
        )
    config, parts = cache.config, 1 if cache.kv_bits is None else 3
    shape = (2 * len(cache), config.num_key_value_heads, slots)
    fits = cache.max_kv_size is None or length <= cache.max_kv_size
    if not fits or any(len(block) != parts or any(part.shape[:3] != shape for part in block) for block in blocks):
        raise CacheError("cache: blocks of another kind of cache", hint="Give those of a cache of the same kind.")
