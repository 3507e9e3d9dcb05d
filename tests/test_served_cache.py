"""Models of a hub that `mlxqwen serve` is told by name: what the cache has of them is checked as a folder is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mlxqwen.files.hub import DEMO_FOLDER, cached_folder, located
from mlxqwen.files.hub_source import HubModel
from tests.command_line import run
from tests.loopback_hub import COMMIT, LoopbackHub, unasked_hub
from tests.test_cli_serve import serve

NAMED = ["-m", f"a={DEMO_FOLDER}", "-m", "b=org/demo"]


@pytest.fixture
def nowhere() -> Iterator[LoopbackHub]:
    """A hub that nobody is to ask."""
    with unasked_hub() as server:
        yield server


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: LoopbackHub) -> Path:
    """The folder of org/demo in the cache of the hub, whole."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", nowhere.url)
    model = tmp_path / "models--org--demo"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(DEMO_FOLDER, model / "snapshots" / COMMIT)
    return model / "snapshots" / COMMIT


def found() -> tuple[Path | None, bool]:
    place = located("org/demo", None)
    assert isinstance(place, HubModel)
    return cached_folder(place)


def entries(service: Any) -> Any:
    return [(one.name, one.state, one.context) for one in service.models.entries]


def test_what_is_here_and_whole_is_served_with_its_context(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found() == (cached, True)
    seen, _ = serve(monkeypatch, entries, *NAMED)
    assert seen == [("a", "unloaded", 4096), ("b", "unloaded", 512)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model.safetensors", None, "model.safetensors: "),
        ("config.json", b'{"model_type": "llama"}', "'llama'"),
        ("tokenizer.json", b"{}", "tokenizer.json: "),
    ],
    ids=["cut short", "another kind", "tokenizer"],
)
def test_what_is_wrong_is_told_as_of_a_folder(cached: Path, name: str, content: bytes | None, told: str) -> None:
    whole = (cached / name).read_bytes()
    (cached / name).write_bytes(whole[:-1] if content is None else content)
    of_hub, of_folder = (run("serve", "--port", "0", *NAMED[:3], f"b={model}") for model in ("org/demo", cached))
    assert (of_hub.status, of_hub.out) == (1, "")
    assert of_hub.err.startswith(f"error: b: {cached}")
    assert told in of_hub.err
    assert of_hub.err == of_folder.err
    limit = run("serve", "--port", "0", "--max-model-len", "100", "-m", "org/demo", "-m", f"a={DEMO_FOLDER}")
    assert limit.err.startswith(f"error: org/demo: {cached}")


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_of_what_is_here_in_part_the_config_is_checked(
    cached: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cached / missing).unlink()
    assert found() == (cached, False)
    seen, _ = serve(monkeypatch, entries, *NAMED)
    assert seen[1] == ("b", "unloaded", 512)
    too_long = run("serve", "--port", "0", *NAMED, "--max-model-len", "1000")
    assert "error: b: --max-model-len: found 1,000, but the model's context is 512" in too_long.err
    (cached / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in run("serve", "--port", "0", *NAMED).err


def test_what_is_not_here_is_looked_for_when_it_is_asked_for(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached / "config.json").unlink()
    assert found() == (None, False)
    seen, _ = serve(monkeypatch, entries, *NAMED)
    assert seen[1] == ("b", "unloaded", None)
    shutil.rmtree(cached.parents[1])
    seen, _ = serve(monkeypatch, entries, *NAMED)
    assert seen[1] == ("b", "unloaded", None)
