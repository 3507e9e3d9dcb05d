"""Products in the forms that OpenBLAS computes quickest: the same numbers as in the plain form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.model import openblas_product as module
from mlxqwen.model.linear import FusedLinear
from mlxqwen.model.loading import load_model
from mlxqwen.model.openblas_product import openblas_product, tile_of
from tests.test_dense_products import FAST
from tests.test_fusion import CPU, GPU, MODELS, folder_of
from tests.tiny_checkpoints import prompt
from tests.tolerance import assert_close, to_numpy


@pytest.fixture
def any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow matrices are multiplied in the forms of wide ones."""
    monkeypatch.setattr(module, "_NARROW", 1)
    monkeypatch.setattr(module, "_FEW", 1 / 4)


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize("small", [0, 1, 2_000, 20_000])
@pytest.mark.parametrize("out", [1, 48, 64, 100])
@pytest.mark.parametrize("shape", [(1,), (1, 32), (3, 32), (2, 5, 32), (40, 32), (140, 32)])
def test_every_form_gives_the_same_numbers(
    shape: tuple[int, ...], out: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL", small)
    x = mx.random.normal(shape, key=mx.random.key(1))
    rows = mx.random.normal((out, shape[-1]), key=mx.random.key(2))
    found = openblas_product(x, rows)
    assert found.shape == (*shape[:-1], out)
    assert_close(found, np.einsum("...i,oi->...o", to_numpy(x), to_numpy(rows)))
    part = openblas_product(x, rows[out // 2 :])  # one of several cores' rows
    assert_close(part, found[..., out // 2 :])


@given(numbers=st.integers(1, 1 << 22), out=st.integers(1, 1 << 18))
def test_tiles_are_small_products_of_one_size(numbers: int, out: int) -> None:
    tile = tile_of(numbers, out)
    if tile:
        assert out % tile == 0
        assert tile >= 16
        assert tile * numbers <= 1_000_000
    else:
        assert out % 16 or numbers * 16 > 1_000_000


def test_an_expert_of_the_30b_is_multiplied_in_tiles() -> None:
    assert tile_of(4 * 2048, 1536) == 64
    assert tile_of(4 * 768, 2048) == 256
    assert tile_of(64 * 2048, 1536) == 0


def test_narrow_matrices_and_many_rows_are_multiplied_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def recorded(numbers: int, out: int) -> int:
        asked.append(numbers)
        return tile_of(numbers, out)

    monkeypatch.setattr(module, "tile_of", recorded)
    for count, out, width in ((8, 1024, 256), (33, 256, 1024), (1, 512, 1024), (4, 1024, 1024), (32, 256, 1024)):
        openblas_product(mx.zeros((count, width)), mx.zeros((out, width)))
    assert asked == [4 * 1024, 32 * 1024]


def test_only_openblas_gets_other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[mx.array] = []

    def recorded(x: mx.array, rows: mx.array) -> mx.array:
        used.append(x)
        return openblas_product(x, rows)

    monkeypatch.setattr("mlxqwen.model.linear.openblas_product", recorded)
    monkeypatch.setattr("mlxqwen.model.linear._SMALL", 1)
    for device in (CPU, GPU, replace(GPU, has_openblas=True), FAST):
        linear = FusedLinear([nn.Linear(8, 8, bias=False)], ["o_proj"], device)
        assert_close(linear(mx.eye(8)), linear.weight)
        linear(mx.eye(8, dtype=mx.float16))
        assert len(used) == (device is FAST)


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("name", [name for name, (_, quantization) in MODELS.items() if quantization is None])
def test_models_give_the_same_logits(tmp_path: Path, name: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all forms: tiles for the rows of a batch, the matrix times the activations for a prompt."""
    monkeypatch.setattr(module, "_SMALL", 5_000)
    monkeypatch.setattr("mlxqwen.model.cores._LEAST", 1)
    folder = folder_of(tmp_path, *MODELS[name])
    fast, plain = load_model(folder, device=replace(FAST, cores=cores)), load_model(folder, device=CPU)
    for count in (1, 5, 60):
        ids = mx.array([prompt(count, 96, 1)])
        assert_close(fast(ids), plain(ids))
