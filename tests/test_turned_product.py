"""Products by turned matrices: the same bits as by the rows as they lie, in little memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxqwen.device import Device
from mlxqwen.model import blocks, cores, linear, turned_product
from mlxqwen.model.linear import FusedLinear, PlainProduct
from mlxqwen.model.loading import load_model
from tests.test_dense_products import FAST
from tests.test_fusion import CPU, GPU, MODELS, folder_of
from tests.tiny_checkpoints import prompt
from tests.tolerance import assert_close, own_products, to_numpy

PLAIN = [name for name, (_, quantization) in MODELS.items() if quantization is None]


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of matrices that rows are multiplied by turned, from here on small ones too."""
    shapes: list[tuple[int, ...]] = []

    def recorded(x: mx.array, rows: mx.array, cores: int) -> mx.array:
        shapes.append(rows.shape)
        return turned_product.turned_product(x, rows, cores)

    monkeypatch.setattr(linear, "turned_product", recorded)
    monkeypatch.setattr(linear, "_SMALL", 1)
    monkeypatch.setattr(turned_product, "_LEAST", 1)
    return shapes


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("out", [32, 96, 320])
@pytest.mark.parametrize("rows", [8, 21])
def test_both_ways_give_the_same_numbers(rows: int, out: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_LEAST", 1)
    monkeypatch.setattr(blocks, "_BLOCK", 64 * 48)
    x = mx.random.normal((rows, 48), key=mx.random.key(1))
    weight = mx.random.normal((out, 48), key=mx.random.key(2))
    assert_close(turned_product.turned_product(x, weight, count), to_numpy(x) @ to_numpy(weight).T)


@own_products
@pytest.mark.parametrize("shape", [(8, 48), (30, 48), (2, 5, 48)])
@pytest.mark.parametrize("count", [1, 3])
def test_they_are_the_same_to_the_last_bit(
    shape: tuple[int, ...], count: int, turned: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_LEAST", 1)
    x = mx.random.normal(shape, key=mx.random.key(1))
    weight = mx.random.normal((160, 48), key=mx.random.key(2))
    assert mx.array_equal(PlainProduct(replace(CPU, cores=count))(x, weight), x @ weight.T)
    assert turned == [(160, 48)]


def test_few_rows_other_dtypes_and_odd_matrices_are_multiplied_as_they_lie(turned: list[tuple[int, ...]]) -> None:
    product = PlainProduct(CPU)
    for x, out in ((mx.ones((7, 48)), 64), (mx.ones((8, 48)), 65), (mx.ones((8, 48), dtype=mx.bfloat16), 64)):
        weight = mx.ones((out, 48), dtype=x.dtype)
        assert_close(product(x, weight), np.full((len(x), out), 48.0), dtype=x.dtype)
    PlainProduct(FAST)(mx.ones((8, 48)), mx.ones((64, 48)))
    assert turned == []


def test_small_matrices_are_not_worth_it() -> None:
    assert not turned_product.turns(8, mx.ones((512, 128)))
    assert turned_product.turns(8, mx.ones((512, 512)))


@own_products
@pytest.mark.parametrize("name", PLAIN)
def test_models_give_the_same_logits_to_the_last_bit(
    tmp_path: Path, name: str, turned: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small matrices that lie turned, with matrices that are turned for many rows, and with neither."""
    ids = mx.array([prompt(20, 96, 1)])
    folder = folder_of(tmp_path, *MODELS[name])
    found = []
    for small, first in ((1 << 18, 8), (1, 8), (1, 1 << 30)):
        monkeypatch.setattr(linear, "_SMALL", small)
        monkeypatch.setattr(turned_product, "_FROM", first)
        model = load_model(folder, device=CPU)
        found.append([model(ids), model(ids[:, :3])])
        assert bool(turned) == (small == 1 and first == 8) or small > 1
        turned.clear()
    for others in found[1:]:
        assert all(mx.array_equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize(("device", "lies_turned"), [(CPU, True), (FAST, True), (GPU, False)])
def test_small_plain_matrices_lie_in_memory_as_they_are_held(tmp_path: Path, device: Device, lies_turned: bool) -> None:
    folder = folder_of(tmp_path, *MODELS[PLAIN[0]])
    for count in (1, 3):
        model = load_model(folder, device=device if device.is_gpu else replace(device, cores=count), dtype="float32")
        weight = model.layers[0].mlp.down_proj.weight
        assert memoryview(weight).c_contiguous == lies_turned
        assert memoryview(weight.T).c_contiguous != lies_turned


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (7, 1), (8, 2), (40, 3)])
def test_rows_are_dealt_out_among_cores_that_read_a_whole_matrix(
    rows: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    on_core = cores.on_core

    def recorded(core: int) -> AbstractContextManager[object]:
        used.append(core)
        return on_core(core)

    monkeypatch.setattr(cores, "on_core", recorded)
    shares = cores.shares_of(replace(CPU, cores=3))
    assert shares is not None
    x = mx.random.normal((rows, 256), key=mx.random.key(1))
    weight = mx.random.normal((256, 512), key=mx.random.key(2))
    assert_close(shares.product_of_rows(x, weight), to_numpy(x) @ to_numpy(weight))
    assert used == ([] if parts == 1 else list(range(parts)))
    assert_close(shares.product_of_rows(x[None], weight), (to_numpy(x) @ to_numpy(weight))[None])


@pytest.mark.parametrize("quantized", [False, True])
def test_functions_of_a_model_can_be_traced(
    tmp_path: Path, turned: list[tuple[int, ...]], quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `mx.compile` and `mx.vmap`, which refuse whatever evaluates; `mx.grad` does not."""
    monkeypatch.setattr("mlxqwen.model.dense_product._LEAST", 1)
    name = "dense, quantized" if quantized else "dense, tied"
    model = load_model(folder_of(tmp_path, *MODELS[name]), device=FAST if quantized else CPU)
    ids = mx.array([prompt(9, 96, seed) for seed in (1, 2)])

    def logits(ids: mx.array) -> mx.array:
        return model.logits(model.model(ids))

    assert_close(mx.compile(logits)(ids), logits(ids))
    assert_close(mx.vmap(lambda row: logits(row[None])[0])(ids), logits(ids))
    assert bool(turned) != quantized


def test_other_failures_of_a_block_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> None:
        raise ValueError("[malloc] too much")

    monkeypatch.setattr(mx, "eval", failing)
    with pytest.raises(ValueError, match="too much"):
        turned_product.turned_product(mx.ones((8, 48)), mx.ones((64, 48)))


@pytest.mark.parametrize("lies_turned", [False, True])
def test_one_vector_is_multiplied_as_a_row_is(lies_turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_SMALL", 1 << 18 if lies_turned else 1)
    monkeypatch.setattr(cores, "_LEAST", 1)
    fused = FusedLinear([nn.Linear(48, 64, bias=False)], ["o_proj"], replace(CPU, cores=3))
    x = mx.random.normal((48,), key=mx.random.key(1))
    assert_close(fused(x), fused(x[None])[0])


@pytest.mark.slow
@own_products
def test_matrices_are_turned_a_block_at_a_time() -> None:
    """However many products are asked for at once: without care, all 24 matrices of 8 MiB would be there twice."""
    weights = [mx.random.normal(shape) for shape in [(2048, 1024), (1024, 2048)] * 12]
    x = mx.random.normal((64, 1024))
    mx.eval(weights, x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    product = PlainProduct(CPU)
    for rows in weights:
        x = product(x, rows)
    mx.eval(x)
    assert mx.get_peak_memory() - before <= 3 * 2**22


def test_a_fused_linear_map_is_given_weights_of_any_layout() -> None:
    """Such as those that a caller puts in their place."""
    fused = FusedLinear([nn.Linear(48, 64, bias=False)], ["o_proj"], CPU)
    x, weight = mx.random.normal((9, 48)), mx.random.normal((64, 48))
    for held in (weight.T, mx.contiguous(weight.T)):
        fused.weight = held
        assert_close(fused(x), to_numpy(x) @ to_numpy(weight).T)
