"""How far numbers may differ: one answer for each dtype, used everywhere."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from mlxqwen.device import current_device

# Absolute, for logits and attention outputs of magnitude one to ten. Each is some ten units in the last place.
TOLERANCE = {mx.float32: 2e-4, mx.float16: 5e-2, mx.bfloat16: 4e-1}

own_products = pytest.mark.skipif(
    current_device().is_gpu or current_device().has_openblas,
    reason="NOT TESTED: numbers are the same to the last bit with MLX's own products on a CPU alone",
)


def to_numpy(array: mx.array | ArrayLike) -> NDArray[np.float64]:
    """As float64, from any float dtype."""
    if isinstance(array, mx.array):
        return np.array(array.astype(mx.float32)).astype(np.float64)
    return np.asarray(array, dtype=np.float64)


def worst(found: mx.array | ArrayLike, expected: mx.array | ArrayLike) -> float:
    """The largest absolute difference; infinite if a NaN is among them or the shapes differ."""
    ours, theirs = to_numpy(found), to_numpy(expected)
    if ours.shape != theirs.shape:
        return float("inf")
    difference = np.abs(ours - theirs)
    return float("inf") if np.isnan(difference).any() else float(difference.max(initial=0.0))


def assert_close(
    found: mx.array | ArrayLike, expected: mx.array | ArrayLike, dtype: mx.Dtype = mx.float32, what: str = ""
) -> None:
    """Within the tolerance of the dtype that was computed in."""
    difference = worst(found, expected)
    assert difference <= TOLERANCE[dtype], f"{what}: off by {difference:.2e}, {dtype} may be off by {TOLERANCE[dtype]}"
