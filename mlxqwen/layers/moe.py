"""Mixture of experts: a router, and experts stacked so that one gathered matmul serves all of them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxqwen.config import AffineQuantization, MoeConfig
from mlxqwen.layers.mlp import swiglu

__all__ = ["QuantizedSwitchLinear", "SparseMoeBlock", "SwitchGLU", "SwitchLinear", "route"]

# From this many routed rows on, sorting them by expert pays for itself: each expert's weights are then read once.
_SORT_FROM = 64


def route(router_logits: mx.array, num_experts_per_tok: int, *, norm_topk_prob: bool) -> tuple[mx.array, mx.array]:
    """Pick experts: `[..., num_experts]` logits → their `[..., k]` indices and weights (float32), in no set order.

    The softmax runs over all experts in float32 before the choice, as in transformers; with `norm_topk_prob` the chosen
    weights are scaled to sum to one.
    """
    probabilities = mx.softmax(router_logits.astype(mx.float32), axis=-1, precise=True)
    k = num_experts_per_tok
    experts = mx.argpartition(-probabilities, kth=k - 1, axis=-1)[..., :k]
    weights = mx.take_along_axis(probabilities, experts, axis=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return experts, weights


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
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=sorted_experts,
        )


class SwitchGLU(nn.Module):
    """SwiGLU in every expert: `[N, hidden_size]` tokens with `[N, k]` experts each → `[N, k, hidden_size]`."""

    def __init__(self, hidden_size: int, moe_intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.gate_proj = SwitchLinear(hidden_size, moe_intermediate_size, num_experts)
        self.up_proj = SwitchLinear(hidden_size, moe_intermediate_size, num_experts)
        self.down_proj = SwitchLinear(moe_intermediate_size, hidden_size, num_experts)

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        N, k = experts.shape
        if N * k < _SORT_FROM:
            return self._experts(x[:, None, None, :], experts, sorted_experts=False).squeeze(-2)
        chosen = experts.reshape(N * k)
        by_expert = mx.argsort(chosen)
        rows = x[by_expert // k][:, None, :]
        outputs = self._experts(rows, chosen[by_expert], sorted_experts=True).squeeze(-2)
        return outputs[mx.argsort(by_expert)].reshape(N, k, -1)

    def _experts(self, x: mx.array, experts: mx.array, *, sorted_experts: bool) -> mx.array:
        gate = self.gate_proj(x, experts, sorted_experts=sorted_experts)
        up = self.up_proj(x, experts, sorted_experts=sorted_experts)
        return self.down_proj(swiglu(gate, up), experts, sorted_experts=sorted_experts)


class SparseMoeBlock(nn.Module):
    """Each token through its `num_experts_per_tok` best experts, weighted by the router (`gate`)."""

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.norm_topk_prob = moe.norm_topk_prob
        self.gate = nn.Linear(hidden_size, moe.num_experts, bias=False)
        self.switch_mlp = SwitchGLU(hidden_size, moe.moe_intermediate_size, moe.num_experts)

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, L, hidden_size]` → `[B, L, hidden_size]`."""
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = route(self.gate(tokens), self.num_experts_per_tok, norm_topk_prob=self.norm_topk_prob)
        outputs = self.switch_mlp(tokens, experts)
        return (outputs * weights.astype(x.dtype)[..., None]).sum(axis=-2).reshape(x.shape)
