"""Tensors that change nothing: biases of zeros and scales of activations are left out with a note, others refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.errors import CheckpointError, MlxqwenError
from mlxqwen.model.footprint import measure
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from tests.convert.checkpoints import DENSE as WIDE
from tests.convert.checkpoints import Source, make_source
from tests.tiny_checkpoints import DENSE, MOE, Experts, make_weights, prompt, write_folder

IDS = mx.array([prompt(7, 96)])
ZEROS = {
    "one": ["model.layers.0.self_attn.q_proj.bias"],
    "every module": [name.replace(".weight", ".bias") for name in make_weights(DENSE)],
    "under a prefix": ["module.model.layers.1.mlp.up_proj.bias"],
}


def bias_of(weights: dict[str, Any], name: str, value: float = 0.0) -> Any:
    shape = weights[name.replace(".bias", ".weight").removeprefix("module.")].shape
    return np.full(shape[:-1] or shape, value, np.float32)


@pytest.mark.parametrize("case", ZEROS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_biases_of_zeros_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, dtype: str) -> None:
    weights: dict[str, Any] = dict(make_weights(DENSE))
    expected = load_model(write_folder(tmp_path / "plain", DENSE, weights, dtype=dtype), dtype="float32")(IDS)
    biases = {name: bias_of(weights, name, -0.0 if name == ZEROS["one"][0] else 0.0) for name in ZEROS[case]}
    folder = write_folder(tmp_path / "in", DENSE, weights | biases, dtype=dtype)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)
    notes = [record.getMessage() for record in caplog.records]
    assert any(note.startswith(f"left out biases that are all zeros ({len(biases)})") for note in notes)
    assert set(notes) == set(measure(folder).notes)
    assert measure(folder).float_bytes == measure(tmp_path / "plain").float_bytes
    assert set(notes) <= set(convert(folder, tmp_path / "out", bits=16, dtype="float16", workers=1).notes)


@pytest.mark.parametrize("experts", ["separate", "stacked", "fused"])
def test_biases_of_experts(tmp_path: Path, experts: Experts) -> None:
    weights: dict[str, Any] = dict(make_weights(MOE, experts=experts))
    expected = load_model(write_folder(tmp_path / "plain", MOE, weights), dtype="float32")(IDS)
    for name in [name for name in weights if ".experts." in name or ".switch_mlp." in name]:
        bias = name.replace(".weight", ".bias") if name.endswith(".weight") else f"{name}_bias"
        weights[bias] = np.zeros(weights[name].shape[:-1], np.float32)
    folder = write_folder(tmp_path / "in", MOE, weights)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)
    convert(folder, tmp_path / "out", bits=16, dtype="float16", workers=1)


@pytest.mark.parametrize("value", [0.5, -1e-38, np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.norm.bias", "module.lm_head.bias"])
def test_other_biases_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    config = {**DENSE, "tie_word_embeddings": False}
    weights: dict[str, Any] = dict(make_weights(config))
    bias = bias_of(weights, name)
    bias[-1] = value
    folder = write_folder(tmp_path / "in", config, weights | {name: bias})
    for refused in (lambda: load_model(folder), lambda: measure(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="biases that are not zero") as caught:
            refused()
        assert name.removeprefix("module.") in caught.value.problem


def test_a_bias_of_nothing_stays_without_a_place(tmp_path: Path) -> None:
    weights = make_weights(DENSE) | {"visual.proj.bias": np.zeros(4, np.float32)}
    folder = write_folder(tmp_path / "in", DENSE, weights)
    for refused in (lambda: load_model(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(MlxqwenError, match=r"no place for: visual\.proj\.bias"):
            refused()


@pytest.mark.parametrize("form", ["gptq", "awq", "int4", "fp8", "fp8-tensor"])
def test_biases_beside_codes(tmp_path: Path, form: str) -> None:
    """As AutoGPTQ and optimum write them, for every layer that is quantized."""
    source = make_source(tmp_path / "in", form)
    at_zero = with_biases(source, lambda rows: np.zeros(rows, np.float16))
    report = convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32", workers=1)
    assert any(note.startswith(f"left out biases that are all zeros ({at_zero})") for note in report.notes)
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert all(source.meaning[name].tobytes() in written for name in source.meaning)
    with_biases(source, lambda rows: np.ones(rows, np.float16))
    with pytest.raises(CheckpointError, match=r"not zero.*: model\.layers\.0\.self_attn\.q_proj\.bias"):
        convert(source.write().folder, tmp_path / "other")


def with_biases(source: Source, make: Callable[[int], Any]) -> int:
    modules = [name for name in source.meaning if name.endswith("_proj")]
    for name in modules:
        source.stored[f"{name}.bias"] = ("F16", make(len(source.meaning[name])))
    return len(modules)


SCALES = ["k_proj.k_scale", "v_proj.v_scale", "k_scale", "v_scale", "q_scale", "attn.kv_scale", "q_proj.input_scale"]
SCALES += ["o_proj.output_scale", "prob_scale", "k_zero_point", "q_proj.input_zero_point"]


def test_scales_of_a_cache_beside_plain_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = make_weights(DENSE)
    expected = load_model(write_folder(tmp_path / "plain", DENSE, weights), dtype="float32")(IDS)
    scales = {f"model.layers.0.self_attn.{name}": np.ones(1, np.float32) for name in SCALES}
    folder = write_folder(tmp_path / "in", DENSE, weights | scales)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)
    (note,) = (record.getMessage() for record in caplog.records)
    assert note.startswith(f"left out {len(SCALES)} scales of activations or of a cache")


@pytest.mark.parametrize("form", ["fp8", "fp8-tensor", "gptq", "int8"])
def test_scales_of_a_cache_beside_codes(tmp_path: Path, form: str) -> None:
    source = make_source(tmp_path / "in", form, WIDE)
    source.stored |= {f"model.layers.0.self_attn.{name}": ("F32", np.ones((), np.float32)) for name in SCALES}
    report = convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32", workers=1)
    assert any(note.startswith(f"left out {len(SCALES)} scales") for note in report.notes)
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert all(source.meaning[name].tobytes() in written for name in source.meaning)
