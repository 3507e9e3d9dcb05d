"""Products of many rows with dequantized weights: the same numbers as with packed ones, in little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.cache import make_cache
from mlxqwen.device import NEVER, Device
from mlxqwen.model import blocks, cores, dense_product
from mlxqwen.model.dense_product import Packed, for_codes, scaled_codes
from mlxqwen.model.linear import quantized_product
from mlxqwen.model.loading import load_model
from mlxqwen.model.moe import FusedSwitchLinear
from tests.test_fusion import CPU, MODELS, folder_of
from tests.tiny_checkpoints import prompt
from tests.tolerance import assert_close

FAST = Device("a CPU", is_gpu=False, memory=1 << 34, usable_memory=1 << 34, has_openblas=True)
FASTEST = replace(FAST, has_small_kernels=True)
FROM = FAST.dense_from()


@pytest.fixture
def dense_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of weights that are dequantized for a product from here on, small ones too."""
    shapes: list[tuple[int, ...]] = []

    def recorded(*arguments: Any) -> mx.array:
        dense = scaled_codes(*arguments)
        shapes.append(dense.shape)
        return dense

    monkeypatch.setattr(dense_product, "scaled_codes", recorded)
    monkeypatch.setattr(dense_product, "_LEAST", 1)
    return shapes


def packed(rows: int, columns: int, group_size: int, bits: int) -> Packed:
    weight, scales, biases = mx.quantize(mx.random.normal((rows, columns), key=mx.random.key(1)), group_size, bits)
    return weight, scales, biases


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_both_ways_give_the_same_numbers(
    bits: int, group_size: int, dense_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 20 * 256)
    weights = packed(70, 256, group_size, bits)
    for rows in (1, FROM - 1, FROM, 3 * FROM + 1):
        x = mx.random.normal((rows, 256), key=mx.random.key(2))
        expected = mx.quantized_matmul(x, *weights, True, group_size, bits)
        dense_shapes.clear()
        assert_close(quantized_product(x, weights, group_size, bits, FROM), expected)
        assert dense_shapes == ([] if rows < FROM else [(17, 256), (18, 256)] * 2)
    assert_close(quantized_product(x, weights, group_size, bits), expected)  # without OpenBLAS


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_scaled_codes_are_those_of_mlx(bits: int, group_size: int) -> None:
    weight, scales, _ = packed(7, 256, group_size, bits)
    expected = mx.dequantize(weight, scales, mx.zeros_like(scales), group_size, bits)
    found, unit = scaled_codes(weight, scales, group_size, bits), for_codes(mx.eye(256), bits)
    assert mx.array_equal(found @ unit.T, expected)


def test_small_products_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX does for each step of dequantizing would take longer than the product."""
    monkeypatch.setattr(dense_product, "scaled_codes", lambda *_: pytest.fail("dequantized"))
    quantized_product(mx.zeros((2, 256)), packed(256, 256, 64, 4), 64, 4, 1)
    with pytest.raises(pytest.fail.Exception):
        quantized_product(mx.zeros((4, 256)), packed(256, 256, 64, 4), 64, 4, 1)


def test_blocks_of_matrices_of_which_one_is_twice_as_large_are_equal() -> None:
    """So that MLX uses the memory of one for the other: those of an expert of the 30B."""
    for at_once in (1, 2, 3):
        small, large = (blocks._cuts(rows, columns, at_once) for rows, columns in ((2048, 768), (1536, 2048)))
        sizes = [{(cut.stop - cut.start) * columns for cut in cuts} for cuts, columns in ((small, 768), (large, 2048))]
        if at_once < 3:
            assert sizes[0] == sizes[1] == {2048 * 768 // 2}
        assert all(cut.start % 64 == 0 for cut in (*small, *large))
        assert [small[0].start, small[-1].stop, large[-1].stop] == [0, 2048, 1536]


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 70])
def test_blocks_are_shared_among_cores(
    rows: int, dense_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_LEAST", 1)
    monkeypatch.setattr(blocks, "_BLOCK", 10 * 256)
    used: list[int] = []
    on_core = cores.on_core

    def recorded(core: int) -> Any:
        used.append(core)
        return on_core(core)

    monkeypatch.setattr(blocks, "on_core", recorded)
    weights, x = packed(rows, 256, 64, 4), mx.random.normal((5, 256), key=mx.random.key(2))
    product = dense_product.dense_product(x, weights, 64, 4, 3)
    assert_close(product, mx.quantized_matmul(x, *weights, True, 64, 4))
    at_once = min(3, rows)
    assert used == list(range(at_once)) * (len(used) // at_once)
    assert sum(height for height, _ in dense_shapes) == rows
    assert max(height for height, _ in dense_shapes) <= 10


def test_other_dtypes_and_axes_stay_packed(dense_shapes: list[tuple[int, ...]]) -> None:
    weights = packed(64, 64, 32, 4)
    quantized_product(mx.zeros((2, FROM, 64)), weights, 32, 4, 1)
    half = (weights[0], weights[1].astype(mx.float16), weights[2].astype(mx.float16))
    quantized_product(mx.zeros((FROM, 64), dtype=mx.float16), half, 32, 4, 1)
    assert dense_shapes == []


def test_only_openblas_on_a_cpu_makes_it_worth_while() -> None:
    for bits in (2, 4, 8, 32):
        assert FASTEST.dense_from(bits) < FAST.dense_from(bits) < FAST.dense_from(3) == FASTEST.dense_from(6) < NEVER
    assert CPU.dense_from() == NEVER
    assert Device("a GPU", is_gpu=True, memory=1, usable_memory=1, has_openblas=True).dense_from() == NEVER


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_logits(
    tmp_path: Path, name: str, count: int, dense_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in chunks, long enough for eight rows an expert, and a batch of ten rows that decodes."""
    monkeypatch.setattr(cores, "_LEAST", 1)
    by_expert: list[int] = []
    of_expert = FusedSwitchLinear.of_expert

    def recorded(self: FusedSwitchLinear, x: mx.array, expert: int) -> mx.array:
        by_expert.append(expert)
        return of_expert(self, x, expert)

    monkeypatch.setattr(FusedSwitchLinear, "of_expert", recorded)
    folder = folder_of(tmp_path, *MODELS[name])
    ids = mx.array([prompt(20, 96, seed) for seed in range(10)])
    found, expected = [
        [model(ids[:, :19], cache), model(ids[:, 19:], cache)]
        for model in (load_model(folder, device=replace(FAST, cores=count)), load_model(folder, device=CPU))
        for cache in [make_cache(model, batch_size=10)]
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    assert bool(dense_shapes) == (MODELS[name][1] is not None)
    assert bool(by_expert) == name.startswith("MoE")


@pytest.mark.slow
def test_dequantized_weights_are_held_a_block_at_a_time() -> None:
    """However many products are asked for at once: without care, all 24 matrices of 2 MiB would be there."""
    weights = [packed(512, 1024, 64, 4) for _ in range(24)]
    back = [packed(1024, 512, 64, 4) for _ in range(24)]
    mx.eval(weights, back)
    x = mx.random.normal((64, 1024))
    mx.eval(x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for down, up in zip(weights, back, strict=True):
        x = quantized_product(quantized_product(x, down, 64, 4, FROM), up, 64, 4, FROM)
    mx.eval(x)
    assert mx.get_peak_memory() - before <= 3 * 2**21 + 2**20
