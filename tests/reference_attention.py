"""Attention with rotary positions, a window and sinks in float64 numpy, written for plainness: the oracle of caches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def rotated(vector: Floats, position: int, theta: float) -> Floats:
    """`[head_dim]` at `position`: pair `(d, d + head_dim / 2)` turns by `position / theta ** (2d / head_dim)`."""
    half = len(vector) // 2
    angles = position / theta ** (np.arange(half) / half)
    first, second = vector[:half], vector[half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def attention(
    queries: Floats,
    keys: Floats,
    values: Floats,
    *,
    theta: float,
    scale: float,
    window: int | None = None,
    keep: int = 0,
    stored: Callable[[Floats], Floats] = lambda array: array,
) -> Floats:
    """One row: `queries` `[heads, T, head_dim]`, `keys` and `values` `[kv_heads, T, head_dim]` → like `queries`.

    The query at `i` sees `j <= i` where `i - j < window - keep or j < keep`, and sees sinks (`j < keep`) from position
    `min(i, window - 1)`. `stored` is what storing does to rotated keys and to values.
    """
    heads, tokens, _ = queries.shape
    group = heads // len(keys)
    held_keys = stored(
        np.array([[rotated(key, j, theta) for j, key in enumerate(head)] for head in keys]).reshape(keys.shape)
    )
    held_values = stored(values)
    output = np.zeros_like(queries)
    for head in range(heads):
        for i in range(tokens):
            seen = [j for j in range(i + 1) if window is None or i - j < window - keep or j < keep]
            at_sinks = i if window is None else min(i, window - 1)
            scores = [
                scale * rotated(queries[head, i], at_sinks if j < keep else i, theta) @ held_keys[head // group, j]
                for j in seen
            ]
            weights = np.exp(np.array(scores) - max(scores))
            output[head, i] = weights / weights.sum() @ held_values[head // group][seen]
    return output
