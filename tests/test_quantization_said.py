"""A config that speaks of a quantization over weights that have none: how they are stored decides, with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.errors import MlxqwenError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.footprint import measure
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from mlxqwen_convert.plan import Options, make_plan
from tests.convert import checkpoints
from tests.convert.checkpoints import make_source
from tests.tiny_checkpoints import DENSE, make_weights, prompt, write_folder

IDS = mx.array([prompt(7, 96)])
WEIGHTS: dict[str, Any] = dict(make_weights(DENSE))
PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
SECTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "FP8": ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, " (fp8)"),
    "AWQ": ("quantization_config", {"quant_method": "awq", "bits": 4, "group_size": 128}, " (awq)"),
    "GPTQ": ("quantization_config", {"quant_method": "gptq", "bits": 4, "desc_act": True}, " (gptq)"),
    "ModelOpt": ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, " (modelopt)"),
    "compressed-tensors": (
        "quantization_config",
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": PACKED}}},
        " (compressed-tensors)",
    ),
    "compressed-tensors, by its older key": ("compression_config", {"quant_method": "compressed-tensors"}, ""),
    "a method that nobody knows": ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, ""),
    "a method that steers a terminal": ("quantization_config", {"quant_method": "\x1b[31mx"}, r" (\x1b[31mx)"),
    "a method that is no text": ("quantization_config", {"quant_method": {"a": 1}}, ""),
    "MLX": ("quantization", {"bits": 4, "group_size": 64, "lm_head": {"bits": 8, "group_size": 32}}, " (MLX)"),
    "MLX's, which is not run": ("quantization", {"mode": "mxfp4", "bits": 4, "group_size": 32}, " (MLX)"),
    "MLX, in the other's place": ("quantization_config", {"bits": 4, "group_size": 64}, ""),
    "a section of nonsense": ("quantization_config", {"quant_method": "fp8", "weight_block_size": "big"}, " (fp8)"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[mx.array, bytes]:
    """The logits of the weights without a word of a quantization, and their conversion."""
    folder = write_folder(tmp_path_factory.mktemp("plain") / "in", DENSE, WEIGHTS)
    convert(folder, folder.parent / "out", bits=16, dtype="float16", workers=1)
    return load_model(folder, dtype="float32")(IDS), (folder.parent / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("case", SECTIONS)
def test_weights_that_are_all_floats_are_read_as_such(
    tmp_path: Path, case: str, plain: tuple[mx.array, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    key, section, form = SECTIONS[case]
    folder = write_folder(tmp_path / "in", {**DENSE, key: section}, WEIGHTS)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), plain[0])
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == 1
    assert notes[0].startswith(f"config.json says that the weights are quantized{form}")
    assert notes[0].endswith("none is: read as stored, in F32")
    found = measure(folder, check=True)
    assert (found.format, found.runs, list(found.notes)) == ("F32", True, notes)
    report = convert(folder, tmp_path / "out", bits=16, dtype="float16", workers=1)
    assert (report.source_format, list(report.notes)) == ("F32", notes)
    assert (tmp_path / "out/model.safetensors").read_bytes() == plain[1]
    assert (
        not {"quantization", "quantization_config", "compression_config"}
        & json.loads((tmp_path / "out/config.json").read_text()).keys()
    )


@pytest.mark.parametrize("file", ["quantize_config.json", "hf_quant_config.json"])
def test_a_file_beside_the_config_is_told_of_too(tmp_path: Path, file: str) -> None:
    folder = write_folder(tmp_path / "in", DENSE, WEIGHTS)
    (folder / file).write_text(json.dumps({"bits": 4, "quantization": {"quant_algo": "FP8"}}))
    assert [note.partition(" says")[0] for note in measure(folder).notes] == [file]


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_the_dtype_is_the_stored_one(tmp_path: Path, dtype: str, stored: str) -> None:
    source = make_source(tmp_path / "in", dtype)
    source.config |= {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float64"}
    plan = make_plan(source.write().folder, Options(bits=8))
    assert (plan.source.label, plan.dtype, {entry.method for entry in plan.modules}) == (
        stored,
        stored,
        {"copy", "quantize"},
    )
    assert f"in {stored}" in plan.notes[0]


def test_floats_of_several_dtypes_and_what_belongs_to_no_module(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "f16", {**checkpoints.DENSE, "tie_word_embeddings": True})
    source.config["quantization_config"] = {"quant_method": "fp8"}
    source.stored["model.norm.weight"] = ("F32", np.ones(128, np.float32))
    source.stored["model.layers.0.self_attn.k_proj.k_scale"] = ("F32", np.ones((), np.float32))
    source.stored["lm_head.weight"] = ("F8_E4M3", np.zeros((192, 128), np.uint8))  # not used: embeddings are the head
    found = measure(source.write().folder, check=True)
    assert found.runs
    assert found.notes[0].endswith("read as stored, in F16 and F32")


@pytest.mark.parametrize("word", ["weight_scale", "weight_scale_inv", "scales", "biases", "qzeros"])
def test_floats_with_scales_of_codes_stay_an_error(tmp_path: Path, word: str) -> None:
    weights = {**WEIGHTS, f"model.layers.0.mlp.up_proj.{word}": np.ones((1, 1), np.float32)}
    folder = write_folder(tmp_path / "in", {**DENSE, "quantization_config": {"quant_method": "fp8"}}, weights)
    with pytest.raises(MlxqwenError):
        make_plan(folder, Options())


@pytest.mark.parametrize("form", ["fp8", "awq", "gptq", "int4"])
def test_codes_without_scales_stay_an_error(tmp_path: Path, form: str) -> None:
    source = make_source(tmp_path / "in", form)
    for name in [name for name in source.stored if "scale" in name]:
        del source.stored[name]
    with pytest.raises(MlxqwenError, match=r"scale\w* is missing"):
        make_plan(source.write().folder, Options())


@pytest.mark.parametrize("form", ["fp8", "fp8-channel", "awq", "gptq", "int4"])
def test_one_module_of_floats_is_told_where_the_config_leaves_none_out(tmp_path: Path, form: str) -> None:
    source = make_source(tmp_path / "in", form)
    name = "model.layers.0.self_attn.q_proj"
    for stored in [stored for stored in source.stored if stored.startswith(f"{name}.")]:
        del source.stored[stored]
    source.stored[f"{name}.weight"] = ("F16", np.ones((128, 128), np.float16))
    plan = make_plan(source.write().folder, Options())
    assert f"stored unquantized and read as such, though config.json does not say so: {name} (F16)" in plan.source_notes
    section = source.config["quantization_config"]
    section |= {"modules_to_not_convert": [name], "ignore": [name]}
    plan = make_plan(source.write().folder, Options())
    assert not any("unquantized" in note and "q_proj" in note for note in plan.source_notes)


def test_files_that_change_are_looked_at_again(tmp_path: Path) -> None:
    config = {**DENSE, "quantization_config": {"quant_method": "fp8"}}
    folder = write_folder(tmp_path / "in", config, WEIGHTS)
    assert ModelConfig.from_folder(folder).foreign_quantization is None
    (folder / "model.safetensors").write_bytes(b"")
    assert ModelConfig.from_folder(folder).foreign_quantization == "fp8"
