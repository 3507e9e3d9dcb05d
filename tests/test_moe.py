from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from mlxqwen.files.config import AffineQuantization, MoeConfig
from mlxqwen.model.moe import QuantizedSwitchLinear, SparseMoeBlock, SwitchGLU, route
from tests.tolerance import assert_close, to_numpy

HIDDEN, WIDTH = 32, 64


def moe(experts: int, per_token: int, *, normalised: bool = True) -> MoeConfig:
    return MoeConfig(experts, per_token, WIDTH, normalised)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), experts=st.integers(1, 16), normalised=st.booleans())
def test_routing_takes_the_softmax_over_all_and_then_the_best(
    data: st.DataObject, experts: int, normalised: bool
) -> None:
    k = data.draw(st.integers(1, experts))
    logits = np.random.default_rng(experts * 100 + k).standard_normal((5, experts)).astype(np.float32) * 3
    chosen, weights = (np.array(array) for array in route(mx.array(logits), k, norm_topk_prob=normalised))
    exponentials = np.exp(logits.astype(np.float64))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    for row in range(5):
        assert set(chosen[row]) == set(np.argsort(-probabilities[row])[:k])
        expected = probabilities[row][chosen[row]]
        assert weights[row] == pytest.approx(expected / expected.sum() if normalised else expected, rel=1e-5)


def test_by_hand() -> None:
    """Two experts that are told apart by their last step: one gives the first unit vector, the other the second."""
    block = SparseMoeBlock(2, MoeConfig(2, 1, 1, norm_topk_prob=True))
    ones = mx.ones((2, 1, 2))
    block.update(
        tree_unflatten(
            [
                ("gate.weight", mx.array([[1.0, -1.0], [-1.0, 1.0]])),
                ("switch_mlp.gate_proj.weight", ones),
                ("switch_mlp.up_proj.weight", ones),
                ("switch_mlp.down_proj.weight", mx.array([[[1.0], [0.0]], [[0.0], [1.0]]])),
            ]
        )
    )
    silu_of_three = 3 / (1 + np.exp(-3))
    found = to_numpy(block(mx.array([[2.0, 1.0], [1.0, 2.0]])))
    assert found == pytest.approx(np.array([[3 * silu_of_three, 0], [0, 3 * silu_of_three]]), rel=1e-5)


def reference_block(block: SparseMoeBlock, x: NDArray[np.float64]) -> NDArray[np.float64]:
    gate, up, down = (to_numpy(getattr(block.switch_mlp, f"{name}_proj").weight) for name in ("gate", "up", "down"))
    scores = np.exp(x @ to_numpy(block.gate.weight).T)
    probabilities = scores / scores.sum(-1, keepdims=True)
    outputs = np.zeros_like(x)
    for token, row in enumerate(x):
        best = np.argsort(-probabilities[token])[: block.num_experts_per_tok]
        share = probabilities[token][best]
        share = share / share.sum() if block.norm_topk_prob else share
        for expert, weight in zip(best, share, strict=True):
            activated = gate[expert] @ row
            outputs[token] += weight * (down[expert] @ (activated / (1 + np.exp(-activated)) * (up[expert] @ row)))
    return outputs


def random_block(config: MoeConfig) -> SparseMoeBlock:
    block = SparseMoeBlock(HIDDEN, config)
    shapes = {
        "gate.weight": (config.num_experts, HIDDEN),
        "switch_mlp.gate_proj.weight": (config.num_experts, WIDTH, HIDDEN),
        "switch_mlp.up_proj.weight": (config.num_experts, WIDTH, HIDDEN),
        "switch_mlp.down_proj.weight": (config.num_experts, HIDDEN, WIDTH),
    }
    keys = mx.random.split(mx.random.key(0), len(shapes))
    block.update(
        tree_unflatten(
            [
                (name, 0.2 * mx.random.normal(shape, key=key))
                for (name, shape), key in zip(shapes.items(), keys, strict=True)
            ]
        )
    )
    return block


@pytest.mark.parametrize("tokens", [1, 15, 33, 100])
@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (8, 1), (8, 8), (1, 1), (40, 3)])
@pytest.mark.parametrize("normalised", [False, True])
def test_blocks_are_the_formula_sorted_or_not(tokens: int, experts: int, per_token: int, normalised: bool) -> None:
    block = random_block(moe(experts, per_token, normalised=normalised))
    x = mx.random.normal((tokens, HIDDEN), key=mx.random.key(tokens))
    assert_close(block(x), reference_block(block, to_numpy(x)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("tokens", [3, 80])
def test_quantized_experts_are_those_that_their_codes_stand_for(bits: int, group_size: int, tokens: int) -> None:
    plain, quantized = SwitchGLU(64, 64, 4), SwitchGLU(64, 64, 4)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = mx.random.normal((4, 64, 64), key=mx.random.key(len(name)))
        codes, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
        module = QuantizedSwitchLinear(64, 64, 4, AffineQuantization(group_size, bits))
        assert [module[part].shape for part in ("weight", "scales", "biases")] == [
            part.shape for part in (codes, scales, biases)
        ]
        module.update({"weight": codes, "scales": scales, "biases": biases})
        setattr(quantized, name, module)
        getattr(plain, name).weight = mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits)
    x = 0.02 * mx.random.normal((tokens, 64), key=mx.random.key(1))
    experts = mx.random.randint(0, 4, (tokens, 2), key=mx.random.key(2))
    assert_close(quantized(x, experts), plain(x, experts))


@pytest.mark.parametrize(
    ("step", "mlp_only", "expected"),
    [(1, (), [0, 1, 2, 3]), (2, (), [1, 3]), (3, (), [2]), (1, (0, 3), [1, 2]), (2, (3,), [1])],
)
def test_which_layers_have_experts(step: int, mlp_only: tuple[int, ...], expected: list[int]) -> None:
    config = MoeConfig(4, 2, 8, True, decoder_sparse_step=step, mlp_only_layers=mlp_only)
    assert [layer for layer in range(4) if config.routes(layer)] == expected
