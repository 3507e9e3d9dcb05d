"""Key/value caches, and the store of prefixes that replies share.

`KVCache` is a placement (linear or ring) and a storage (plain or quantized), for any number of rows; `make_cache` makes
one and `load_cache` reads one from a file. `TentativeStep` takes tokens back that were guessed wrong. `PrefixStore`
keeps blocks of what was read, in memory and with `DiskTier` on disk, under a chain of hashes of all tokens before.

In go keys, values and token ids; out come the results of attention, and blocks that are copied into a new cache.

Nothing here knows text, samples tokens or decides which request runs. A block is never used without comparing its
tokens, and bytes from the disk are never used without comparing their digest.
"""

from __future__ import annotations

from mlxqwen.cache.kv_cache import KVCache, cache_identity, check_quantization, check_window, load_cache, make_cache

__all__ = ["KVCache", "cache_identity", "check_quantization", "check_window", "load_cache", "make_cache"]
