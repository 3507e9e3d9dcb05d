"""Exponentials by powers, beside NumPy's in float64."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.model.exponential import exp, softmax
from mlxqwen.model.mlp import compiled_swiglu, swiglu, swiglu_for
from tests.test_fusion import CPU, GPU
from tests.tolerance import assert_close, to_numpy

NUMBERS = np.concatenate([np.linspace(-87, 87, 1001), np.linspace(-1, 1, 101), [0.0]])


def test_powers_are_exponentials() -> None:
    expected = np.exp(NUMBERS.astype(np.float32).astype(np.float64))
    found = to_numpy(exp(mx.array(NUMBERS, dtype=mx.float32)))
    assert np.abs(found / expected - 1).max() <= 87 * 2.0**-24 + 2.0**-23  # e itself is rounded
    assert exp(mx.array([-1000.0, -mx.inf, 1000.0])).tolist() == [0, 0, mx.inf]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_softmax(dtype: mx.Dtype) -> None:
    x = (20 * mx.random.normal((5, 3, 70), key=mx.random.key(0))).astype(dtype)
    x = mx.where(mx.arange(70) < 60, x, mx.finfo(dtype).min)
    numbers = to_numpy(x.astype(mx.float32)).astype(np.float64)
    powers = np.exp(numbers - numbers.max(-1, keepdims=True))
    found = softmax(x)
    assert found.dtype == dtype
    assert_close(found, powers / powers.sum(-1, keepdims=True), dtype)
    assert mx.all(found[..., 60:] == 0).item()


def test_quick_swiglu_is_swiglu() -> None:
    gate = mx.array(np.concatenate([NUMBERS, [-1e30, -200, 200, 1e30]]), dtype=mx.float32)
    up = mx.random.normal(gate.shape, key=mx.random.key(1))
    quick = swiglu_for(replace(CPU, has_openblas=True))
    found, expected = to_numpy(quick(gate, up)), to_numpy(swiglu(gate, up))
    assert np.abs(found - expected).max(where=np.abs(expected) < 1e3, initial=0.0) <= 1e-4
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-30)
    assert swiglu_for(CPU) is swiglu
    assert swiglu_for(replace(GPU, has_openblas=True)) is compiled_swiglu
