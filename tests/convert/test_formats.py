"""A config that disagrees with its tensors is refused: nothing that could change the weights is left aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxqwen.errors import UnsupportedFormatError
from mlxqwen.files.config import AffineQuantization, ModelConfig
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


def listed_notes(source: Source) -> list[str]:
    """What planning says of the list of modules that are not quantized."""
    return [note for note in make_plan(source.write().folder, Options()).notes if "modules_to_not_convert" in note]


@pytest.mark.parametrize(
    "name",
    [
        QUERY,
        "model.layers.0",
        "q_proj",
        "self_attn.q_proj",
        r"model\.layers\.\d+\.self_attn\.q_proj",
        "model.layers.0.*",
        "re:.*q_proj",
        "*q_proj",
        "model.language_model.layers.0.self_attn",
        r"model\.language_model\.layers\.0\..*",
    ],
)
def test_fp8_that_is_listed_is_read_as_it_is_stored(tmp_path: Path, name: str) -> None:
    (note,) = listed_notes(listed(tmp_path, [name]))
    assert "stored quantized and read as such" in note
    assert QUERY in note or "layers.0.self_attn" in note


def test_experts_that_are_listed_as_not_converted(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj"
    (note,) = listed_notes(listed(tmp_path, [name]))
    assert note.endswith(f"lists them: {name}")


def test_floats_that_are_not_listed_are_read_as_floats(tmp_path: Path) -> None:
    source = listed(tmp_path, ["lm_head"])
    plain = make_source(tmp_path / "plain", "bf16", MOE)
    del source.stored[f"{QUERY}.weight_scale_inv"]
    source.stored[f"{QUERY}.weight"] = plain.stored[f"{QUERY}.weight"]
    (note,) = listed_notes(source)
    assert note.endswith(f"does not list them: {QUERY} (BF16)")
    convert(source.folder, tmp_path / "out", bits=16, dtype="float32")
    assert plain.meaning[QUERY].tobytes() in (tmp_path / "out/model.safetensors").read_bytes()
    for name in (
        QUERY,
        "model.layers.0.self_attn",
        ".*q_proj",
        "*.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
    ):
        assert f"{QUERY} (BF16)" not in "".join(listed_notes(listed_again(source, name)))


def listed_again(source: Source, name: str) -> Source:
    source.config["quantization_config"]["modules_to_not_convert"] = ["lm_head", name]
    return source


def test_lists_as_they_are_published(tmp_path: Path) -> None:
    names = ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert listed_notes(listed(tmp_path, names)) == []
    # "q" is the beginning of no word; nothing that the model has is named
    assert listed_notes(listed(tmp_path, ["model.layers.0.self_attn.q", "model.layers.00", "vision_model"])) == []


@pytest.mark.parametrize("entry", ["(a+)+$" * 20, "re:(?!x).*", "(", "x" * 5000 + "*", "((((a?){30}){30}){30}){30}"])
def test_expressions_that_are_not_read_are_told(tmp_path: Path, entry: str) -> None:
    notes = listed_notes(listed(tmp_path, [entry, QUERY]))
    assert len(notes) == 1


@pytest.mark.parametrize("form", ["fp8-tensor", "fp8-channel", "fp8"])
@pytest.mark.parametrize(("place", "key"), [("config.json", "ignore"), ("hf_quant_config.json", "exclude_modules")])
def test_modelopt_fp8(tmp_path: Path, form: str, place: str, key: str) -> None:
    source = make_source(tmp_path / "in", form)
    algorithm = {"fp8-tensor": "FP8", "fp8-channel": "FP8_PER_CHANNEL_PER_TOKEN", "fp8": "FP8_PB_WO"}[form]
    del source.config["quantization_config"]
    section = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", key: ["lm_head", "model.layers.*.mlp.gate*"]}
    for name in list(source.stored):
        stem, _, word = name.rpartition(".")
        if word == "weight_scale_inv":  # ModelOpt's blocks keep an axis for what is within them
            dtype, scales = source.stored.pop(name)
            source.stored[f"{stem}.weight_scale"] = (dtype, scales.reshape(scales.shape[0], 1, scales.shape[1], 1))
    source.stored[f"{QUERY}.input_scale"] = ("F32", np.ones((), np.float32))
    source.stored["model.layers.0.self_attn.k_proj.k_scale"] = ("F32", np.ones((1,), np.float32))
    if place == "config.json":
        source.config["quantization_config"] = {"quant_method": "modelopt", **section}
    source.write()
    if place != "config.json":
        (source.folder / place).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": section}))
    report = convert(source.folder, tmp_path / "out", bits=16, dtype="float32", workers=1)
    assert report.source_format == f"ModelOpt {algorithm}"
    assert any("left out 2 scales" in note and "input_scale, k_scale" in note for note in report.notes)
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert all(source.meaning[name].tobytes() in written for name in source.meaning)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_fbgemm_fp8(tmp_path: Path, dtype: str) -> None:
    """transformers' FbgemmFp8Linear: E4M3 `weight`, `weight_scale` `[out, 1]`, and a bound of the activations."""
    source = make_source(tmp_path / "in", "fp8-channel")
    source.config["quantization_config"] = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head"],
    }
    for name, (_, scales) in list(source.stored.items()):
        if name.endswith("weight_scale") and dtype == "F32":
            source.stored[name] = ("F32", (scales.astype(np.uint32) << 16).view(np.float32).reshape(-1, 1))
    assert source.stored[f"{QUERY}.weight_scale"][1].shape == (128, 1)
    source.stored[f"{QUERY}.input_scale_ub"] = ("F32", np.full(1, 1200, np.float32))
    report = convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32", workers=1)
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert all(source.meaning[name].tobytes() in written for name in source.meaning)
    assert report.source_format == "FP8"
    assert list(report.notes) == [
        "left out 1 scale of activations or of a cache (input_scale_ub): neither is quantized by them here"
    ]


@pytest.mark.parametrize("form", ["fp8-channel", "fp8-tensor"])
def test_naive_quantized_fp8(tmp_path: Path, form: str) -> None:
    """compressed-tensors' oldest packing: the same tensors as `float-quantized`."""
    source = make_source(tmp_path / "in", form)
    source.config["quantization_config"]["format"] = "naive-quantized"
    report = convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32", workers=1)
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert all(source.meaning[name].tobytes() in written for name in source.meaning)
    assert (report.source_format, list(report.notes)) == (f"compressed-tensors FP8, scales by {form[4:]}", [])


@pytest.mark.parametrize(("kind", "bits"), [("int", 8), ("int", 4), ("float", 4)])
def test_naive_quantized_otherwise_is_refused(tmp_path: Path, kind: str, bits: int) -> None:
    source = make_source(tmp_path / "in", "fp8-channel")
    source.config["quantization_config"]["format"] = "naive-quantized"
    weights_of(source).update(type=kind, num_bits=bits)
    with pytest.raises(UnsupportedFormatError, match="compressed-tensors naive-quantized"):
        make_plan(source.write().folder, Options())


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A8_AWQ", "MIXED_PRECISION", None, 5])
def test_what_modelopt_writes_and_is_not_read(tmp_path: Path, algorithm: object) -> None:
    source = make_source(tmp_path / "in", "fp8")
    source.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algorithm}
    with pytest.raises(UnsupportedFormatError, match=f"ModelOpt {algorithm}"):
        make_plan(source.write().folder, Options())


@pytest.mark.parametrize(
    ("file", "form", "section"),
    [
        ("quantize_config.json", "gptq", {"bits": 4, "group_size": 64, "desc_act": False, "sym": False}),
        ("quantize_config.json", "gptq8", {"bits": 8, "group_size": 64, "quant_method": "gptq"}),
        ("quantize_config.json", "awq", {"bits": 4, "group_size": 64, "quant_method": "awq", "zero_point": True}),
        ("quant_config.json", "awq", {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_what_is_said_in_a_file_of_its_own(tmp_path: Path, file: str, form: str, section: dict[str, Any]) -> None:
    source = make_source(tmp_path / "in", form)
    del source.config["quantization_config"]
    source.write()
    (source.folder / file).write_text(json.dumps(section))
    report = convert(source.folder, tmp_path / "out", bits=16, dtype="float32")
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert all(source.meaning[name].tobytes() in written for name in source.meaning)
    assert report.source_format.startswith(form[:3].upper())
    assert not (tmp_path / "out" / file).exists()
    assert ModelConfig.from_folder(source.folder).foreign_quantization == form.removesuffix("8")


def test_a_file_that_is_left_over_says_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (source.folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64}))
    assert ModelConfig.from_folder(source.folder).foreign_quantization is None
    assert make_plan(source.folder, Options()).source.name == "float"


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8")
    exponents: dict[str, Any] = {}
    for name in list(source.stored):
        if name.endswith("weight_scale_inv"):
            scales = source.stored[name][1]
            exponents[name] = np.random.default_rng(len(exponents)).integers(110, 135, scales.shape).astype(np.uint8)
            source.stored[name] = ("F8_E8M0", exponents[name])
    convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32")
    written = (tmp_path / "out/model.safetensors").read_bytes()
    for name, found in exponents.items():
        codes: Any = source.stored[name.replace("weight_scale_inv", "weight")][1]
        powers: Any = np.exp2(found.astype(np.float64) - 127).astype(np.float32)
        assert encoders.decode_fp8(codes, powers, (128, 128)).tobytes() in written


def test_a_power_of_two_that_is_none(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8")
    source.stored[f"{QUERY}.weight_scale_inv"] = ("F8_E8M0", np.full((1, 1), 255, np.uint8))
    with pytest.raises(SourceError, match=r"q_proj\.weight_scale_inv: scale \[0, 0\] is nan"):
        convert(source.write().folder, tmp_path / "out")


def test_one_scale_where_the_config_says_blocks(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8", {**DENSE, "hidden_size": 256})
    codes, scales = encoders.encode_fp8(numbers(QUERY, (128, 256)), None)
    source.stored[f"{QUERY}.weight"] = ("F8_E4M3", codes)
    source.stored[f"{QUERY}.weight_scale_inv"] = ("F32", scales.reshape(()).astype(np.float32))
    convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32")
    expected = encoders.decode_fp8(codes, scales.reshape(1, 1).astype(np.float32), (128, 256))
    assert expected.tobytes() in (tmp_path / "out/model.safetensors").read_bytes()


DYNAMIC = "model.layers.0.self_attn.q_proj"


def test_gptq_with_bits_of_its_own_for_some_modules(tmp_path: Path) -> None:
    """As GPTQModel writes them: `dynamic` names modules by expressions, and a head is quantized only by its word."""
    source = make_source(tmp_path / "in", "gptq")
    for name, shape in ((DYNAMIC, (128, 128)), ("lm_head", (192, 128))):
        grouped = encoders.quantize_grouped(numbers(name, shape), 8, 32)
        grouped = Grouped(grouped.codes, np.maximum(grouped.zeros, 1), grouped.scales, grouped.groups)
        source.stored.pop(f"{name}.weight", None)
        dtypes = {np.dtype(np.int32): "I32", np.dtype(np.float16): "F16"}
        for word, array in encoders.encode_gptq(grouped, 8, zero_offset=1).items():
            source.stored[f"{name}.{word}"] = (dtypes[array.dtype], array)
        source.meaning[name] = grouped.weight
    source.write()
    with pytest.raises(SourceError, match="qweight has shape"):
        make_plan(source.folder, Options())
    override = {"bits": 8, "group_size": 32}
    source.config["quantization_config"]["dynamic"] = {r"+:.*\.0\.self_attn\.q_proj$": override, "lm_head": override}
    plan = make_plan(source.write().folder, Options())
    found = {entry.module.path: (entry.method, entry.target) for entry in plan.modules}
    assert found[DYNAMIC] == found["lm_head"] == ("repack", AffineQuantization(32, 8))
    assert found["model.layers.1.self_attn.q_proj"] == ("repack", AffineQuantization(64, 4))
    convert(source.folder, tmp_path / "out", bits=16, dtype="float32")
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert all(source.meaning[name].tobytes() in written for name in source.meaning)


def test_gptq_of_other_bits_by_dynamic_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "gptq")
    source.config["quantization_config"]["dynamic"] = {"q_proj": {"bits": 2}}
    source.stored[f"{QUERY}.qweight"] = ("I32", np.zeros((8, 128), np.int32))
    with pytest.raises(
        UnsupportedFormatError, match=r"q_proj\.qweight: the weights are in GPTQ 2-bit \(by GPTQModel's dynamic"
    ):
        make_plan(source.write().folder, Options())


def test_the_first_gptq_format_can_say_a_zero_beyond_the_codes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "gptq")
    source.stored[f"{QUERY}.qzeros"] = ("I32", np.full_like(source.stored[f"{QUERY}.qzeros"][1], -1))
    convert(source.write().folder, tmp_path / "out", bits=16, dtype="float32")
    written = (tmp_path / "out/model.safetensors").read_bytes()
    grouped = source.codes[QUERY]
    expected = Grouped(grouped.codes, np.full_like(grouped.zeros, 16), grouped.scales, grouped.groups).weight
    assert expected.tobytes() in written
