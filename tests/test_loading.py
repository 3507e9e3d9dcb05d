from __future__ import annotations

import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlxqwen.device import Device
from mlxqwen.errors import (
    CheckpointError,
    ConfigError,
    InsufficientMemoryError,
    MlxqwenError,
    OptionError,
    UnsupportedFormatError,
)
from mlxqwen.files.checkpoint import Checkpoint, read_header
from mlxqwen.files.config import AffineQuantization, ModelConfig, Quantization
from mlxqwen.model import loading
from mlxqwen.model.footprint import cache_bytes, measure, size_up
from mlxqwen.model.loading import load_model, parse_dtype, prepare_model
from mlxqwen.model.moe import QuantizedSwitchLinear
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.checkpoint_arrays import arrays_of
from tests.sparse_checkpoints import RELEASES, write_sparse
from tests.tiny_checkpoints import (
    DENSE,
    MOE,
    Config,
    Experts,
    make_weights,
    prompt,
    published_shapes,
    write_folder,
    write_safetensors,
)
from tests.tolerance import assert_close

Weights = dict[str, NDArray[Any]]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
WIDE_DENSE: Config = {**DENSE, **WIDE}
WIDE_MOE: Config = {**MOE, **WIDE, "moe_intermediate_size": 128, "num_experts": 4}


def refusal(folder: Path, kind: type[MlxqwenError] = CheckpointError, **arguments: Any) -> str:
    """The message of the error that loading raises: one or two lines."""
    with pytest.raises(MlxqwenError) as caught:
        load_model(folder, **arguments)
    assert type(caught.value) is kind
    assert len(str(caught.value).split("\n")) <= 2
    return str(caught.value)


# Held to mlx-lm


@pytest.fixture(scope="module")
def mlx_lm_utils() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm import utils
    return utils


def convert(
    utils: ModuleType, folder: Path, config: Config, group_size: int, bits: int, predicate: Any = None
) -> tuple[Path, dict[str, Any]]:
    """What `mlx_lm.convert` writes for a tiny BF16 model, and its config."""
    source = write_folder(folder / "source", config, make_weights(config), dtype="BF16")
    model, loaded = utils.load_model(source)
    model, quantized = utils.quantize_model(model, loaded, group_size, bits, quant_predicate=predicate)
    utils.save_model(folder / "mlx", model)
    utils.save_config(quantized, folder / "mlx" / "config.json")
    return folder / "mlx", quantized


def assert_same_logits(utils: ModuleType, folder: Path) -> None:
    theirs, _ = utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    ours = load_model(folder, dtype="float32")
    for length in (5, 70):
        ids = mx.array([prompt(length, 96)])
        assert_close(ours(ids), theirs(ids), what=f"{length} tokens")


@pytest.mark.parametrize("config", [WIDE_DENSE, {**WIDE_DENSE, "tie_word_embeddings": False}, WIDE_MOE])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (6, 32), (5, 64), (4, 128), (4, 32), (3, 64), (2, 128)])
def test_quantized_folders_are_read_as_mlx_lm_reads_them(
    mlx_lm_utils: ModuleType, tmp_path: Path, config: Config, bits: int, group_size: int
) -> None:
    folder, _ = convert(mlx_lm_utils, tmp_path, config, group_size, bits)
    assert_same_logits(mlx_lm_utils, folder)


@pytest.mark.parametrize("config", [WIDE_DENSE, WIDE_MOE])
def test_modules_quantized_each_in_its_own_way(mlx_lm_utils: ModuleType, tmp_path: Path, config: Config) -> None:
    def predicate(path: str, _: Any) -> bool | dict[str, int]:
        if "layers.0" in path and path.endswith("down_proj"):
            return {"group_size": 32, "bits": 6}
        if path.endswith("v_proj"):
            return False
        return {"group_size": 128, "bits": 8} if "embed" in path or path.endswith("gate") else True

    folder, written = convert(mlx_lm_utils, tmp_path, config, 64, 4, predicate)
    assert written["quantization"]["model.embed_tokens"] == {"group_size": 128, "bits": 8}
    assert_same_logits(mlx_lm_utils, folder)
    written["quantization"]["model.layers.0.self_attn.v_proj"] = False  # as some converters write
    (folder / "config.json").write_text(json.dumps(written))
    assert_same_logits(mlx_lm_utils, folder)


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_mixed_recipes_write_null_for_the_default(mlx_lm_utils: ModuleType, tmp_path: Path, recipe: str) -> None:
    """As `mlx_lm.convert --quant-predicate RECIPE` does without a size of groups."""
    from mlx_lm.convert import mixed_quant_predicate_builder

    source = write_folder(tmp_path / "source", WIDE_DENSE, make_weights(WIDE_DENSE), dtype="BF16")
    model, loaded = mlx_lm_utils.load_model(source)
    predicate = mixed_quant_predicate_builder(recipe, model, None)
    model, quantized = mlx_lm_utils.quantize_model(model, loaded, None, int(recipe[6]), quant_predicate=predicate)
    mlx_lm_utils.save_model(tmp_path / "mlx", model)
    mlx_lm_utils.save_config(quantized, tmp_path / "mlx" / "config.json")
    written = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert written["model.layers.0.self_attn.v_proj"]["group_size"] is None
    assert_same_logits(mlx_lm_utils, tmp_path / "mlx")
    assert {written[f"model.layers.{n}.mlp.down_proj"]["bits"] for n in range(2)} == {int(recipe[6]), int(recipe[8])}


@pytest.mark.parametrize("mode", [{}, {"mode": None}, {"mode": "affine"}])
@pytest.mark.parametrize("bits", [{}, {"bits": None}, {"bits": 4}])
@pytest.mark.parametrize("group_size", [{}, {"group_size": None}, {"group_size": 64}])
def test_what_is_null_or_left_out_is_the_default(mode: Any, bits: Any, group_size: Any) -> None:
    """As `mx.quantize` takes it."""
    packed, scales, _ = mx.quantize(mx.zeros((8, 128)), group_size=None, bits=None)
    assert (packed.shape, scales.shape) == ((8, 128 * 4 // 32), (8, 128 // 64))
    section = {**mode, **bits, **group_size}
    found = ModelConfig.from_dict({**DENSE, "quantization": {"group_size": 32, "bits": 8, "lm_head": section}})
    assert found.quantization == Quantization(AffineQuantization(32, 8), {"lm_head": AffineQuantization(64, 4)})
    found = ModelConfig.from_dict({**DENSE, "quantization": section})
    assert found.quantization == Quantization(AffineQuantization(64, 4))


def test_what_no_group_divides_stays_as_it_is(mlx_lm_utils: ModuleType, tmp_path: Path) -> None:
    config = {**WIDE_DENSE, "intermediate_size": 96}
    folder, _ = convert(mlx_lm_utils, tmp_path, config, 64, 4)
    assert "model.layers.0.mlp.down_proj.scales" not in Checkpoint.open(folder).tensors
    assert_same_logits(mlx_lm_utils, folder)


def test_an_unquantized_mlx_folder(mlx_lm_utils: ModuleType, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", WIDE_MOE, make_weights(WIDE_MOE), dtype="BF16")
    model, config = mlx_lm_utils.load_model(source)
    mlx_lm_utils.save_model(tmp_path / "mlx", model)
    mlx_lm_utils.save_config(config, tmp_path / "mlx" / "config.json")
    assert_same_logits(mlx_lm_utils, tmp_path / "mlx")


# A folder of our own, quantized


def quantized_folder(folder: Path, config: Config = WIDE_DENSE, bits: int = 4, group_size: int = 64) -> Path:
    """Every matrix packed by `mx.quantize`."""
    weights: Weights = {}
    for name, array in make_weights(config, experts="stacked").items():
        if array.ndim == 1:
            weights[name] = array
            continue
        parts = mx.quantize(mx.array(array), group_size=group_size, bits=bits)
        module = name.removesuffix(".weight")
        weights |= {
            f"{module}.{part}": np.array(a) for part, a in zip(("weight", "scales", "biases"), parts, strict=True)
        }
    section = {"group_size": group_size, "bits": bits}
    return write_folder(folder, {**config, "quantization": section}, weights)


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_codes_stay_packed_and_everything_else_is_computed_in_one_dtype(tmp_path: Path) -> None:
    for dtype in (mx.float32, mx.bfloat16):
        model = load_model(quantized_folder(tmp_path / str(dtype), WIDE_MOE), dtype=dtype, fused=False)
        parameters = dict(tree_flatten(model.parameters()))
        assert {array.dtype for array in parameters.values()} == {mx.uint32, dtype}
        assert isinstance(model.model.layers[0].mlp.switch_mlp.up_proj, QuantizedSwitchLinear)
        assert measure(tmp_path / str(dtype)).weight_bytes(dtype) == sum(array.nbytes for array in parameters.values())


def test_quantized_weights_that_do_not_fit_their_config(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    message = refusal(edit_config(folder, quantization={"group_size": 64, "bits": 8}))
    assert "has shape [" in message
    assert "expected [" in message
    assert "embed_tokens" in message
    message = refusal(edit_config(folder, quantization={"group_size": 32, "bits": 4}))
    assert re.search(r"embed_tokens\.scales has shape \[96, 2\], expected \[96, 4\]", message)
    message = refusal(edit_config(folder, quantization={"group_size": 64, "bits": 4, "model.embed_tokens": False}))
    assert "model.embed_tokens is quantized, but config.json does not say how" in message
    assert "does not say how" in refusal(edit_config(folder, quantization=None))
    assert "bits" in refusal(edit_config(folder, quantization={"group_size": 64, "bits": 7}), ConfigError)


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    narrow = write_folder(tmp_path, {**DENSE, "quantization": {"group_size": 64, "bits": 4}}, make_weights(DENSE))
    weights = make_weights(DENSE) | {"model.embed_tokens.scales": np.ones((96, 1), dtype=np.float32)}
    write_safetensors(narrow / "model.safetensors", weights)
    assert "model.embed_tokens is 32 wide, which groups of 64 do not divide" in refusal(narrow)


def test_biases_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    arrays = {name: np.array(array) for name, array in arrays_of(Checkpoint.open(folder)).items()}
    del arrays["model.layers.1.mlp.up_proj.biases"]
    write_safetensors(folder / "model.safetensors", arrays)
    assert "tensors are missing: model.layers.1.mlp.up_proj.biases" in refusal(folder)


def test_a_config_that_speaks_of_quantization_where_there_is_none(tmp_path: Path) -> None:
    """mlx-lm leaves modules as they are where it cannot quantize them, and its config does not say which."""
    plain = load_model(write_folder(tmp_path / "plain", DENSE, make_weights(DENSE)))
    section = {"group_size": 64, "bits": 4}
    spoken = load_model(write_folder(tmp_path / "spoken", {**DENSE, "quantization": section}, make_weights(DENSE)))
    ids = mx.array([prompt(9, 96)])
    assert mx.array_equal(plain(ids), spoken(ids))


# Formats that are not run


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("fp8", "FP8"),
        ("awq", "AWQ"),
        ("gptq", "GPTQ"),
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
        ("new\x1b[31m", "new"),
    ],
)
def test_formats_are_named_from_the_config(tmp_path: Path, method: str, name: str) -> None:
    weights: Weights = {**make_weights(DENSE), "model.layers.0.mlp.up_proj.weight": np.zeros((48, 16), np.uint8)}
    folder = write_folder(tmp_path, {**DENSE, "quantization_config": {"quant_method": method}}, weights)
    message = refusal(folder, UnsupportedFormatError)
    assert f"the weights are in {name}" in message
    assert "\x1b" not in message


def as_fp8(weights: Weights) -> None:
    weights["model.layers.0.mlp.up_proj.weight_scale_inv"] = np.ones((1, 1), dtype=np.float32)
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), dtype=np.uint8)


def as_awq(weights: Weights) -> None:
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.up_proj.qweight"] = np.zeros((32, 6), dtype=np.int32)
    weights["model.layers.0.mlp.up_proj.qzeros"] = np.zeros((1, 6), dtype=np.int32)


def as_gptq(weights: Weights) -> None:
    as_awq(weights)
    weights["model.layers.0.mlp.up_proj.g_idx"] = np.zeros(32, dtype=np.int32)


def as_compressed(weights: Weights) -> None:
    weights["model.layers.0.mlp.up_proj.weight_packed"] = np.zeros((48, 4), dtype=np.int32)


@pytest.mark.parametrize(
    ("change", "name"), [(as_fp8, "FP8"), (as_awq, "AWQ"), (as_gptq, "GPTQ"), (as_compressed, "compressed-tensors")]
)
def test_formats_are_named_from_the_tensors(tmp_path: Path, change: Callable[[Weights], None], name: str) -> None:
    weights: Weights = dict(make_weights(DENSE))
    change(weights)
    folder = write_folder(tmp_path, DENSE, weights)
    message = refusal(folder, UnsupportedFormatError)
    assert f"the weights are in {name} form" in message
    assert "config.json does not say so" in message


def test_fp8_without_scales_is_named_wherever_it_stands(tmp_path: Path) -> None:
    weights: Weights = dict(make_weights(DENSE))
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), dtype=np.uint8)
    assert "the weights are in FP8 form" in refusal(write_folder(tmp_path, DENSE, weights), UnsupportedFormatError)


# Names, shapes, dtypes


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, "are missing: model.norm.weight"), (7, " and 2 more")],
)
def test_missing_tensors_are_named(tmp_path: Path, count: int, expected: str) -> None:
    weights = make_weights(DENSE)
    for name in list(weights)[-count:]:
        del weights[name]
    message = refusal(write_folder(tmp_path, DENSE, weights))
    assert expected in message
    assert message.count(".weight") == min(count, 5)


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    weights = make_weights(DENSE) | {f"extra.{number}": np.zeros(1, dtype=np.float32) for number in range(6)}
    message = refusal(write_folder(tmp_path, DENSE, weights))
    assert "no place for: extra.0, extra.1, extra.2, extra.3, extra.4 and 1 more" in message


def test_fewer_and_more_layers_than_the_config_says(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    assert "are missing: model.layers.2.input_layernorm.weight" in refusal(edit_config(folder, num_hidden_layers=3))
    assert "no place for: model.layers.1.input_layernorm.weight" in refusal(edit_config(folder, num_hidden_layers=1))


def test_wrong_shapes_and_dtypes_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    message = refusal(edit_config(folder, intermediate_size=64))
    assert "model.safetensors: model.layers.0.mlp.gate_proj.weight has shape [48, 32], expected [64, 32]" in message
    for shape in ((32,), (16, 16, 2), ()):
        wrong: Weights = make_weights(DENSE) | {"model.layers.0.self_attn.q_norm.weight": np.ones(shape, np.float32)}
        message = refusal(write_folder(tmp_path / str(shape), DENSE, wrong))
        assert f"q_norm.weight has shape {list(shape)}, expected [16]" in message
    wrong = make_weights(DENSE) | {"model.norm.weight": np.ones(32, dtype=np.int32)}
    message = refusal(write_folder(tmp_path / "dtype", DENSE, wrong))
    assert "model.norm.weight has dtype I32, expected BF16, F16 or F32" in message


def expert(layer: int, number: int) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts.{number}.{part}_proj.weight" for part in ("gate", "up", "down")]


def test_experts_must_be_all_there_and_no_more(tmp_path: Path) -> None:
    weights: Weights = dict(make_weights(MOE))
    fewer = {name: array for name, array in weights.items() if name not in expert(1, 2)}
    message = refusal(write_folder(tmp_path / "fewer", MOE, fewer))
    assert "experts of model.layers.1.mlp.switch_mlp.gate_proj.weight: missing 2, expected 0 to 7" in message
    moved = fewer | {new: weights[old] for old, new in zip(expert(1, 2), expert(1, 8), strict=True)}
    assert "missing 2, expected 0 to 7" in refusal(write_folder(tmp_path / "moved", MOE, moved))
    more = weights | {new: weights[old] for old, new in zip(expert(1, 2), expert(1, 8), strict=True)}
    assert "has no place for 8, expected 0 to 7" in refusal(write_folder(tmp_path / "more", MOE, more))
    both = make_weights(MOE) | make_weights(MOE, experts="stacked")
    assert "found twice" in refusal(write_folder(tmp_path / "both", MOE, both))
    one = weights | {expert(0, 3)[1]: np.zeros((23, 32), dtype=np.float32)}
    message = refusal(write_folder(tmp_path / "one", MOE, one))
    assert f"{expert(0, 3)[1]} has shape [23, 32], expected [24, 32]" in message
    strange = weights | {f"model.layers.0.mlp.experts.{'9' * 5000}.up_proj.weight": np.ones(1, dtype=np.float32)}
    assert "no place for: model.layers.0.mlp.experts.999" in refusal(write_folder(tmp_path / "strange", MOE, strange))


def test_experts_of_another_shape_than_the_config_says(tmp_path: Path) -> None:
    for experts, shape in (("fused", r"\[8, 48, 32\], expected \[8, 40, 32\]"), ("stacked", r"\[8, 24, 32\]")):
        weights = make_weights(MOE, experts=experts)  # type: ignore[arg-type]
        folder = write_folder(tmp_path / experts, {**MOE, "moe_intermediate_size": 20}, weights)
        assert re.search(f"has shape {shape}", refusal(folder))
    folder = write_folder(tmp_path / "dense", MOE, make_weights(DENSE))
    assert "tensors are missing: model.layers.0.mlp.gate.weight" in refusal(folder)
    folder = write_folder(tmp_path / "moe", DENSE, make_weights({**MOE, "tie_word_embeddings": True}))
    assert "tensors are missing: model.layers.0.mlp.gate_proj.weight" in refusal(folder)


@pytest.mark.parametrize("experts", ["separate", "fused", "stacked"])
def test_a_single_expert(tmp_path: Path, experts: Experts) -> None:
    config = {**MOE, "num_experts": 1, "num_experts_per_tok": 1}
    model = load_model(write_folder(tmp_path, config, make_weights(config, experts=experts)))
    assert model(mx.array([[1, 2]])).shape == (1, 2, 96)


# What is left aside


def test_things_left_aside_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights: Weights = dict(make_weights(DENSE))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, dtype=np.float32)
    folder = write_folder(tmp_path, DENSE, weights, shards=2)
    write_safetensors(folder / "stray.safetensors", {"x": np.zeros(1, dtype=np.float32)})
    (folder / "generation_config.json").write_text("[]")
    with caplog.at_level(logging.INFO, logger="mlxqwen"):
        model = load_model(folder, dtype="float32")
    notes = [record.getMessage() for record in caplog.records]
    assert any("stray.safetensors" in note for note in notes)
    assert any("generation_config.json" in note for note in notes)
    ignored = "lm_head.weight: ignored, since config.json ties it to the embeddings"
    assert ("mlxqwen", logging.INFO, ignored) in caplog.record_tuples
    plain = load_model(write_folder(tmp_path / "plain", DENSE, make_weights(DENSE)), dtype="float32")
    assert mx.array_equal(model(mx.array([[3, 4]])), plain(mx.array([[3, 4]])))


def other_number(weights: Weights) -> None:
    weights["lm_head.weight"][-1, -1] += 1


def other_shape(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:5]


def other_form(weights: Weights) -> None:
    weights["lm_head.scales"] = np.ones((96, 1), dtype=np.float32)


@pytest.mark.parametrize("change", [other_number, other_shape, other_form])
def test_a_head_of_its_own_that_the_config_ties_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, change: Callable[[Weights], None]
) -> None:
    monkeypatch.setattr(loading, "_COMPARED_BYTES", 1000)
    weights: Weights = dict(make_weights(DENSE))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    change(weights)
    load_model(write_folder(tmp_path, DENSE, weights))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "lm_head.weight" in record.getMessage()
    assert "differs from: check tie_word_embeddings" in record.getMessage()


def test_footprint_leaves_aside_what_loading_does(tmp_path: Path) -> None:
    plain = measure(write_folder(tmp_path / "plain", DENSE, make_weights(DENSE), dtype="BF16"))
    weights: Weights = dict(make_weights(DENSE))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.rotary_emb.inv_freq"] = np.zeros(8, dtype=np.float32)
    folder = write_folder(tmp_path / "more", DENSE, weights, dtype="BF16")
    more, model = measure(folder), load_model(folder, dtype="bfloat16")
    held = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    assert more.weight_bytes(mx.bfloat16) == plain.weight_bytes(mx.bfloat16) == held
    assert more.bits_per_weight == plain.bits_per_weight == 16
    assert more.disk_bytes == plain.disk_bytes + 2 * (96 * 32 + 8)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    config = {**DENSE, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "model_file": "modeling.py"}
    folder = write_folder(tmp_path / "model", config, make_weights(DENSE))
    for name in ("modeling.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    load_model(folder)
    assert not mark.exists()


def test_a_file_that_shrinks_between_the_check_and_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    path = folder / "model.safetensors"
    read_by_layer = loading._read_by_layer

    def shrink_and_read(*arguments: Any) -> Any:
        path.write_bytes(path.read_bytes()[:-5000])
        return read_by_layer(*arguments)

    monkeypatch.setattr(loading, "_read_by_layer", shrink_and_read)
    assert str(folder) in refusal(folder)


# Memory, dtypes, options


@pytest.mark.parametrize(("is_gpu", "beside"), [(False, 3 << 20), (True, 1 << 16)])
def test_loading_holds_little_more_than_the_model(tmp_path: Path, is_gpu: bool, beside: int) -> None:
    """Of BF16 that becomes float32 a piece at most, also of embeddings of 16 MiB; for a GPU there is no second copy."""
    config = {**DENSE, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1 << 15}
    folder = write_folder(tmp_path, config, make_weights(config), dtype="BF16")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(folder, device=Device("a machine", is_gpu, 1 << 34, 1 << 34))
    held = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    assert mx.get_active_memory() - before <= 1.02 * held
    assert mx.get_peak_memory() - before <= held + beside


MAC = Device("Apple M4", True, 16 << 30, 12 << 30)
WEIGHT_BYTES = 2 * sum(int(np.prod(shape)) for shape in published_shapes(DENSE).values())


def test_headers_are_read_once_for_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config asks what the weights are, too. Afterwards nothing is kept: files may change."""
    section = {"group_size": 32, "bits": 4}
    folder = write_folder(tmp_path, {**DENSE, "quantization": section}, make_weights(DENSE))
    files: list[str] = []

    def recorded(path: Path) -> Any:
        files.append(path.name)
        return read_header(path)

    monkeypatch.setattr("mlxqwen.files.checkpoint.folder.read_header", recorded)
    for look in (prepare_model, measure, load_model):
        look(folder)
        assert len(files) == len(set(files)) > 0
        files.clear()
        stat = (folder / "model.safetensors").stat()
        os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "MoE"])
def test_another_thread_computes_with_a_model_than_the_one_that_loaded_it(
    tmp_path: Path, config: Config, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left to evaluate belongs to the thread that asked for it. Large matrices are not copied to be turned."""
    monkeypatch.setattr("mlxqwen.model.linear._SMALL", 1)
    folder = write_folder(tmp_path, config, make_weights(config))
    models: list[Qwen3ForCausalLM] = []
    thread = threading.Thread(target=lambda: models.append(load_model(folder, fused=fused)))
    thread.start()
    thread.join()
    mx.eval(models[0].parameters())
    assert models[0](mx.array([[1, 2, 3]])).shape == (1, 3, config["vocab_size"])


def test_weights_that_do_not_fit_are_refused_unless_forced(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE), dtype="BF16")
    exactly = Device("Apple M4", True, WEIGHT_BYTES, WEIGHT_BYTES)
    smaller = Device("Apple M4", True, WEIGHT_BYTES, WEIGHT_BYTES - 1)
    assert load_model(folder, device=exactly).dtype == mx.bfloat16
    message = refusal(folder, InsufficientMemoryError, device=smaller)
    assert "in bfloat16" in message
    assert refusal(folder, InsufficientMemoryError, device=exactly, dtype="float32")
    assert load_model(folder, device=smaller, force=True).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("release", "bits", "gigabytes"),
    [("Qwen3-32B", 16, "65.5"), ("Qwen3-32B", 4, "18.4"), ("Qwen3-30B-A3B", 8, "32.4")],
)
def test_a_mac_of_16_gb_refuses_what_it_cannot_hold(tmp_path: Path, release: str, bits: int, gigabytes: str) -> None:
    folder = write_sparse(tmp_path / release, RELEASES[release], bits=bits)
    message = refusal(folder, InsufficientMemoryError, device=MAC)
    assert f"the weights take {gigabytes} GB in bfloat16, this machine can hold 12.9 GB" in message
    footprint = measure(folder)
    assert f"{footprint.weight_bytes(mx.bfloat16) / 1e9:.1f}" == gigabytes


def test_cache_bytes_are_those_of_the_buffers() -> None:
    """By hand for Qwen3-8B: 36 layers of 8 heads of 128, keys and values, at 1,000 tokens."""
    config = ModelConfig.from_dict(RELEASES["Qwen3-8B"])
    assert cache_bytes(config, 1000, 2, None) == 36 * 8 * 128 * 2 * 1000 * 2
    assert cache_bytes(config, 1000, 2, 8) == 36 * 8 * 2 * 1000 * (128 + 2 * 2 * 2)
    assert cache_bytes(config, 1000, 2, 4, 32) == 36 * 8 * 2 * 1000 * (64 + 4 * 2 * 2)
    narrow = ModelConfig.from_dict({**RELEASES["Qwen3-8B"], "head_dim": 96})
    assert cache_bytes(narrow, 1000, 2, 8) == 36 * 8 * 2 * 1000 * (96 + 3 * 2 * 2)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtypes_by_name_and_as_mlx_has_them(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    assert parse_dtype(name) == parse_dtype(getattr(mx, name)) == getattr(mx, name)
    assert load_model(folder, dtype=name).dtype == load_model(folder, dtype=getattr(mx, name)).dtype
    assert parse_dtype(None) is None


@pytest.mark.parametrize(
    "dtype", ["float64", "", "F16", mx.int32, mx.uint32, 16, [], {}, float, np.float32, b"float16"]
)
def test_other_dtypes_are_refused(tmp_path: Path, dtype: Any) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    assert "expected bfloat16, float16 or float32" in refusal(folder, OptionError, dtype=dtype)


CPU = Device("x86", False, 1 << 40, 1 << 40)


def test_the_dtype_follows_the_machine(tmp_path: Path) -> None:
    for dtype, found in (("BF16", mx.bfloat16), ("F16", mx.float16), ("F32", mx.float32)):
        folder = write_folder(tmp_path / dtype, DENSE, make_weights(DENSE), dtype=dtype)
        assert load_model(folder, device=CPU).dtype == mx.float32
        assert load_model(folder, device=MAC).dtype == found


def store_as(folder: Path, part: str, dtype: mx.Dtype, others: mx.Dtype) -> None:
    """Rewrite a folder's floats: in `dtype` where `part` is in the name, in `others` elsewhere."""
    changed = {
        name: array if array.dtype == mx.uint32 else array.astype(dtype if part in name else others)
        for name, array in arrays_of(Checkpoint.open(folder)).items()
    }
    mx.eval(changed)
    mx.save_safetensors(str(folder / "model.safetensors"), changed)


def test_float16_scales_keep_their_digits_on_a_gpu(tmp_path: Path) -> None:
    """Packed codes from AWQ have them beside bfloat16 norms and embeddings."""
    folder = quantized_folder(tmp_path)
    store_as(folder, ".self_attn.", mx.float16, mx.bfloat16)
    model = load_model(folder, device=MAC, fused=False)
    stored = arrays_of(Checkpoint.open(folder))
    scales = "model.layers.0.self_attn.q_proj.scales"
    assert stored[scales].dtype == model.dtype == mx.float16
    assert mx.array_equal(dict(tree_flatten(model.parameters()))[scales], stored[scales])
    assert size_up(measure(folder), MAC).dtype == mx.float16
    assert load_model(folder, device=CPU).dtype == mx.float32


def test_info_and_loading_agree_on_the_dtype(tmp_path: Path) -> None:
    """Most bytes are of another dtype than the embeddings."""
    for number, (embeddings, others) in enumerate([(mx.bfloat16, mx.float32), (mx.float32, mx.float16)]):
        folder = write_folder(tmp_path / str(number), DENSE, make_weights(DENSE))
        store_as(folder, "embed", embeddings, others)
        assert size_up(measure(folder), MAC).dtype == load_model(folder, device=MAC).dtype == embeddings
        assert measure(folder).format == {mx.bfloat16: "BF16", mx.float32: "F32"}[embeddings]


@pytest.mark.parametrize("folder", [None, 5, b"model", ["model"]])
def test_a_folder_that_is_no_path_is_refused(folder: Any) -> None:
    assert "folder: found" in refusal(folder, OptionError)


def test_plain_experts_are_multiplied_in_float32_on_a_cpu(tmp_path: Path) -> None:
    """MLX's CPU backend has `gather_mm` for nothing else, and would fail in the middle of a prompt."""
    folder = write_folder(tmp_path, MOE, make_weights(MOE))
    assert "dtype: found bfloat16, expected float32" in refusal(folder, OptionError, dtype="bfloat16", device=CPU)
    assert load_model(folder, dtype="bfloat16", device=MAC).dtype == mx.bfloat16
    quantized = load_model(quantized_folder(tmp_path / "q", WIDE_MOE), dtype="bfloat16", device=CPU)
    assert quantized(mx.array([[1, 2]])).dtype == mx.bfloat16


def test_yarn_is_set_by_either_option(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    scaling = {"rope_type": "yarn", "factor": 2.0}
    assert load_model(folder, rope_scaling=scaling).config == load_model(folder, yarn_factor=2.0).config
    assert "found both" in refusal(folder, OptionError, rope_scaling=scaling, yarn_factor=2.0)
    assert "factor" in refusal(folder, OptionError, yarn_factor=0.5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_folder_ends_in_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Tensors dropped, renamed, reshaped, or of another dtype, at random: it loads, or one error says why not."""
    config = data.draw(st.sampled_from([DENSE, MOE]))
    experts: Experts = data.draw(st.sampled_from(["separate", "fused", "stacked"]))
    weights: Weights = dict(make_weights(config, experts=experts))
    for name in data.draw(st.lists(st.sampled_from(sorted(weights)), max_size=3, unique=True)):
        array = weights.pop(name)
        change = data.draw(st.sampled_from(["drop", "rename", "reshape", "integers", "bytes"]))
        if change == "rename":
            other = data.draw(st.sampled_from([f"{name}s", name.removesuffix(".weight") + ".scales", "lm_head.weight"]))
            weights[other] = array
        elif change == "reshape":
            weights[name] = array.reshape(*data.draw(st.sampled_from([(-1,), (1, 1, -1), (-1, 1)])))
        elif change == "integers":
            weights[name] = array.view(np.uint32)
        elif change == "bytes":
            weights[name] = array.astype(np.uint8)
    folder = write_folder(tmp_path_factory.mktemp("damaged"), config, weights)
    try:
        load_model(folder)
        message = str(folder)
    except MlxqwenError as error:
        message = str(error)
    assert str(folder) in message
    assert message.count("\n") <= 1
