"""A config that disagrees with its tensors is refused: nothing that could change the weights is left aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxqwen_convert import convert
from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.plan import Options, make_plan
from tests.convert import encoders
from tests.convert.checkpoints import DENSE, MOE, Source, make_source, numbers, write_safetensors
from tests.convert.encoders import Array, Grouped

QUERY = "model.layers.0.self_attn.q_proj"


def plan_error(source: Source) -> str:
    """What planning says against a source."""
    with pytest.raises(SourceError) as raised:
        make_plan(source.write().folder, Options())
    return str(raised.value)


def weights_of(source: Source) -> dict[str, Any]:
    section: dict[str, Any] = source.config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return section


def reorder(source: Source, *, symmetric: bool) -> Grouped:
    """Give the query projection inputs out of order, with a `weight_g_idx` that says so."""
    groups = np.random.default_rng(0).permutation(np.arange(128) // 64)
    grouped = encoders.quantize_grouped(numbers(QUERY, (128, 128)), 4, 64, symmetric=symmetric, groups=groups)
    for word, array in encoders.encode_compressed_tensors(grouped, 4, symmetric=symmetric).items():
        source.stored[f"{QUERY}.{word}"] = (source.stored[f"{QUERY}.{word}"][0], array)
    source.stored[f"{QUERY}.weight_g_idx"] = ("I32", groups.astype(np.int32))
    return grouped


def test_reordered_inputs_of_a_dtype_that_nothing_writes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "int4")
    grouped = reorder(source, symmetric=True)
    source.stored[f"{QUERY}.weight_g_idx"] = ("I64", grouped.groups)
    assert f"{QUERY}.weight_g_idx has dtype I64, expected I32" in plan_error(source)


def test_reordered_inputs_that_are_missing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "int4", "int4")
    weights_of(source)["actorder"] = "group"
    assert "weight_g_idx is missing" in plan_error(source)
    source = make_source(tmp_path / "gptq", "gptq")
    source.config["quantization_config"]["desc_act"] = True
    make_plan(source.write().folder, Options())
    del source.stored[f"{QUERY}.g_idx"]
    assert f"{QUERY}: g_idx is missing" in plan_error(source)


def test_an_order_of_inputs_that_is_not_used(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "int4")
    source.stored[f"{QUERY}.weight_g_idx"] = ("I32", np.full(128, -1, np.int32))
    plan = make_plan(source.write().folder, Options())
    assert {entry.method for entry in plan.modules if entry.module.path == QUERY} == {"repack"}


@pytest.mark.parametrize("form", ["int4-asymmetric", "int8-asymmetric"])
def test_zero_points_of_symmetric_weights(tmp_path: Path, form: str) -> None:
    source = make_source(tmp_path / "in", form)
    weights_of(source)["symmetric"] = True
    assert "zero_point has zero points, config.json says that the weights are symmetric" in plan_error(source)


@pytest.mark.parametrize("rows", [64, 12])
def test_zero_points_that_say_nothing_new(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen_convert.formats._ZERO_POINTS_AT_ONCE", 3)
    config = {**DENSE, "head_dim": rows, "num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 96}
    source = make_source(tmp_path / "in", "int4", config, group_size=32)
    name = "model.layers.0.self_attn.k_proj"
    zeros = np.ascontiguousarray(encoders.pack_words(np.full((3, rows), 8), 4).T)
    source.stored[f"{name}.weight_zero_point"] = ("I32", zeros)
    make_plan(source.write().folder, Options())
    zeros[-1, 2] ^= 1 << (rows % 8 or 8) * 4 - 2  # of the last row, where a word may be cut short
    assert f"{name}.weight_zero_point has zero points" in plan_error(source)


def test_a_shape_that_is_not_the_weights(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "int4")
    source.stored[f"{QUERY}.weight_shape"] = ("I64", np.array([1, 2]))
    assert f"{QUERY}.weight_shape: says [1, 2], expected [128, 128]" in plan_error(source)
    source.stored[f"{QUERY}.weight_shape"] = ("I64", np.array([128, 128, 1]))
    assert "weight_shape has shape [3], expected [2]" in plan_error(source)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what the system read")
def test_an_order_of_inputs_larger_than_the_inputs_is_not_read(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "gptq")
    del source.stored[f"{QUERY}.g_idx"]
    source.write()
    huge = {f"{QUERY}.g_idx": ("I32", np.zeros(128, np.int32))}
    write_safetensors(source.folder / "model-00002-of-00002.safetensors", huge)
    (source.folder / "model.safetensors").rename(source.folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(source.stored, "model-00001-of-00002.safetensors")
    weight_map[f"{QUERY}.g_idx"] = "model-00002-of-00002.safetensors"
    (source.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    header = json.dumps({f"{QUERY}.g_idx": {"dtype": "I32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}).encode()
    with (source.folder / "model-00002-of-00002.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    before = bytes_read()
    with pytest.raises(SourceError, match=r"g_idx has shape \[268435456\], expected \[128\]"):
        make_plan(source.folder, Options())
    assert bytes_read() - before < 1 << 24


def bytes_read() -> int:
    """What this process has read so far, from disk or from the system's cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_rows_that_do_not_fill_a_word(tmp_path: Path, form: str) -> None:
    config = {**DENSE, "head_dim": 12, "num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 96}
    source = make_source(tmp_path / "in", "bf16", config)
    source.config["quantization_config"] = {"quant_method": form, "bits": 4, "group_size": 32}
    for name in [name.removesuffix(".weight") for name, (_, array) in source.stored.items() if array.ndim == 2]:
        if name not in ("model.embed_tokens", "lm_head"):
            rows, width = source.stored.pop(f"{name}.weight")[1].shape
            packed = (width, rows // 8) if form == "awq" else (width // 8, rows)
            tensors: dict[str, Array] = {
                "qweight": np.zeros(packed, np.int32),
                "qzeros": np.zeros((width // 32, rows // 8), np.int32),
            }
            source.stored |= {f"{name}.{word}": ("I32", array) for word, array in tensors.items()}
            source.stored[f"{name}.scales"] = ("F16", np.ones((width // 32, rows), np.float16))
    assert "k_proj: has 12 rows, expected a multiple of 8" in plan_error(source)


def listed(tmp_path: Path, names: list[str], config: dict[str, Any] = MOE) -> Source:
    source = make_source(tmp_path / "in", "fp8", config)
    source.config["quantization_config"]["modules_to_not_convert"] = names
    return source


@pytest.mark.parametrize("name", [QUERY, "model.layers.0", "q_proj", "self_attn.q_proj"])
def test_fp8_that_is_listed_as_not_converted(tmp_path: Path, name: str) -> None:
    assert f"{QUERY}: is stored as FP8, config.json lists it" in plan_error(listed(tmp_path, [name]))


def test_experts_that_are_listed_as_not_converted(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj"
    assert f"{name}: is stored as FP8, config.json lists it" in plan_error(listed(tmp_path, [name]))


def test_floats_that_are_not_listed(tmp_path: Path) -> None:
    source = listed(tmp_path, ["lm_head"])
    plain = make_source(tmp_path / "plain", "bf16", MOE)
    del source.stored[f"{QUERY}.weight_scale_inv"]
    source.stored[f"{QUERY}.weight"] = plain.stored[f"{QUERY}.weight"]
    assert f"{QUERY}: is stored as BF16, expected FP8" in plan_error(source)
    source.config["quantization_config"]["modules_to_not_convert"] += [QUERY]
    make_plan(source.write().folder, Options())


def test_lists_as_they_are_published(tmp_path: Path) -> None:
    names = ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    source = listed(tmp_path, names).write()
    convert(source.folder, tmp_path / "out")
    # "q" is the beginning of no word, "proj" the end of none
    make_plan(listed(tmp_path, ["model.layers.0.self_attn.q", "proj", "model.layers.00"]).write().folder, Options())


def test_the_first_gptq_format_can_say_a_zero_beyond_the_codes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "gptq")
    source.stored[f"{QUERY}.qzeros"] = ("I32", np.full_like(source.stored[f"{QUERY}.qzeros"][1], -1))
    convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32")
    written = (tmp_path / "out/model.safetensors").read_bytes()
    grouped = source.codes[QUERY]
    expected = Grouped(grouped.codes, np.full_like(grouped.zeros, 16), grouped.scales, grouped.groups).weight
    assert expected.tobytes() in written
