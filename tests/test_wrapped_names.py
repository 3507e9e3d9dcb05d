"""Names under the prefix of a wrapper: known ones are taken off with a note, others are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.errors import CheckpointError, MlxqwenError
from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen.files.tensor_names import without_wrappers
from mlxqwen.model.footprint import measure
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from tests.checkpoint_arrays import arrays_of
from tests.tiny_checkpoints import DENSE, MOE, Experts, make_weights, prompt, write_folder

IDS = mx.array([prompt(7, 96)])
Rename = Callable[[str], str]
WRAPPERS: dict[str, Rename] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of the decoder": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "torch.compile of each layer": lambda name: name.replace(".0.", ".0._orig_mod.").replace(".1.", ".1._orig_mod."),
    "DataParallel": lambda name: f"module.{name}",
    "DataParallel over torch.compile": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "activation checkpointing": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "PEFT": lambda name: f"base_model.model.{name}",
    "a part of a larger model": lambda name: f"language_model.{name}",
    "a part of a larger model, within": lambda name: name.replace("model.", "model.language_model.", 1),
    "a model in a model": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_known_prefixes_are_taken_off(tmp_path: Path, caplog: pytest.LogCaptureFixture, wrapper: str) -> None:
    config = {**DENSE, "tie_word_embeddings": False}
    weights, rename = make_weights(config), WRAPPERS[wrapper]
    expected = load_model(write_folder(tmp_path / "plain", config, weights), dtype="float32")(IDS)
    renamed = {rename(name): array for name, array in weights.items()}
    assert renamed.keys() != weights.keys()
    folder = write_folder(tmp_path / "in", config, renamed)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)
    (note,) = (record.getMessage() for record in caplog.records)
    assert "have a wrapper's prefix, which is taken off" in note
    assert next(name for name in renamed if name not in weights) in note
    assert measure(folder).parameters == measure(tmp_path / "plain").parameters
    report = convert(folder, tmp_path / "out", bits=16, workers=1)
    assert note in report.notes
    assert mx.array_equal(load_model(tmp_path / "out", dtype="float32")(IDS), expected)


@pytest.mark.parametrize("experts", ["separate", "fused", "stacked"])
def test_experts_under_a_prefix(tmp_path: Path, experts: Experts) -> None:
    weights = make_weights(MOE, experts=experts)
    plain = load_model(write_folder(tmp_path / "plain", MOE, weights), dtype="float32")
    folder = write_folder(tmp_path / "in", MOE, {f"module.{name}": array for name, array in weights.items()})
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), plain(IDS))
    convert(folder, tmp_path / "out", bits=16, workers=1)
    assert mx.array_equal(load_model(tmp_path / "out", dtype="float32")(IDS), plain(IDS))


def test_a_quantized_folder_under_a_prefix(tmp_path: Path) -> None:
    """Modules that are quantized otherwise are named with the prefix, too."""
    config = {**DENSE, "hidden_size": 64, "intermediate_size": 64}
    down = "model.layers.0.mlp.down_proj"
    source = write_folder(tmp_path / "plain", config, make_weights(config))
    convert(source, tmp_path / "mlx", bits=4, group_size=32, dtype="float32", keep={down: 8}, workers=1)
    expected = load_model(tmp_path / "mlx", dtype="float32")(IDS)
    written = json.loads((tmp_path / "mlx/config.json").read_text())
    section = written["quantization"]
    section[f"language_model.{down}"] = section.pop(down)
    weights = {f"language_model.{n}": np.array(a) for n, a in arrays_of(Checkpoint.open(tmp_path / "mlx")).items()}
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(a) for name, a in weights.items()})
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)


@pytest.mark.parametrize("prefix", ["thinker.", "student.net."])
def test_a_foreign_prefix_is_named(tmp_path: Path, prefix: str) -> None:
    weights = {prefix + name: array for name, array in make_weights(DENSE).items()}
    folder = write_folder(tmp_path / "in", DENSE, weights)
    for refused in (lambda: load_model(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(MlxqwenError, match=r"missing: model\.embed_tokens\.weight") as caught:
            refused()
        assert f"found under the prefix {prefix!r}" in caught.value.problem


def test_a_tensor_with_a_prefix_and_without_is_refused(tmp_path: Path) -> None:
    weights = make_weights(DENSE)
    weights["module.model.norm.weight"] = weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"found model\.norm\.weight and module\.model\.norm\.weight"):
        load_model(write_folder(tmp_path, DENSE, weights))


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        "visual.module.weight",
        "module",
        "",
        "language_model.visual.weight",
        "model",
    ],
)
def test_other_names_stay(name: str) -> None:
    assert without_wrappers(name) == name
