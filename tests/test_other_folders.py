"""Folders that hold something else than a language model alone: adapters, embedding models, classifiers, drafters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxqwen
from mlxqwen.errors import MlxqwenError, UnsupportedFormatError
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.footprint import measure
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from tests.command_line import run
from tests.convert import checkpoints
from tests.convert.checkpoints import make_demo
from tests.tiny_checkpoints import DENSE, make_weights, prompt, write_folder, write_safetensors

IDS = mx.array([prompt(7, 96)])
WEIGHTS: dict[str, Any] = dict(make_weights(DENSE))
LORA = {"model.layers.0.self_attn.q_proj.lora_a": np.zeros((32, 4), np.float32)}
MLX_LM = {
    "fine_tune_type": "lora",
    "model": "mlx-community/Qwen3-4B-4bit",
    "num_layers": 16,
    "lora_parameters": {"rank": 8},
}
PEFT = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-4B", "r": 8, "target_modules": ["q_proj"]}


def put(folder: Path, *names: str, config: dict[str, Any] | None = None) -> Path:
    """An adapter's files."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if name.endswith(".safetensors"):
            write_safetensors(folder / name, LORA)
        else:
            (folder / name).write_bytes(b"PK\x03\x04")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


ADAPTERS: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "mlx-lm": (["adapters.safetensors"], MLX_LM),
    "mlx-lm with earlier states": (["0000100_adapters.safetensors", "adapters.safetensors"], MLX_LM),
    "mlx-lm without a config": (["adapters.safetensors"], None),
    "an earlier state alone": (["0000200_adapters.safetensors"], None),
    "PEFT": (["adapter_model.safetensors"], PEFT),
    "PEFT in PyTorch's form": (["adapter_model.bin"], PEFT),
    "a LoRA by its name": (["my-lora-v2.safetensors"], None),
    "a config alone": ([], PEFT),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_beside_weights_is_refused_unless_it_is_ignored(tmp_path: Path, case: str) -> None:
    names, config = ADAPTERS[case]
    plain = load_model(write_folder(tmp_path / "plain", DENSE, WEIGHTS), dtype="float32")(IDS)
    folder = put(write_folder(tmp_path / "in", DENSE, WEIGHTS), *names, config=config)
    first = sorted([*names, "adapter_config.json"] if config else names)[0]
    for refused in (lambda: load_model(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(UnsupportedFormatError, match="found an adapter beside the weights") as caught:
            refused()
        assert first in caught.value.problem
        assert "--ignore-adapter (ignore_adapter=True)" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    assert mx.array_equal(load_model(folder, dtype="float32", ignore_adapter=True)(IDS), plain)
    convert(folder, tmp_path / "out", bits=16, dtype="float16", ignore_adapter=True, workers=1)
    assert not [path for path in (tmp_path / "out").iterdir() if "adapter" in path.name]
    found = measure(folder)
    assert not found.runs
    assert found.refusal is not None
    assert first in found.refusal


@pytest.mark.parametrize("case", [case for case in ADAPTERS if case != "a config alone"])
def test_an_adapter_alone_is_named_with_its_base(tmp_path: Path, case: str) -> None:
    names, config = ADAPTERS[case]
    folder = put(tmp_path / "in", *names, config=config)
    base = (
        (config or {}).get("base_model_name_or_path") or (config or {}).get("model") or "a base that it does not name"
    )
    doors: list[Callable[[], object]] = [
        lambda: mlxqwen.load(folder),
        lambda: load_model(folder),
        lambda: measure(folder),
        lambda: convert(folder, tmp_path / "out"),
    ]
    for refused in doors:
        with pytest.raises(UnsupportedFormatError, match=r"an adapter \(") as caught:
            refused()
        assert f"for {base}, expected a whole model" in caught.value.problem
        assert "ownload" not in str(caught.value)


def test_adapters_in_folders_beside_the_weights_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = load_model(write_folder(tmp_path / "plain", DENSE, WEIGHTS), dtype="float32")(IDS)
    folder = write_folder(tmp_path / "in", DENSE, WEIGHTS)
    put(folder / "adapters", "0000100_adapters.safetensors", "adapters.safetensors", config=MLX_LM)
    for number in (100, 200, 300):
        put(folder / f"checkpoint-{number}", "adapter_model.safetensors", "optimizer.pt", config=PEFT)
    put(folder / "assets", "logo.png")
    put(folder / ".cache", "adapters.safetensors")
    (folder / "notes").mkdir()
    put(folder / "notes" / "deep", "adapters.safetensors")
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), plain)
    note = (
        "adapters in folders beside the weights are not applied: adapters/adapters.safetensors, "
        "checkpoint-100/adapter_model.safetensors, checkpoint-200/adapter_model.safetensors and 1 more"
    )
    assert [record.getMessage() for record in caplog.records] == [note]
    found = measure(folder, check=True)
    assert (found.runs, list(found.notes)) == (True, [note])
    assert list(convert(folder, tmp_path / "out", bits=16, dtype="float16", workers=1).notes) == [note]


def test_names_of_folders_are_not_trusted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", DENSE, WEIGHTS)
    put(folder / "a\x1b[31m", "adapters.safetensors")
    assert not [note for note in measure(folder).notes if "\x1b" in note]


@pytest.mark.parametrize("config", ["[", "[]", '{"base_model_name_or_path": 5}', '{"model": "\\u001b[31m"}'])
def test_configs_of_adapters_are_not_trusted(tmp_path: Path, config: str) -> None:
    folder = put(tmp_path / "in", "adapters.safetensors")
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(UnsupportedFormatError, match=r"an adapter \(") as caught:
        measure(folder)
    assert "\x1b" not in str(caught.value)


def test_an_adapter_beside_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    folder = put(make_demo(tmp_path / "in", "gptq").folder, "adapters.safetensors", config=MLX_LM)
    with pytest.raises(UnsupportedFormatError, match="found an adapter beside the weights"):
        mlxqwen.load(folder)
    assert not (tmp_path / "cache").exists()
    model, _ = mlxqwen.load(folder, ignore_adapter=True)
    assert model.config.vocab_size == 768


def test_commands_tell_of_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in DEMO_FOLDER.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    put(folder, "adapter_model.safetensors", config=PEFT)
    result = run("generate", "hi", "--model", str(folder), "--max-tokens", "1")
    assert result.status == 1
    assert "--ignore-adapter" in result.err
    assert run("generate", "hi", "--model", str(folder), "--max-tokens", "1", "--ignore-adapter").status == 0
    told = run("info", str(folder)).out
    assert told.index("does not run it: an adapter lies beside the weights") < told.index("in memory, but is not run")


BARE = {name.removeprefix("model."): array for name, array in WEIGHTS.items()}
POOLING = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
SCORE = {"score.weight": np.zeros((2, 32), np.float32)}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str]] = {
    "a bare model": ({"architectures": ["Qwen3Model"]}, BARE, None, "an embedding model"),
    "Qwen3-Embedding": ({}, BARE, POOLING, "an embedding model"),
    "an embedding model with a head's names": ({}, WEIGHTS, POOLING, "an embedding model (modules.json pools"),
    "a bare class with a head's names": ({"architectures": ["Qwen3Model"]}, WEIGHTS, None, "an embedding model"),
    "a classifier": ({"architectures": ["Qwen3ForSequenceClassification"]}, WEIGHTS | SCORE, None, "(score.weight)"),
    "a classifier by its tensors": ({}, WEIGHTS | SCORE, None, "a classifier or reward model (score.weight)"),
    "a tagger": ({"architectures": ["Qwen3ForTokenClassification"]}, WEIGHTS, None, "Qwen3ForTokenClassification"),
    "a reward model": ({}, WEIGHTS | {"v_head.summary.weight": SCORE["score.weight"]}, None, "v_head.summary"),
    "a drafter": ({"architectures": ["LlamaForCausalLMEagle3"]}, WEIGHTS, None, "LlamaForCausalLMEagle3"),
    "another drafter": ({"architectures": ["DFlashDraftModel"]}, WEIGHTS, None, "DFlashDraftModel"),
    "an adapter that is not merged": (
        {},
        {f"base_model.model.{name}": array for name, array in WEIGHTS.items()}
        | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((4, 32), np.float32)},
        None,
        "a model with an adapter that is not merged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_language_model_is_named(tmp_path: Path, case: str) -> None:
    changes, weights, modules, said = OTHERS[case]
    folder = write_folder(tmp_path / "in", {**DENSE, **changes}, weights)
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    for refused in (lambda: load_model(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(UnsupportedFormatError, match="expected a language model") as caught:
            refused()
        assert said in caught.value.problem
    result = run("info", str(folder))
    assert result.status == 0
    kind, fits = (next(line for line in result.out.splitlines() if line.startswith(word)) for word in ("kind", "fits"))
    assert "this version does not run it" in kind
    assert said in kind
    assert fits.partition(" ")[2].strip().startswith("in memory, but is not run")
    facts = json.loads(run("info", "--json", str(folder)).out)
    assert (facts["runs"], facts["converts"]) == (False, False)
    assert said in facts["refusal"]


@pytest.mark.parametrize(
    ("architectures", "modules"),
    [
        (["Qwen3ForCausalLM"], None),
        (["Qwen3MoeForCausalLM"], None),
        ([], None),
        (None, None),
        ("x", None),
        ([5], None),
        (["FSDPQwen3ForCausalLM"], None),
        (["Qwen3ForCausalLM"], "{"),
        (["Qwen3ForCausalLM"], '[{"type": "sentence_transformers.models.Transformer"}, 5]'),
    ],
)
def test_language_models_run(tmp_path: Path, architectures: Any, modules: str | None) -> None:
    folder = write_folder(tmp_path, {**DENSE, "architectures": architectures}, WEIGHTS)
    if modules is not None:
        (folder / "modules.json").write_text(modules)
    load_model(folder)
    assert measure(folder).refusal is None


def test_info_does_not_say_that_broken_folders_fit(tmp_path: Path) -> None:
    weights = {name: array for name, array in WEIGHTS.items() if "norm" not in name}
    with pytest.raises(MlxqwenError, match="tensors are missing"):
        measure(write_folder(tmp_path, DENSE, weights), check=True)


def test_what_conversion_loses_is_told_by_info_and_at_each_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    source = make_demo(tmp_path / "in", "gptq")
    for name in source.codes:
        if name.endswith("q_proj"):
            dtype, groups = source.stored[f"{name}.g_idx"]
            source.stored[f"{name}.g_idx"] = (dtype, np.ascontiguousarray(groups[::-1]))
    checkpoints.write_safetensors(source.folder / "model.safetensors", source.stored)
    expected = "GPTQ 4-bit act-order: its inputs are out of order, so it is dequantized and quantized again to 4 bits"
    dry = convert(source.folder, tmp_path / "out", dry_run=True)
    assert any(note.startswith(expected) for note in dry.notes)
    assert expected in run("info", str(source.folder)).out
    assert any(note.startswith(expected) for note in json.loads(run("info", "--json", str(source.folder)).out)["notes"])
    for _ in range(2):
        caplog.clear()
        mlxqwen.load(source.folder)
        assert sum(record.getMessage().startswith(expected) for record in caplog.records) == 1
