"""One text through a model, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = ["read_tokens"]

_FEW = 32  # tokens that need no work space to speak of


def read_tokens(
    model: Qwen3ForCausalLM,
    cache: KVCache,
    tokens: Sequence[int],
    chunk: int,
    on_chunk: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Feed at least one token, behind what `cache` holds → the hidden state `[1, hidden_size]` of the last one.

    Args:
        chunk: tokens a step; memory grows with it.
        on_chunk: called with (tokens done, tokens in all) before the first chunk and after each.
    """
    if on_chunk is not None:
        on_chunk(0, len(tokens))
    hidden = mx.zeros(0)
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        hidden = model.model(mx.array([piece], dtype=mx.int32), cache, last_only=True)[:, 0]
        if len(tokens) > _FEW or on_chunk is not None:
            mx.eval(cache.state, hidden)
            mx.clear_cache()  # the chunk's work space, which decoding has no use for
        if on_chunk is not None:
            on_chunk(start + len(piece), len(tokens))
    return hidden
