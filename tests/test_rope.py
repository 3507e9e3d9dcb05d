from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.files.config import ModelConfig, YarnScaling
from mlxqwen.model.rope import Rope, rope_wavelengths, turned, turns
from tests.reference_attention import rotated
from tests.tiny_checkpoints import DENSE
from tests.tolerance import to_numpy, worst

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rope.json").read_text())


def scaling(factor: float = 4.0) -> YarnScaling:
    return YarnScaling(factor, 32_768, 0.1 * math.log(factor) + 1)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["rope_scaling"]))
def test_wavelengths_and_attention_factors_are_those_of_transformers(case: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**DENSE, **GOLDEN["shape"], "rope_scaling": case["rope_scaling"]})
    wavelengths = np.array(rope_wavelengths(config.head_dim, config.rope_theta, config.rope_scaling))
    assert 1 / wavelengths == pytest.approx(np.array(case["inv_freq"]), rel=2e-6)  # theirs are float32
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    assert factor == pytest.approx(case["attention_factor"])


def test_plain_wavelengths() -> None:
    assert rope_wavelengths(8, 10_000.0, None) == pytest.approx([1, 10, 100, 1000])


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    """Qwen3's own numbers: 128 wide heads, base one million, four times 32,768 positions."""
    plain, slowed = rope_wavelengths(128, 1e6, None), rope_wavelengths(128, 1e6, scaling())
    ratios = np.array(slowed) / np.array(plain)
    assert ratios[:24] == pytest.approx(1)  # those that turn more than 32 times in 32,768 positions: 163 rad a turn
    assert ratios[-24:] == pytest.approx(4)
    assert (np.diff(ratios) >= -1e-12).all()
    turns = 32_768 / (2 * math.pi * np.array(plain))
    assert ratios[turns < 0.8] == pytest.approx(4)
    assert ratios[turns > 36] == pytest.approx(1)


@settings(max_examples=100, deadline=None)
@given(
    head_dim=st.integers(1, 128).map(lambda half: 2 * half),
    theta=st.floats(2.0, 1e12),
    factor=st.floats(1.0, 1024.0),
    original=st.integers(1, 1 << 27),
    betas=st.tuples(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6)),
    truncate=st.booleans(),
)
def test_yarn_slows_every_pair_between_one_and_factor_times(
    head_dim: int, theta: float, factor: float, original: int, betas: tuple[float, float], truncate: bool
) -> None:
    yarn = YarnScaling(factor, original, 1.0, max(betas), min(betas), truncate)
    plain, slowed = np.array(rope_wavelengths(head_dim, theta, None)), np.array(rope_wavelengths(head_dim, theta, yarn))
    assert np.isfinite(slowed).all()
    assert (slowed >= plain * (1 - 1e-9)).all()
    assert (slowed <= plain * factor * (1 + 1e-9)).all()


def test_a_factor_of_one_changes_nothing() -> None:
    assert rope_wavelengths(64, 1e6, scaling(1.0)) == pytest.approx(rope_wavelengths(64, 1e6, None))
    assert Rope(64, 1e6, YarnScaling(1.0, 32_768, 1.0)).score_factor == 1


def test_the_attention_factor_multiplies_queries_and_keys() -> None:
    assert Rope(64, 1e6, scaling()).score_factor == pytest.approx((0.1 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize("offset", [0, 1, 1000, 100_000])
def test_rotation_is_the_formula(offset: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 32)).astype(np.float32)
    found = to_numpy(Rope(32, 10_000.0)(mx.array(x), offset))
    expected = [[[rotated(v.astype(float), offset + i, 1e4) for i, v in enumerate(head)] for head in row] for row in x]
    # float32 holds an angle of 100,000 radians to 0.004
    assert worst(found, expected) <= 1e-5 + 1.2e-7 * offset


def test_every_row_has_its_own_offset_and_every_token_its_own_position() -> None:
    rope = Rope(32, 10_000.0)
    x = mx.random.normal((3, 2, 4, 32), key=mx.random.key(0))
    offsets = mx.array([5, 0, 700])
    together = rope(x, offsets)
    for row, offset in enumerate([5, 0, 700]):
        assert worst(together[row : row + 1], rope(x[row : row + 1], offset)) <= 1e-6
    assert worst(rope.at(x, offsets[:, None] + mx.arange(4)), together) <= 1e-6
    scattered = rope.at(x, mx.array([[3, 3, 0, 90]] * 3))
    assert worst(scattered[:, :, 1:2], rope(x[:, :, 1:2], 3)) <= 1e-6
    assert worst(scattered[:, :, 3:4], rope(x[:, :, 3:4], 90)) <= 1e-6


def test_scores_depend_on_distance_alone() -> None:
    rope = Rope(32, 10_000.0)
    query, key = (mx.random.normal((1, 1, 1, 32), key=mx.random.key(seed)) for seed in (0, 1))
    scores = [(rope(query, at + 17) * rope(key, at)).sum().item() for at in (0, 100, 3000)]
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("factor", [None, 4.0])
@settings(max_examples=30, deadline=None)
@given(
    offsets=st.integers(0, 1 << 20) | st.lists(st.integers(0, 1 << 17), min_size=3, max_size=3),
    length=st.integers(1, 9),
    seed=st.integers(0, 1 << 30),
)
def test_turns_that_layers_share_rotate_to_the_last_bit(
    factor: float | None, dtype: mx.Dtype, offsets: int | list[int], length: int, seed: int
) -> None:
    """Beside MLX's own rotation, which finds the angles each time."""
    rope = Rope(32, 1e6, None if factor is None else scaling(factor))
    x = mx.random.normal((3, 2, length, 32), key=mx.random.key(seed)).astype(dtype)
    offset = offsets if isinstance(offsets, int) else mx.array(offsets)
    found = turned(x, turns(rope.wavelengths, offset, length))
    assert found.dtype == dtype
    assert mx.array_equal(found, rope(x, offset))
