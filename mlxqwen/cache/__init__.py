"""Key/value caches: placement (linear or ring) × storage (plain or quantized), for any batch size."""

from __future__ import annotations

from mlxqwen.cache.kv_cache import KVCache, cache_identity, check_quantization, check_window, load_cache, make_cache

__all__ = ["KVCache", "cache_identity", "check_quantization", "check_window", "load_cache", "make_cache"]
