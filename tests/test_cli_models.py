"""`mlxqwen pull`, `list` and `rm` over the caches of hubs on loopback, and the sizes of all aliases."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import constants

from mlxqwen.device import Device
from mlxqwen.errors import HubError
from mlxqwen.files.aliases import ALIASES
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.downloads import removal_of
from mlxqwen.files.hub import DEMO_FOLDER, resolve_model
from mlxqwen.model.footprint import measure
from mlxqwen.model.releases import RELEASES, footprints_of_form, footprints_of_release
from mlxqwen_convert.cached import converted, planned
from tests.command_line import run
from tests.convert.checkpoints import make_source
from tests.loopback_hub import COMMIT, HubModel, running_hub
from tests.sparse_checkpoints import write_sparse
from tests.test_preview import Commands

FIRST, SECOND = "1" * 40, "2" * 40
DEMO = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir() if path.is_file()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's client."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "converted"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setattr("modelscope_hub.config._default_config", None)
    monkeypatch.delenv("MLXQWEN_USE_MODELSCOPE", raising=False)
    return folder


def store(
    cache: Path, repo_id: str, files: dict[str, bytes], commit: str = FIRST, ref: str = "main", kind: str = "models"
) -> Path:
    """What the hub's client writes for a revision → its snapshot."""
    folder = cache / f"{kind}--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for place in (folder / "blobs", folder / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    for name, content in files.items():
        blob = folder / "blobs" / f"{hash(content) & (1 << 60) - 1:x}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def listed() -> dict[str, dict[str, Any]]:
    result = run("list", "--json")
    assert (result.status, result.out.count("\n")) == (0, 1), result.err
    return {f"{one['id']}@{one['revision'][:1]}": one for one in json.loads(result.out)["models"]}


# The list


def test_nothing_is_downloaded(cache: Path) -> None:
    assert run("list").out == "no model is downloaded; see mlxqwen pull\n"
    assert json.loads(run("list", "--json").out)["models"] == []
    assert not cache.exists()


def test_what_is_downloaded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.device.current_device", lambda: Device("a Mac", True, 1 << 33, 40_000_000))
    store(cache, "org/demo", DEMO)
    alias = store(cache, "Qwen/Qwen3-0.6B-MLX-4bit", DEMO)
    source = make_source(tmp_path / "fp8", "fp8").write().folder
    fp8 = store(cache, "org/fp8", {path.name: path.read_bytes() for path in source.iterdir()}, ref="v2")
    copy = converted(fp8)
    store(cache, "org/begun", {"config.json": DEMO["config.json"]})
    store(cache, "org/mute", {name: DEMO[name] for name in ("config.json", "model.safetensors")})
    store(cache, "org/llama", {"config.json": b'{"model_type": "llama"}'})
    store(cache, "org/data", {"config.json": DEMO["config.json"]}, kind="datasets")
    found = listed()
    assert set(found) == {"org/demo@1", "Qwen/Qwen3-0.6B-MLX-4bit@1", "org/fp8@1", "org/begun@1", "org/mute@1"}
    demo = found["org/demo@1"]
    assert demo["bytes"] == sum(map(len, DEMO.values()))
    assert (demo["state"], demo["format"], demo["fits"], demo["converted"]) == ("ready", "BF16", True, [])
    assert found["Qwen/Qwen3-0.6B-MLX-4bit@1"]["aliases"] == ["qwen3:0.6b", "qwen3:0.6b-4bit"]
    assert found["Qwen/Qwen3-0.6B-MLX-4bit@1"]["path"] == str(alias)
    assert found["org/fp8@1"]["refs"] == ["v2"]
    assert found["org/fp8@1"]["converted"] == [
        {"path": str(copy), "bytes": found["org/fp8@1"]["converted"][0]["bytes"], "state": "ready"}
    ]
    assert (found["org/begun@1"]["state"], found["org/begun@1"]["fits"]) == ("no weights", None)
    assert (found["org/mute@1"]["state"], found["org/mute@1"]["format"]) == ("no tokenizer", "BF16")
    info = json.loads(run("info", str(alias), "--context", "512", "--json").out)
    assert demo["memory_bytes"] == info["total_bytes"]
    head, *rows, others = run("list").out.splitlines()
    assert head.split() == ["model", "alias", "size", "fits", "converted", "state", "last", "used"]
    assert [row.split()[0] for row in rows] == [
        *("org/begun", "org/demo", "org/fp8@v2", "org/mute", "Qwen/Qwen3-0.6B-MLX-4bit")
    ]
    assert others == "and 1 model of other kinds in the same caches"
    monkeypatch.setattr("mlxqwen.device.current_device", lambda: Device("a watch", True, 1 << 20, 1 << 20))
    assert {name: one["fits"] for name, one in listed().items() if one["bytes"] > 1 << 20} == {
        "org/demo@1": False,
        "Qwen/Qwen3-0.6B-MLX-4bit@1": False,
        "org/mute@1": False,
    }


def test_names_and_states_cannot_forge_rows(cache: Path) -> None:
    store(cache, "org/a\x1b[2J", DEMO, ref="x\ny")
    (cache / "models--org--odd" / "snapshots").mkdir(parents=True)
    (cache / "models--org--odd" / "refs").mkdir()
    (cache / "models--org--odd" / "refs" / "main").write_text(SECOND)
    out = run("list").out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 3
    assert out.splitlines()[-1].startswith("not read: ")
    assert run("rm", "org/odd", "--yes").out == f"removed org/odd: {len(SECOND)} bytes freed\n"
    assert not (cache / "models--org--odd").exists()


def test_caches_that_cannot_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelscope_hub.HubApi.scan_cache", lambda self: int("x"))
    assert "not read: the cache of ModelScope: " in run("list").out
    cache.write_text("a file")
    result = run("list")
    assert (result.status, "HF_HOME" in result.err) == (1, True)


def test_models_of_modelscope(tmp_path: Path) -> None:
    folder = tmp_path / "modelscope" / "models" / "org--demo" / "snapshots" / "master"
    shutil.copytree(DEMO_FOLDER, folder)
    neighbour = tmp_path / "modelscope" / "models" / "org--other" / "snapshots" / "master"
    shutil.copytree(DEMO_FOLDER, neighbour)
    assert set(listed()) == {"modelscope:org/demo@m", "modelscope:org/other@m"}
    done = run("rm", "modelscope:org/demo", "--yes")
    assert (done.status, done.out) == (0, f"removed modelscope:org/demo: {size(DEMO)} freed\n")
    assert set(listed()) == {"modelscope:org/other@m"}
    assert not folder.parent.parent.exists()
    assert "found nothing in the cache" in run("rm", "org/other", "--yes").err  # not the hub's


def size(files: dict[str, bytes]) -> str:
    return f"{sum(map(len, files.values())) / 1e6:.2f} MB"


# Removal


def test_removal(cache: Path, tmp_path: Path) -> None:
    source = make_source(tmp_path / "fp8", "fp8").write().folder
    snapshot = store(cache, "org/fp8", {path.name: path.read_bytes() for path in source.iterdir()})
    other = store(cache, "org/demo", DEMO)
    copy = converted(snapshot)
    (cache / "models--org--fp8" / "blobs" / "x.incomplete").write_bytes(b"0" * 1000)
    nbytes = sum(path.stat().st_size for path in snapshot.iterdir()) + 1000
    made = listed()["org/fp8@1"]["converted"][0]["bytes"]
    told = f"org/fp8 (1 conversion, {made / 1e3:.2f} kB): {(nbytes + made) / 1e3:.2f} kB"
    dry = run("rm", "org/fp8", "--dry-run")
    assert dry.out == f"would remove {told} freed\n", dry.err
    asked = run("rm", "org/fp8")
    assert (asked.status, snapshot.exists()) == (2, True)
    assert "give --yes" in asked.err
    assert run("rm", "org/fp8", "--yes").out == f"removed {told} freed\n"
    assert not (cache / "models--org--fp8").exists()
    assert not copy.exists()
    assert {path.name: path.read_bytes() for path in other.iterdir()} == DEMO
    assert "found nothing in the cache" in run("rm", "org/fp8", "--yes").err


def test_who_is_asked_may_leave(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = store(cache, "org/demo", DEMO)
    for leaves in (KeyboardInterrupt, EOFError):
        monkeypatch.setattr("click.termui.visible_prompt_func", Mock(side_effect=leaves))
        result = run("rm", "org/demo", stdin=None, on_terminal=True)
        assert (result.status, result.err, snapshot.exists()) == (130, "\n", True)


def test_a_model_that_is_named_twice_is_removed_once(cache: Path) -> None:
    store(cache, "Qwen/Qwen3-0.6B-MLX-4bit", DEMO)
    names = ("qwen3:0.6b", "Qwen/Qwen3-0.6B-MLX-4bit", "qwen3:0.6b")
    assert run("rm", *names, "--dry-run").out.count("would remove") == 1
    assert run("rm", *names, "--yes").out.count("removed") == 1
    assert listed() == {}


def test_what_another_revision_shares_stays(cache: Path) -> None:
    first = store(cache, "Qwen/Qwen3-0.6B", DEMO, FIRST, "old")
    changed = {**DEMO, "config.json": DEMO["config.json"] + b"\n"}
    second = store(cache, "Qwen/Qwen3-0.6B", changed, SECOND)
    assert set(listed()) == {"Qwen/Qwen3-0.6B@1", "Qwen/Qwen3-0.6B@2"}
    for wrong in ("3333", "111", "new"):
        result = run("rm", "qwen3:0.6b-bf16", "--revision", wrong, "--yes")
        assert f"found nothing of revision '{wrong}'" in result.err
    done = run("rm", "qwen3:0.6b-bf16", "--revision", "1111", "--yes")
    freed = f"{len(DEMO['config.json'])} bytes"
    assert done.out == f"removed Qwen/Qwen3-0.6B (1111111; 1 other revision stays): {freed} freed\n"
    assert not first.exists()
    assert {path.name: path.read_bytes() for path in second.iterdir()} == changed
    assert run("rm", "qwen3:0.6b-bf16", "--revision", "main", "--yes").status == 0
    assert not second.parent.parent.exists()


def test_nothing_outside_the_cache_is_removed(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    first = store(cache, "org/demo", DEMO, FIRST, "old")
    store(cache, "org/demo", {**DEMO, "LICENSE": b"x"}, SECOND)
    (first / "NOTICE").symlink_to(precious)
    result = run("rm", "org/demo", "--revision", "old", "--yes")
    assert (result.status, precious.read_text()) == (1, "mine")
    assert "leads out of the model's folder" in result.err
    assert run("rm", "org/demo", "--yes").status == 0  # links go, what they lead to does not
    assert precious.read_text() == "mine"

    real = store(tmp_path / "elsewhere", "org/linked", DEMO).parent.parent
    (cache / "models--org--linked").symlink_to(real)
    assert "a link, expected a folder of the cache" in run("rm", "org/linked", "--yes").err
    assert (real / "snapshots" / FIRST / "config.json").exists()
    for name in ("org/..", "../precious.txt", str(tmp_path), "./none", "modelscope:org/.."):
        assert run("rm", name, "--yes").status == 1
    assert "./none: no such folder; it is a path, and no hub id" in run("rm", "./none", "--yes").err
    own = f"{tmp_path}: a path of this machine, expected a model that was downloaded"
    assert own in run("rm", str(tmp_path), "--yes").err
    assert precious.read_text() == "mine"


def test_what_cannot_be_removed_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(cache, "org/demo", DEMO)
    removal = removal_of("org/demo")
    monkeypatch.setattr("huggingface_hub.utils._cache_manager._try_delete_path", lambda *_, **__: None)
    with pytest.raises(HubError, match="cannot be removed"):
        removal.run()


def test_on_a_terminal_it_asks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = store(cache, "org/demo", DEMO)
    for answer, stays in (("n", True), ("y", False)):
        monkeypatch.setattr("click.termui.visible_prompt_func", lambda text, answer=answer: answer)
        done = run("rm", "org/demo", stdin=None)
        assert done.out == ("" if stays else f"removed org/demo: {size(DEMO)} freed\n")
        assert snapshot.exists() == stays


def test_another_answer_is_told_in_a_line_and_it_asks_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = store(cache, "org/demo", DEMO)
    answers = ["j", "\x1b[A", "ja " * 40, " NO "]
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: answers.pop(0))
    done = run("rm", "org/demo", stdin=None)
    assert (done.status, done.out, answers) == (0, "", [])
    first, second, third = (line for line in done.err.splitlines() if line.startswith("error"))
    assert first == "error: found 'j', expected y or n"
    assert second == "error: found '\\x1b[A', expected y or n"
    assert third.endswith("', expected y or n")
    assert len(third) < 80
    assert "Error" not in done.err
    assert snapshot.exists()
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: "Yes")
    assert run("rm", "org/demo", stdin=None).out.startswith("removed org/demo: ")


# Pulling


def test_a_model_is_pulled(tmp_path: Path) -> None:
    files = {**DEMO, "pytorch_model.bin": b"code"}
    llama = {**DEMO, "config.json": b'{"model_type": "llama"}'}
    models = {"org/demo": HubModel(files), "org/llama": HubModel(llama)}
    with running_hub({}) as elsewhere, running_hub(models) as hub:
        commands = Commands(hub.url, elsewhere, tmp_path)
        folder = commands.home / "hub" / "models--org--demo" / "snapshots" / COMMIT
        done = commands.run("pull", "org/demo")
        assert done == (0, f"org/demo (2.17 MB, fits this machine) is in {folder}\n", "")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == DEMO
        before = hub.sent_bytes
        assert commands.run("pull", "org/demo") == done
        assert hub.sent_bytes == before
        (row,) = json.loads(commands.run("list", "--json").out)["models"]
        assert (row["id"], row["refs"], row["path"], row["state"]) == ("org/demo", ["main"], str(folder), "ready")
        refused = commands.run("pull", "org/llama")
        assert (refused.status, "model_type" in refused.err) == (1, True)
        assert [path.name for path in commands.home.rglob("model.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("command", ["pull", "rm"])
@pytest.mark.parametrize("name", ["nope", "qwen3:5b", "./none", "Qwen3-4B"])
def test_hints_name_what_pull_and_rm_take(command: str, name: str) -> None:
    result = run(command, name)
    problem, hint = result.err.splitlines()
    assert (result.status, result.out) == (1, "")
    for word in ("hub id", "alias", "mlxqwen list --aliases", "mlxqwen list what is downloaded"):
        assert word in hint
    assert "Give a folder" not in result.err
    assert "existing folder" not in problem


@pytest.mark.parametrize("arguments", [["generate", "hi", "-m"], ["chat"], ["serve"], ["info"], ["bench"], ["convert"]])
def test_the_demo_by_its_name(arguments: list[str]) -> None:
    problem, hint = run(*arguments, "demo").err.splitlines()
    assert problem.startswith("error: 'demo': neither an existing folder nor a hub id")
    told = f"The demo model runs where no model is named; its folder is {DEMO_FOLDER}."
    assert hint.strip().startswith(told)
    assert resolve_model(DEMO_FOLDER) == resolve_model(None)
    for command in ("pull", "rm"):
        assert "The demo model comes with the package" in run(command, "demo").err


def test_what_is_no_model_of_a_hub_is_not_pulled() -> None:
    assert "a folder of this machine" in run("pull", str(DEMO_FOLDER)).err
    for path in ("./none", "../none", "/none", "~/none", "a/b/none", r"a\none"):
        told = f"error: {path}: no such folder; it is a path, and no hub id, which is written organisation/model\n"
        for arguments in (
            ["pull"],
            ["info"],
            ["rm", "--yes"],
            ["chat"],
            ["bench"],
            ["serve", "--port", "0"],
            ["convert"],
        ):
            result = run(*arguments, path)
            assert (result.status, result.err.startswith(told), result.err.count("\n")) == (1, True, 2), result.err
            assert "or a hub id, such as Qwen/Qwen3-0.6B" in result.err
    assert run("pull").status == 2


# Sizes of what is not downloaded


@pytest.mark.parametrize(
    ("form", "kind", "bits"), [("BF16", "mlx", 16), ("MLX-4bit", "mlx", 4), ("MLX-6bit", "mlx", 6)]
)
@pytest.mark.parametrize("size", ["0.6B", "8B", "30B-A3B"])
def test_releases_take_what_their_headers_say(tmp_path: Path, size: str, form: str, kind: str, bits: int) -> None:
    folder = write_sparse(tmp_path / "model", dict(RELEASES[size]), bits=bits, form=kind)
    read, known = measure(folder), footprints_of_form(ModelConfig.from_folder(folder), form)
    assert known is not None
    assert known[0] == known[1] == replace(read, config=known[0].config)


@pytest.mark.parametrize(("form", "kind", "bits"), [("FP8", "fp8", 8), ("AWQ", "awq", 4)])
@pytest.mark.parametrize("size", ["0.6B", "32B"])
def test_releases_take_what_their_conversions_would(tmp_path: Path, size: str, form: str, kind: str, bits: int) -> None:
    folder = write_sparse(tmp_path / "model", dict(RELEASES[size]), bits=bits, form=kind)
    known = footprints_of_release(f"Qwen/Qwen3-{size}-{form}")
    assert known is not None
    stored, loaded = known
    assert stored == replace(measure(folder), config=stored.config)
    assert (loaded.dtype, loaded.packed_bytes, loaded.numbers) == planned(folder)[0]


def test_gptq_takes_what_its_conversion_would(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "gptq", "gptq", group_size=128).write().folder
    config = ModelConfig.from_folder(folder)
    known = footprints_of_form(config, "GPTQ-Int4")
    assert known is not None
    assert known[0].disk_bytes == measure(folder).disk_bytes
    assert (known[1].packed_bytes, known[1].numbers) == planned(folder)[0][1:]


def test_every_alias_is_listed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mac = Device("a Mac", True, 16 << 30, (16 << 30) * 2 // 3)
    monkeypatch.setattr("mlxqwen.device.current_device", lambda: mac)
    store(cache, "Qwen/Qwen3-4B-MLX-4bit", DEMO)
    rows = {row["alias"]: row for row in json.loads(run("list", "--aliases", "--json").out)["aliases"]}
    assert {alias: row["id"] for alias, row in rows.items()} == dict(ALIASES)
    assert all(row["bytes"] and row["memory_bytes"] for row in rows.values())
    # As the README's table of Macs has it.
    assert [rows[f"qwen3:{name}"]["fits"] for name in ("4b-bf16", "8b-8bit", "14b", "14b-8bit")] == [
        True,
        True,
        True,
        False,
    ]
    assert [alias for alias, row in rows.items() if row["downloaded"]] == ["qwen3:4b", "qwen3:4b-4bit"]
    small = {
        row["alias"]: row for row in json.loads(run("list", "--aliases", "--context", "1", "--json").out)["aliases"]
    }
    config = RELEASES["4B"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * 128 * 2
    assert rows["qwen3:4b"]["memory_bytes"] - small["qwen3:4b"]["memory_bytes"] == 8191 * token
    table = run("list", "--aliases").out.splitlines()
    assert len(table) == 1 + len(ALIASES)
    assert table[0].split() == ["alias", "model", "size", "in", "memory", "fits", "downloaded"]
