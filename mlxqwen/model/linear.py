"""Linear maps: those of the same input as one product, and quantized ones the way that is quickest for their rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.device import NEVER, Device
from mlxqwen.model.cores import Shares, shares_of
from mlxqwen.model.dense_product import Packed, dense_product, is_dense
from mlxqwen.model.openblas_product import openblas_product
from mlxqwen.model.turned_product import turned_product, turns

__all__ = ["FusedLinear", "JoinedRows", "PlainProduct", "fuse_children", "quantized_product"]

_SMALL = 1 << 18
"""Numbers of a matrix that stays in a core's caches: 1 MiB."""


class JoinedRows(nn.Module):
    """The weights of several linear maps, or of several stacks of them, joined.

    Plain weights are `[..., in, out]`, quantized ones as MLX packs them. Nothing is evaluated.

    Args:
        parts: the linear maps.
        names: what they are called in the module that they belong to.
        device: that multiplies by them.
    """

    def __init__(self, parts: Sequence[nn.Module], names: Sequence[str], device: Device) -> None:
        super().__init__()
        self._names = " ".join(names)  # a tuple would stand among the arrays
        self.weight, *quantization = _joined_rows(parts)
        if quantization:
            self.scales, self.biases = quantization
            self.group_size, self.bits = parts[0].group_size, parts[0].bits
        else:
            self.weight = self.turned(self.weight)
        self.dense_from = device.dense_from(self.bits if quantization else 32)

    @property
    def names(self) -> tuple[str, ...]:
        """What the parts were called in the module that they belonged to."""
        return tuple(self._names.split())

    def turned(self, rows: mx.array) -> mx.array:
        """A parameter, `[..., rows, width]` as it lies in memory, as it is held here."""
        return rows if "scales" in self else rows.swapaxes(-1, -2)


class FusedLinear(JoinedRows):
    """Linear maps of the same input as one: `[..., in]` → `[..., out]`, with their outputs joined.

    Plain weights are held as `[in, out]`, turned once here and not in every step; affine-quantized ones as MLX packs
    them, `[out, in * bits / 32]` with `scales` and `biases`.
    """

    lies_turned = False

    def __init__(self, parts: Sequence[nn.Module], names: Sequence[str], device: Device) -> None:
        super().__init__(parts, names, device)
        is_plain_on_cpu = "scales" not in self and not device.is_gpu
        self.lies_turned = is_plain_on_cpu and self.weight.size <= _SMALL
        self.shares = shares_of(device)
        self.by_rows = PlainProduct(device) if is_plain_on_cpu and not self.lies_turned else None

    def __call__(self, x: mx.array) -> mx.array:
        if "scales" in self:
            packed = self["weight"], self["scales"], self["biases"]
            return quantized_product(x, packed, self.group_size, self.bits, self.dense_from, self.shares)
        if self.by_rows is not None:
            return self.by_rows(x, self["weight"].T)
        return x @ self["weight"] if self.shares is None else self.shares.product_of_rows(x, self["weight"])

    def turned(self, rows: mx.array) -> mx.array:
        """See `JoinedRows`; a small matrix is copied: where it lies as it is held, it is multiplied by more quickly."""
        turned = super().turned(rows)
        if self.lies_turned:
            turned = mx.contiguous(turned)
            mx.eval(turned)
        return turned


class PlainProduct:
    """Multiplies by plain matrices whose rows lie one after another, in the way that is quickest on a CPU."""

    def __init__(self, device: Device) -> None:
        self._shares, self._has_openblas, self._cores = shares_of(device), device.multiplies_by_openblas, device.cores

    def __call__(self, x: mx.array, rows: mx.array) -> mx.array:
        """`[..., in]` through rows `[out, in]` → `[..., out]`."""
        product = _by_rows
        if x.dtype == mx.float32:
            if self._has_openblas:
                product = openblas_product
            elif turns(x.size // x.shape[-1], rows):
                outputs = turned_product(x.reshape(-1, x.shape[-1]), rows, self._cores)
                return outputs.reshape(*x.shape[:-1], -1)
        return product(x, rows) if self._shares is None else self._shares.product(product, x, rows)


def _by_rows(x: mx.array, rows: mx.array) -> mx.array:
    return x @ rows.T


def quantized_product(
    x: mx.array,
    packed: Packed,
    group_size: int,
    bits: int,
    dense_from: int = NEVER,
    shares: Shares | None = None,
) -> mx.array:
    """`[..., in]` through affine-quantized weights → `[..., out]`.

    Args:
        x: activations.
        packed: `weight`, `[out, in * bits / 32]`, `scales` and `biases`, `[out, in / group_size]`.
        group_size, bits: of the weights.
        dense_from: rows `[N, in]` from which on the weights are dequantized, unless they are few; see `Device`.
        shares: of these weights among a processor's cores; by default one core computes all.
    """
    weight, scales, biases = packed
    if x.ndim == 2 and scales.dtype == mx.float32 and is_dense(len(x), x.shape[1] * len(weight), dense_from):
        return dense_product(x, packed, group_size, bits, 1 if shares is None else shares.cores)
    if shares is None:
        return mx.quantized_matmul(x, weight, scales, biases, True, group_size, bits)
    return shares.product(partial(mx.quantized_matmul, group_size=group_size, bits=bits), x, *packed)


def _joined_rows(parts: Sequence[nn.Module]) -> list[mx.array]:
    """`weight`, and `scales` and `biases` if there are any, of all parts, joined; not evaluated yet."""
    names = [name for name in ("weight", "scales", "biases") if name in parts[0]]
    return [mx.concatenate([part[name] for part in parts], axis=-2) for name in names]


def fuse_children(
    module: nn.Module, names: Sequence[str], fused_name: str, kind: type[JoinedRows], device: Device
) -> None:
    """Replace children of `module` by one fused child; children of different forms stay as they are.

    Nothing is evaluated: weights that are not read yet can be read into the fused child.
    """
    parts = [module[name] for name in names]
    if len({_form(part) for part in parts}) > 1:
        return
    fused = kind(parts, names, device)
    for name in names:
        del module[name]
    module[fused_name] = fused


def _form(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal for weights to be joined: whether and how they are quantized."""
    return ("scales" in module, getattr(module, "group_size", None), getattr(module, "bits", None))
