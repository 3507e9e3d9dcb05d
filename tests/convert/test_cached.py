"""Checkpoints that are converted when they are first loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlxqwen
from mlxqwen_convert import convert
from mlxqwen_convert.cached import cache_folder, cached_models, converted, prune
from tests.convert.checkpoints import make_demo, make_source
from tests.convert.test_cli_convert import ENVIRONMENT

PROMPT = [[742, 10, 20, 30]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxqwen", *map(str, arguments)]
    environment = {**ENVIRONMENT, "MLXQWEN_CACHE": os.environ["MLXQWEN_CACHE"]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("form", ["fp8", "awq", "gptq"])
def test_load_converts_once(tmp_path: Path, own_cache: Path, form: str) -> None:
    source = make_demo(tmp_path / "in", form)
    model, _ = mlxqwen.load(source.folder)
    convert(source.folder, tmp_path / "out")
    other, _ = mlxqwen.load(tmp_path / "out")
    assert mx.array_equal(model(mx.array(PROMPT)), other(mx.array(PROMPT)))
    (entry,) = cached_models()
    assert entry.finished
    assert entry.source == source.folder
    before = {path: path.stat().st_mtime_ns for path in entry.folder.iterdir()}
    mlxqwen.load(source.folder)
    assert {path: path.stat().st_mtime_ns for path in entry.folder.iterdir()} == before


def test_generate_says_so_in_one_line(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "fp8")
    first = run("generate", "Hello", "--model", source.folder, "--temperature", "0", "--max-tokens", "20")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("is converted once into") == 1
    second = run("generate", "Hello", "--model", source.folder, "--temperature", "0", "--max-tokens", "20")
    assert second.stdout == first.stdout
    assert "converted" not in second.stderr


def test_other_weights_have_another_place(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write()
    one = converted(source.folder)
    os.utime(source.folder / "model.safetensors", ns=(1, 1))
    assert converted(source.folder) != one
    assert len(list(cached_models())) == 2


def test_an_interrupted_conversion_is_taken_up(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write()

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source.folder, stop)
    (entry,) = cached_models()
    assert not entry.finished
    assert converted(source.folder).is_dir()
    (entry,) = cached_models()
    assert entry.finished


def test_list_and_prune(tmp_path: Path) -> None:
    gone, kept = make_source(tmp_path / "gone", "fp8").write(), make_source(tmp_path / "kept", "awq").write()
    folders = [converted(gone.folder), converted(kept.folder)]
    shutil.rmtree(gone.folder)
    listed = run("cache", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == sorted(map(str, folders))
    pruned = run("cache", "prune")
    assert pruned.stdout.split()[0] == str(folders[0])
    assert not folders[0].exists()
    assert folders[1].exists()
    assert [model.folder for model in prune(everything=True)] == [folders[1]]
    assert list(cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "in", "fp8").write()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(mlxqwen.MlxqwenError, match="MLXQWEN_CACHE"):
        converted(source.folder)
