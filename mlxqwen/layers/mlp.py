"""SwiGLU feed-forward."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

__all__ = ["MLP", "swiglu"]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`, elementwise (Shazeer, "GLU Variants Improve Transformer", 2020)."""
    return gate * mx.sigmoid(gate) * up


class MLP(nn.Module):
    """`[..., hidden_size]` → `[..., hidden_size]` through `intermediate_size`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
