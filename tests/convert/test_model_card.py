"""The output's README.md: valid metadata, the error table, nothing forged by names."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import ModelCard

from mlxqwen_convert import convert
from tests.convert.checkpoints import DENSE, make_source


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B-FP8" / "snapshots" / "abc"
    source = make_source(snapshot, "fp8").write()
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n# Qwen3\n")
    report = convert(source.folder, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "mlx"
    assert card.data.base_model == "Qwen/Qwen3-0.6B-FP8"
    assert card.data.license == "apache-2.0"
    assert "mlx" in card.data.tags
    assert "8-bit" in card.data.tags
    for row in report.kinds:
        assert f"| {row.kind} | {row.source} | {row.target} |" in card.text
    assert "FP8, blocks of 128×128" in card.text


def test_a_folder_is_no_hub_id(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq").write()
    convert(source.folder, tmp_path / "out", verify=False)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model is None
    assert "Not verified." in card.text
    assert "every one equals the source's" in card.text


def test_names_forge_no_markup(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    name = "out\n---\n# <img src=x>[evil](http://x)"
    folder = tmp_path / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(source.folder, folder)
    text = (folder / "README.md").read_text()
    assert text.count("\n# ") == 1
    assert "<img" not in text.replace("\\<img", "")
    ModelCard.load(folder / "README.md")


def test_all_notes_are_on_the_card(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "tie_word_embeddings": True})
    source.stored["lm_head.weight"] = source.stored["model.embed_tokens.weight"]
    report = convert(source.write().folder, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert len(report.notes) == 1
    assert f"- {report.notes[0]}" in text


def test_the_command_of_an_output_with_any_name(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "in", "fp8").write().folder
    convert(folder, tmp_path / "o $x `y`")
    lines = (tmp_path / "o $x `y`" / "README.md").read_text().splitlines()
    assert shlex.split(lines[lines.index("```sh") + 1]) == ["mlxqwen", "generate", "--model", "./o $x `y`", "Hello"]
