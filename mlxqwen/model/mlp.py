"""The feed-forward layer, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.device import Device
from mlxqwen.model.exponential import exp
from mlxqwen.model.linear import FusedLinear, fuse_children
from mlxqwen.model.watched import WatchedModule

__all__ = ["MLP", "compiled_swiglu", "swiglu", "swiglu_for"]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`, elementwise (Shazeer, "GLU Variants Improve Transformer", 2020)."""
    return gate * mx.sigmoid(gate) * up


compiled_swiglu = mx.compile(swiglu, shapeless=True)
"""`swiglu` as one kernel, for devices where making kernels is cheap."""


def _quick_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (exp(-gate) + 1) * up


def swiglu_for(device: Device) -> Callable[[mx.array, mx.array], mx.array]:
    """`swiglu` as it is quickest; with MLX's own products its numbers are kept to the last bit."""
    if device.compiles_kernels:
        return compiled_swiglu
    return _quick_swiglu if device.multiplies_by_openblas else swiglu


class MLP(WatchedModule):
    """`[N, hidden_size]` → `[N, hidden_size]` through `intermediate_size`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.swiglu: Callable[[mx.array, mx.array], mx.array] = swiglu

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            gate, up = self["gate_up_proj"](x).split(2, axis=-1)
        else:
            gate, up = self["gate_proj"](x), self["up_proj"](x)
        return self["down_proj"](self.swiglu(gate, up))

    def fuse(self, device: Device) -> None:
        """Lay the projections of the input together, if they are quantized alike."""
        self.swiglu = swiglu_for(device)
        fuse_children(self, ("gate_proj", "up_proj"), "gate_up_proj", FusedLinear, device)
        fuse_children(self, ("down_proj",), "down_proj", FusedLinear, device)
