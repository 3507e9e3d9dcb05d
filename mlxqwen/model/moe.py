"""Mixture of experts: a router, and experts stacked so that one gathered matmul serves all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.device import NEVER, Device
from mlxqwen.files.config import AffineQuantization, MoeConfig
from mlxqwen.model.cores import on_core, ranges, shares_of
from mlxqwen.model.dense_product import dense_product, is_dense
from mlxqwen.model.linear import FusedLinear, JoinedRows, fuse_children
from mlxqwen.model.mlp import swiglu, swiglu_for
from mlxqwen.model.openblas_product import openblas_product
from mlxqwen.model.watched import WatchedModule

__all__ = ["FusedSwitchLinear", "QuantizedSwitchLinear", "SparseMoeBlock", "SwitchGLU", "SwitchLinear", "route"]

# From this many routed rows on, sorting them by expert pays for itself: each expert's weights are then read once.
_SORT_FROM = 64


def route(router_logits: mx.array, num_experts_per_tok: int, *, norm_topk_prob: bool) -> tuple[mx.array, mx.array]:
    """Pick experts: `[N, num_experts]` logits → their `[N, k]` indices and weights, in no set order.

    The weights are the softmax over all experts, in float32 as in transformers; with `norm_topk_prob` scaled to sum to
    one, which makes them the softmax over the chosen ones alone. They are rounded to the dtype of the logits.
    """
    k = num_experts_per_tok
    experts = mx.stop_gradient(mx.argpartition(router_logits, kth=-k, axis=-1)[:, -k:])
    if norm_topk_prob:
        return experts, mx.softmax(mx.take_along_axis(router_logits, experts, axis=-1), axis=-1, precise=True)
    return experts, mx.take_along_axis(mx.softmax(router_logits, axis=-1, precise=True), experts, axis=-1)


class SwitchLinear(nn.Module):
    """One linear map per expert, `weight` `[num_experts, out, in]`."""

    def __init__(self, in_features: int, out_features: int, num_experts: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, out_features, in_features))

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_experts: bool = False) -> mx.array:
        """Row `i` of `x` `[..., 1, in]` through expert `experts[i]` → `[..., 1, out]`."""
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_experts)


class QuantizedSwitchLinear(nn.Module):
    """One affine-quantized linear map per expert, packed as MLX packs a single one."""

    def __init__(self, in_features: int, out_features: int, num_experts: int, quantization: AffineQuantization) -> None:
        super().__init__()
        self.group_size, self.bits = quantization.group_size, quantization.bits
        self.weight = mx.zeros((num_experts, out_features, in_features * self.bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros((num_experts, out_features, in_features // self.group_size))
        self.biases = mx.zeros_like(self.scales)

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_experts: bool = False) -> mx.array:
        """Row `i` of `x` `[..., 1, in]` through expert `experts[i]` → `[..., 1, out]`."""
        return _quantized_product(self, x, experts, sorted_experts)


class FusedSwitchLinear(JoinedRows):
    """`FusedLinear` for experts: the parts are `SwitchLinear`s or `QuantizedSwitchLinear`s of the same input."""

    def __init__(self, parts: Sequence[nn.Module], names: Sequence[str], device: Device) -> None:
        super().__init__(parts, names, device)
        self.shares = shares_of(device)  # of one expert's weights

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_experts: bool = False) -> mx.array:
        """Row `i` of `x` `[..., 1, in]` through expert `experts[i]` → `[..., 1, out]`."""
        if "scales" not in self:
            return mx.gather_mm(x, self["weight"], rhs_indices=experts, sorted_indices=sorted_experts)
        return _quantized_product(self, x, experts, sorted_experts)

    def of_expert(self, x: mx.array, expert: int) -> mx.array:
        """`[N, in]` through one expert, dequantized → `[N, out]`."""
        shares = self.shares
        if "scales" not in self:
            rows = self["weight"][expert].T
            return openblas_product(x, rows) if shares is None else shares.product(openblas_product, x, rows)
        packed = self["weight"][expert], self["scales"][expert], self["biases"][expert]
        return dense_product(x, packed, self.group_size, self.bits, 1 if shares is None else shares.cores)


def _quantized_product(module: nn.Module, x: mx.array, experts: mx.array, sorted_experts: bool) -> mx.array:
    return mx.gather_qmm(
        x,
        module["weight"],
        module["scales"],
        module["biases"],
        rhs_indices=experts,
        group_size=module.group_size,
        bits=module.bits,
        sorted_indices=sorted_experts,
    )


class SwitchGLU(WatchedModule):
    """SwiGLU in every expert: `[N, hidden_size]` tokens with `[N, k]` experts each → `[N, k, hidden_size]`."""

    def __init__(self, hidden_size: int, moe_intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.gate_proj = SwitchLinear(hidden_size, moe_intermediate_size, num_experts)
        self.up_proj = SwitchLinear(hidden_size, moe_intermediate_size, num_experts)
        self.down_proj = SwitchLinear(moe_intermediate_size, hidden_size, num_experts)
        self.swiglu: Callable[[mx.array, mx.array], mx.array] = swiglu
        self.dense_from = NEVER  # rows an expert; see `Device`
        self.cores = 1  # see `Device`
        self.multiplications = 3 * hidden_size * moe_intermediate_size  # of a token in an expert

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        N, k = experts.shape
        chosen = experts.reshape(N * k)
        rows_of = self._rows_of_experts(x, chosen)
        if not rows_of and N * k < _SORT_FROM:
            return self._shared(x.reshape(N, 1, 1, -1), experts, sorted_experts=False).reshape(N, k, -1)
        by_expert = mx.argsort(chosen)
        if rows_of:
            outputs = self._expert_by_expert(x[by_expert // k], rows_of)
        else:
            rows = x[by_expert // k][:, None, :]
            outputs = self._shared(rows, chosen[by_expert], sorted_experts=True).squeeze(-2)
        return outputs[mx.argsort(by_expert)].reshape(N, k, -1)

    def _rows_of_experts(self, x: mx.array, chosen: mx.array) -> list[tuple[int, int]]:
        """Experts and how many rows each has, in order; none where one product an expert is no gain."""
        if x.dtype != mx.float32 or self.dense_from == NEVER:  # counting waits for the router
            return []
        counts = Counter(cast(list[int], chosen.tolist()))
        return (
            sorted(counts.items()) if is_dense(chosen.size / len(counts), self.multiplications, self.dense_from) else []
        )

    def _expert_by_expert(self, x: mx.array, rows_of: list[tuple[int, int]]) -> mx.array:
        """Sorted rows `[N, hidden_size]` through their experts, one after another → `[N, hidden_size]`."""
        outputs: list[mx.array] = []
        start = 0
        for expert, count in rows_of:
            gate, up = self["gate_up_proj"].of_expert(x[start : start + count], expert).split(2, axis=-1)
            outputs.append(self["down_proj"].of_expert(self.swiglu(gate, up), expert))
            start += count
        return mx.concatenate(outputs)

    def _shared(self, x: mx.array, experts: mx.array, *, sorted_experts: bool) -> mx.array:
        """`_experts`, each core with some of each token's experts `[N, k]`, or with some of the sorted rows `[N]`."""
        axis = experts.ndim - 1
        parts = ranges(experts.shape[axis], self.cores, experts.size * self.multiplications)
        if len(parts) == 1:
            return self._experts(x, experts, sorted_experts=sorted_experts)
        outputs = []
        for core, part in enumerate(parts):
            with on_core(core):
                rows, chosen = (x, experts[:, part]) if axis else (x[part], experts[part])
                outputs.append(self._experts(rows, chosen, sorted_experts=sorted_experts))
        return mx.concatenate(outputs, axis)

    def _experts(self, x: mx.array, experts: mx.array, *, sorted_experts: bool) -> mx.array:
        if "gate_up_proj" in self:
            gate, up = self["gate_up_proj"](x, experts, sorted_experts=sorted_experts).split(2, axis=-1)
        else:
            gate = self["gate_proj"](x, experts, sorted_experts=sorted_experts)
            up = self["up_proj"](x, experts, sorted_experts=sorted_experts)
        return self["down_proj"](self.swiglu(gate, up), experts, sorted_experts=sorted_experts)

    def fuse(self, device: Device) -> None:
        """Fuse the projections of the input, if they are quantized alike."""
        self.swiglu = swiglu_for(device)
        fuse_children(self, ("gate_proj", "up_proj"), "gate_up_proj", FusedSwitchLinear, device)
        fuse_children(self, ("down_proj",), "down_proj", FusedSwitchLinear, device)
        self.cores = device.cores
        if "gate_up_proj" in self:
            self.dense_from = self["gate_up_proj"].dense_from


class SparseMoeBlock(WatchedModule):
    """Each token through its `num_experts_per_tok` best experts, weighted by the router (`gate`)."""

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.norm_topk_prob = moe.norm_topk_prob
        self.gate = nn.Linear(hidden_size, moe.num_experts, bias=False)
        self.switch_mlp = SwitchGLU(hidden_size, moe.moe_intermediate_size, moe.num_experts)

    def __call__(self, x: mx.array) -> mx.array:
        """`[N, hidden_size]` → `[N, hidden_size]`."""
        experts, weights = route(self["gate"](x), self.num_experts_per_tok, norm_topk_prob=self.norm_topk_prob)
        outputs = self["switch_mlp"](x, experts)
        return (weights[:, None, :] @ outputs).squeeze(1)

    def fuse(self, device: Device) -> None:
        """Fuse the projections of the input, if they are quantized alike."""
        fuse_children(self, ("gate",), "gate", FusedLinear, device)
        self.switch_mlp.fuse(device)
