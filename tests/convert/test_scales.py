"""Numbers that are not finite, found by their bits: every number of 16 bits beside NumPy's word."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen_convert.scales import has_infinities


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_not_finite_is_what_numpy_calls_so(dtype: mx.Dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = bits.astype(np.uint32) << 16
    floats = bits.view(np.float16) if dtype == mx.float16 else wide.view(np.float32)
    finite = np.isfinite(floats)
    numbers = mx.array(wide if dtype == mx.float32 else bits).view(dtype)
    assert not has_infinities(numbers[mx.array(np.flatnonzero(finite))]).item()
    for index in np.flatnonzero(~finite)[:: 61 if dtype == mx.float16 else 7].tolist():
        assert has_infinities(mx.concatenate([numbers[:5], numbers[index : index + 1]])).item()
