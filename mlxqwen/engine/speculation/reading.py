"""Reading a text with a draft model, one chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = ["read_tokens"]

_FEW = 32  # tokens that need no work space to speak of


def read_tokens(model: Qwen3ForCausalLM, cache: KVCache, tokens: Sequence[int], chunk: int) -> mx.array:
    """Feed at least one token, after what `cache` holds → the hidden state `[1, hidden_size]` of the last one.

    Args:
        chunk: tokens a step; memory grows with it.
    """
    hidden = mx.zeros(0)
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        hidden = model.model(mx.array([piece], dtype=mx.int32), cache, last_only=True)[:, 0]
        if len(tokens) > _FEW:
            mx.eval(cache.state, hidden)
            mx.clear_cache()  # the chunk's work space, which decoding has no use for
    return hidden
