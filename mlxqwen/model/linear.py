"""Fused linear maps: those of the same input as one product, which is quicker than several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["FusedLinear", "JoinedRows", "fuse_children"]


class JoinedRows(nn.Module):
    """The weights of several linear maps, or of several stacks of them, joined.

    Plain weights are `[..., in, out]`, quantized ones as MLX packs them.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.weight, *quantization = _joined_rows(parts)
        if quantization:
            self.scales, self.biases = quantization
            self.group_size, self.bits = parts[0].group_size, parts[0].bits
        else:
            self.weight = self.weight.swapaxes(-1, -2)


class FusedLinear(JoinedRows):
    """Linear maps of the same input as one: `[..., in]` → `[..., out]`, with their outputs joined.

    Plain weights are held as `[in, out]`, turned once here and not in every step; affine-quantized ones as MLX packs
    them, `[out, in * bits / 32]` with `scales` and `biases`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if "scales" in self:
            return mx.quantized_matmul(
                x, self["weight"], self["scales"], self["biases"], True, self.group_size, self.bits
            )
        return x @ self["weight"]


def _joined_rows(parts: Sequence[nn.Module]) -> list[mx.array]:
    """`weight`, and `scales` and `biases` if there are any, of all parts, joined; not evaluated yet."""
    names = [name for name in ("weight", "scales", "biases") if name in parts[0]]
    return [mx.concatenate([part[name] for part in parts], axis=-2) for name in names]


def fuse_children(
    module: nn.Module, names: Sequence[str], fused_name: str, fuse: Callable[[Sequence[nn.Module]], nn.Module]
) -> None:
    """Replace children of `module` by one fused child; children of different forms stay as they are.

    Meanwhile, the weights of these children are held twice.
    """
    parts = [module[name] for name in names]
    if len({_form(part) for part in parts}) > 1:
        return
    fused = fuse(parts)
    mx.eval(fused.parameters())
    for name in names:
        del module[name]
    module[fused_name] = fused


def _form(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal for weights to be joined: whether and how they are quantized."""
    return ("scales" in module, getattr(module, "group_size", None), getattr(module, "bits", None))
