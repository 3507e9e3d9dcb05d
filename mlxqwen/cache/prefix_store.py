"""The store of prefixes: blocks of what was read of all prompts, so that no prompt reads them again.

A block is found by its key, see `TokenChain`, and refers to the block before it: whoever holds a block holds all of its
prompt up to there. The store keeps the blocks that were used last, up to a capacity in bytes. A block that a `Match` or
a `Pin` holds is still found after the store has evicted it. Which caches share what:

- Caches that keep everything, and rings that have not dropped a token, share blocks, whatever their windows.
- Other bits, group sizes, dtypes, RoPE scalings, adapters and salts share nothing.
- A ring that has dropped tokens is kept as a whole, by `put_ring`, in memory alone, for prompts that continue exactly
  there.

Finding, keeping and evicting change the same lists of blocks and windows, so they stand in one file.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet, WeakValueDictionary

import mlx.core as mx

from mlxqwen.cache.blocks import BLOCK, block_nbytes, has_slid, put_blocks, put_window, take_blocks, take_window
from mlxqwen.cache.chain import TokenChain, seed
from mlxqwen.cache.kv_cache import KVCache, cache_identity
from mlxqwen.cache.storage import Stored
from mlxqwen.checks import is_integer
from mlxqwen.device import current_device
from mlxqwen.errors import OptionError

if TYPE_CHECKING:
    from mlxqwen.cache.disk_tier import DiskTier

__all__ = ["Match", "Pin", "PrefixStore", "namespace"]

_TAKEN_AT_ONCE = 64  # blocks, after which older ones are let go
_MOST_UNWRITTEN = 1 << 26  # bytes of blocks that wait for the disk: about a file


def namespace(cache: KVCache, dtype: mx.Dtype, *, adapter: str = "", salt: str = "") -> str:
    """What must be equal for two requests to share blocks.

    Args:
        cache: any cache of the kind; its window does not count.
        dtype: that keys and values are computed in.
        adapter: the adapter that is applied to the weights.
        salt: keeps apart what must not be shared, as between users.
    """
    storage = (cache.kv_bits, cache.kv_group_size) if cache.kv_bits else ()
    device = current_device()  # other products, or other sums, differ in the last bits
    made_by = ("GPU" if device.is_gpu else "CPU", device.has_openblas)
    return repr((cache_identity(cache.config), storage, str(dtype), adapter, salt, made_by))


class _Counter:
    """Bytes of all entries of a store that are alive."""

    __slots__ = ("nbytes",)

    def __init__(self) -> None:
        self.nbytes = 0


class _Entry:
    """What is stored, counted while it is alive."""

    __slots__ = ("__weakref__", "_counter", "nbytes", "parts", "tokens")

    def __init__(self, counter: _Counter, tokens: bytes, parts: Stored) -> None:
        self.tokens = tokens
        self.parts = parts
        self.nbytes = sum(part.nbytes for part in parts)
        self._counter = counter
        counter.nbytes += self.nbytes

    def __del__(self) -> None:
        self._counter.nbytes -= self.nbytes


class _Block(_Entry):
    """Keys and values of `BLOCK` tokens; `parent` is the block before, or the namespace."""

    __slots__ = ("parent",)

    def __init__(self, counter: _Counter, parent: _Block | str, tokens: bytes, parts: Stored) -> None:
        super().__init__(counter, tokens, parts)
        self.parent = parent


class _Window(_Entry):
    """The slots of a ring that has dropped tokens; `tokens` are all that it has seen."""

    __slots__ = ("length", "ring", "space")

    def __init__(
        self, counter: _Counter, space: str, ring: tuple[int, int], tokens: bytes, length: int, parts: Stored
    ) -> None:
        super().__init__(counter, tokens, parts)
        self.space = space
        self.ring = ring
        self.length = length


class Match:
    """The longest known prefix of a prompt. Its blocks stay alive as long as the match.

    Attributes:
        length: tokens that need not be read.
    """

    def __init__(self, blocks: Sequence[_Block], window: _Window | None = None) -> None:
        self._blocks = blocks
        self._window = window
        self.length = len(blocks) * BLOCK if window is None else window.length

    def fill(self, cache: KVCache, *, joins: bool = False) -> None:
        """Copy it into an empty cache of one row, of the kind that was asked for; see `put_blocks`.

        Raises `CacheError` for another cache.
        """
        if self._window is not None:
            put_window(cache, self._window.parts, self.length)
        else:
            put_blocks(cache, [block.parts for block in self._blocks], joins=joins)


class Pin:
    """Keeps blocks alive, whatever the store evicts.

    Attributes:
        length: tokens from the first one on that are kept.
    """

    def __init__(self, last: _Block | _Window | None, length: int) -> None:
        self._last = last  # holds the blocks before it
        self.length = length


class PrefixStore:
    """Blocks of what was read. The least recently used block is evicted first, a block after those that follow it.

    One thread calls it; any thread may read `nbytes`.

    Args:
        fingerprint: of the model's weights, see `model_fingerprint`; a function is called at the first use.
        capacity: bytes. 0 keeps only what is pinned. It may be more than the memory: a caller short of memory calls
            `shrink`.
        disk: the disk tier.

    Raises:
        OptionError: a capacity below 0.

    Attributes:
        capacity, disk: as given.
        nbytes: bytes that the store keeps. What only a `Pin` or a `Match` holds does not count.
    """

    def __init__(self, fingerprint: str | Callable[[], str], capacity: int, disk: DiskTier | None = None) -> None:
        if not is_integer(capacity) or capacity < 0:
            raise OptionError(
                f"prefix store: found a capacity of {capacity!r}, expected a number of bytes",
                hint="0 keeps nothing but what open conversations have read.",
            )
        self.capacity = capacity
        self.nbytes = 0
        self._fingerprint = fingerprint
        self.disk = disk
        self._blocks: WeakValueDictionary[bytes, _Block] = WeakValueDictionary()  # by key, all that are alive
        self._windows: WeakSet[_Window] = WeakSet()
        self._kept: OrderedDict[_Block | _Window, None] = (
            OrderedDict()
        )  # used last stands last, a parent after its children
        self._unwritten: list[tuple[TokenChain, list[_Block]]] = []
        self._unwritten_nbytes = 0
        self._counter = _Counter()

    @property
    def keeps(self) -> bool:
        """Whether it keeps anything that is not pinned."""
        return self.capacity > 0 or self.disk is not None

    @property
    def held_nbytes(self) -> int:
        """Bytes of all blocks that are alive: kept, pinned or held by a match."""
        return self._counter.nbytes

    def match(self, space: str, tokens: Sequence[int], *, ring: tuple[int, int] | None = None) -> Match:
        """Find the longest known prefix of a prompt, at most all except its last token, which has to be read.

        Args:
            space: see `namespace`.
            tokens: the prompt.
            ring: window and sinks of the cache to be filled, in tokens; None for one that keeps everything.
        """
        chain = TokenChain(self._seed(space), tokens[: max(len(tokens) - 1, 0)])
        most = len(chain) if ring is None else min(len(chain), ring[0] // BLOCK)
        blocks = self._find(space, chain, most)
        if self.disk is not None and len(blocks) < most:
            for parts in self.disk.read(chain, len(blocks), most):
                if not self._append(space, chain, blocks, parts):
                    break
        window = None if ring is None else self._find_window(space, chain, ring)
        if window is not None and window.length > len(blocks) * BLOCK:
            self._keep([window])
            return Match([], window)
        self._keep(blocks)
        return Match(blocks)

    def put(self, space: str, tokens: Sequence[int], cache: KVCache, row: int, *, pin: bool = True) -> Pin:
        """Keep the whole blocks of a row. Only unknown ones are copied.

        A row that has dropped tokens has no blocks, so nothing is kept of it.

        Args:
            space: see `namespace`.
            tokens: of the row, from its first one on; any number of them.
            cache, row: what holds them.
            pin: whether to copy and pin blocks beyond the capacity too.
        """
        if has_slid(cache, row):
            return Pin(None, 0)
        count = min(len(tokens), cache.offsets[row]) // BLOCK
        if count and not pin and self.disk is None:
            count = min(count, self.capacity // block_nbytes(cache))
        chain = TokenChain(self._seed(space), tokens[: count * BLOCK])
        blocks = self._find(space, chain, count)
        self._keep(blocks)
        self._note_unwritten(chain, blocks, 0)
        while len(blocks) < count:
            start, stop = len(blocks), min(count, len(blocks) + _TAKEN_AT_ONCE)
            for parts in take_blocks(cache, row, start * BLOCK, stop * BLOCK):
                if not self._append(space, chain, blocks, parts):
                    count = len(blocks)
                    break
            self._keep(blocks)
            self._note_unwritten(chain, blocks, sum(block.nbytes for block in blocks[start:]))
        return Pin(blocks[-1] if blocks else None, len(blocks) * BLOCK)

    def put_ring(self, space: str, tokens: Sequence[int], cache: KVCache, row: int) -> Pin:
        """Keep a row of a ring as it is, for prompts that continue there; only its blocks if it has dropped no token.

        `tokens` are all that the row has seen. Raises `OptionError` for fewer.
        """
        if not has_slid(cache, row):
            return self.put(space, tokens, cache, row)
        offset, ring = cache.offsets[row], (cache.max_kv_size or 0, cache.keep)
        if len(tokens) < offset:
            raise OptionError(f"prefix store: found {len(tokens)} tokens, expected the {offset} that the row has seen")
        chain = TokenChain(self._seed(space), tokens[:offset])
        window = self._find_window(space, chain, ring)
        if window is None or window.length != offset:
            window = _Window(self._counter, space, ring, chain.coded, offset, take_window(cache, row))
            self._windows.add(window)
        self._keep([window])
        return Pin(window, offset)

    def demote(self, space: str, tokens: Sequence[int]) -> None:
        """Evict the blocks of these tokens next, unless other blocks follow them.

        For blocks that a running reply has in its own cache too.
        """
        chain = TokenChain(self._seed(space), tokens)
        blocks = [block for block in self._find(space, chain, len(chain)) if block in self._kept]
        own = set(blocks)
        needed = {entry.parent for entry in self._kept if isinstance(entry, _Block) and entry not in own}
        last_needed = max((number for number, block in enumerate(blocks) if block in needed), default=-1)
        for block in blocks[last_needed + 1 :]:
            self._kept.move_to_end(block, last=False)

    def shrink(self, least: int) -> int:
        """Evict until at least `least` bytes of memory are free, or nothing is left → the bytes that are free.

        Pinned blocks leave the store, but their memory is not free.
        """
        self.flush()
        freed = 0
        while freed < least and self._kept:
            freed += self._drop_oldest()
        return freed

    def clear(self) -> None:
        """Evict all. The disk tier stays as it is."""
        self.shrink(self.nbytes + 1)

    def flush(self) -> None:
        """Write new blocks to the disk tier, if there is one."""
        unwritten, self._unwritten, self._unwritten_nbytes = self._unwritten, [], 0
        for chain, blocks in unwritten:
            if self.disk is not None:
                self.disk.write(chain, [block.parts for block in blocks])

    def _seed(self, space: str) -> bytes:
        if callable(self._fingerprint):
            self._fingerprint = self._fingerprint()
        return seed(self._fingerprint, space)

    def _find(self, space: str, chain: TokenChain, most: int) -> list[_Block]:
        """The first blocks of a chain that are alive."""
        blocks: list[_Block] = []
        parent: _Block | str = space
        for number in range(most):
            block = self._blocks.get(chain.keys[number])
            # a hash alone is not believed
            if block is None or block.tokens != chain.block(number) or not _same(block.parent, parent):
                break
            blocks.append(block)
            parent = block
        return blocks

    def _find_window(self, space: str, chain: TokenChain, ring: tuple[int, int]) -> _Window | None:
        """The longest window of a ring whose tokens are the first ones of a chain."""
        fitting = (
            window
            for window in self._windows
            if window.ring == ring and window.space == space and chain.coded.startswith(window.tokens)
        )
        return max(fitting, key=lambda window: window.length, default=None)

    def _append(self, space: str, chain: TokenChain, blocks: list[_Block], parts: Stored) -> bool:
        """Add the block after `blocks`, unless another one has its hash → whether it was added."""
        key = chain.keys[len(blocks)]
        if key in self._blocks:
            return False
        block = _Block(self._counter, blocks[-1] if blocks else space, chain.block(len(blocks)), parts)
        self._blocks[key] = block
        blocks.append(block)
        return True

    def _keep(self, entries: Sequence[_Block | _Window]) -> None:
        """Mark entries as used, a block before its parent, and evict what is beyond the capacity."""
        for entry in reversed(entries):
            if entry not in self._kept:
                self._kept[entry] = None
                self.nbytes += entry.nbytes
            self._kept.move_to_end(entry)
        while self.nbytes > self.capacity and self._kept:
            self._drop_oldest()

    def _drop_oldest(self) -> int:
        """Evict one entry → the bytes that are free now."""
        entry, _ = self._kept.popitem(last=False)
        nbytes, alive = entry.nbytes, weakref.ref(entry)
        self.nbytes -= nbytes
        del entry
        return nbytes if alive() is None else 0

    def _note_unwritten(self, chain: TokenChain, blocks: list[_Block], nbytes: int) -> None:
        """Let the next flush write the blocks of a chain; flush now if many wait."""
        if self.disk is None:
            return
        self._unwritten = [(other, held) for other, held in self._unwritten if not chain.starts_with(other)]
        self._unwritten.append((chain, blocks))
        self._unwritten_nbytes += nbytes
        if self._unwritten_nbytes > _MOST_UNWRITTEN:
            self.flush()


def _same(one: _Block | str, other: _Block | str) -> bool:
    return one == other if isinstance(one, str) else one is other
