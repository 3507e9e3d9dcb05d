"""The fingerprint: another model has another, and the weights are not read for it."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxqwen.cache.fingerprint import SAMPLE_BYTES, _sample, model_fingerprint
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.conftest import random_model


def parameters(model: Qwen3ForCausalLM) -> list[tuple[str, mx.array]]:
    return cast(Any, tree_flatten)(model.parameters())


def test_the_same_weights_have_the_same_fingerprint() -> None:
    assert model_fingerprint(random_model()) == model_fingerprint(random_model())


def test_each_parameter_counts() -> None:
    model = random_model()
    first, seen = model_fingerprint(model), set()
    for name, array in parameters(model):
        model.load_weights([(name, array + 0.001)], strict=False)
        seen.add(model_fingerprint(model))
        model.load_weights([(name, array)], strict=False)
    assert len(seen) == len(parameters(model))
    assert first not in seen
    assert model_fingerprint(model) == first


def test_another_dtype_quantization_and_shape_count() -> None:
    def quantized(bits: int) -> Qwen3ForCausalLM:
        model = random_model()
        nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, module: isinstance(module, nn.Embedding))
        return model

    half = random_model()
    half.update(tree_map(lambda array: array.astype(mx.bfloat16), half.parameters()))
    models = [random_model(), half, quantized(8), quantized(4), random_model(vocab_size=98), random_model(context=65)]
    assert len({model_fingerprint(model) for model in models[:5]}) == 5
    # a longer context alone changes no key or value
    assert model_fingerprint(models[5]) == model_fingerprint(models[0])


@pytest.mark.parametrize(
    "shape", [(1,), (1000,), (1025,), (4096, 4096), (3, 100_000), (100_000, 3), (128, 70, 90), (2, 3, 5, 7), ()]
)
def test_a_sample_is_bounded_and_covers_the_whole(shape: tuple[int, ...]) -> None:
    array = mx.zeros(shape, dtype=mx.float32)
    sample = _sample(array)
    assert sample.nbytes <= SAMPLE_BYTES
    assert sample.nbytes >= min(array.nbytes, SAMPLE_BYTES // 2 ** (1 + len(shape)))
    strides = [-(-whole // some) for whole, some in zip(array.shape, sample.shape, strict=True)]
    assert all(
        (some - 1) * step < whole <= some * step + step
        for whole, some, step in zip(array.shape, sample.shape, strides, strict=True)
    )


def test_the_weights_are_not_read() -> None:
    model = random_model(vocab_size=200_000)
    mx.eval(model.parameters())
    count = len(parameters(model))
    before = mx.get_active_memory()
    assert before > 50_000_000
    mx.reset_peak_memory()
    model_fingerprint(model)
    # MLX counts what it allocates: twice the samples, and nothing as large as a weight
    assert mx.get_peak_memory() - before <= 3 * count * SAMPLE_BYTES
