"""Models of the hub are looked at before their weights are downloaded; nothing is, where a header is enough."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pexpect
import pytest

from mlxqwen.errors import HubError
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.files.preview import Listing, bytes_of, check_room
from tests.loopback_hub import HubModel, LoopbackHub, running_hub
from tests.sparse_checkpoints import write_sparse
from tests.test_hub import Client
from tests.tiny_checkpoints import DENSE, make_weights, write_folder

ROOT = Path(__file__).parents[1]
TOKENIZER = {
    name: (DEMO_FOLDER / name).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
}
WEIGHTS = 20_000_000
"""Bytes of weights at least, of which no test may see many."""


TOOLS = [*sorted((ROOT / "tests/data/auto_round").iterdir()), ROOT / "tests/data/gptq_model"]
SMALL = {**DENSE, "vocab_size": 768}
BIAS = "model.layers.0.self_attn.q_proj.bias"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} | TOKENIZER


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "tie_word_embeddings": True}
    folder = tmp_path_factory.mktemp("models")
    whole = files_of(write_sparse(folder / "whole", config))
    assert len(whole["model.safetensors"]) > WEIGHTS
    fp8 = files_of(write_sparse(folder / "fp8", config, form="fp8", bits=8))
    llama = whole | {"config.json": json.dumps({**config, "model_type": "llama"}).encode()}
    damaged = whole | {"model.safetensors": whole["model.safetensors"][:-3]}
    foreign = whole | {"tokenizer.json": b"<html>", "config.json": whole["config.json"]}
    biased = files_of(write_folder(folder / "biased", SMALL, {**make_weights(SMALL), BIAS: np.zeros(64, np.float32)}))
    wrong = files_of(write_folder(folder / "wrong", SMALL, {**make_weights(SMALL), BIAS: np.ones(64, np.float32)}))
    claimed = {**SMALL, "quantization": {"mode": "mxfp4", "bits": 4, "group_size": 32}}
    tools = {f"org/{path.name}": files_of(path) for path in TOOLS}
    return {
        **tools,
        "org/biased": biased,
        "org/wrong": wrong,
        "org/tuned": biased | {f"{name}/adapters.safetensors": bytes(9) for name in ("adapters", "..", "a/b", "new\n")},
        "org/claimed": files_of(write_folder(folder / "claimed", claimed, make_weights(SMALL))),
        "org/whole": whole,
        "org/fp8": fp8,
        "org/llama": llama,
        "org/damaged": damaged,
        "org/foreign": foreign,
    }


@pytest.fixture
def hub(models: dict[str, dict[str, bytes]]) -> Iterator[LoopbackHub]:
    with running_hub({name: HubModel(files) for name, files in models.items()}) as server:
        yield server


class Ended(NamedTuple):
    status: int
    out: str
    err: str


class Commands:
    """`mlxqwen` in processes of its own, with an empty cache of the hub."""

    def __init__(self, url: str, elsewhere: LoopbackHub, folder: Path) -> None:
        self.environment = Client(url, elsewhere, folder / "home").environment
        self.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "convert")])
        self.home = folder / "home"

    def run(self, *arguments: str, **environment: str) -> Ended:
        command = [sys.executable, "-m", "mlxqwen", *arguments]
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def weights_kept(self) -> list[Path]:
        return [
            path
            for path in self.home.rglob("*")
            if path.is_file() and not path.is_symlink() and path.stat().st_size > WEIGHTS // 2
        ]


@pytest.fixture
def commands(hub: LoopbackHub, tmp_path: Path) -> Iterator[Commands]:
    with running_hub({}) as elsewhere:
        yield Commands(hub.url, elsewhere, tmp_path)


@pytest.mark.parametrize("ignores_ranges", [False, True])
@pytest.mark.parametrize("model", ["org/whole", "org/fp8"])
def test_info_reads_headers_alone(hub: LoopbackHub, commands: Commands, model: str, ignores_ranges: bool) -> None:
    hub.ignores_ranges = ignores_ranges
    done = commands.run("info", model, "--json")
    assert (done.status, done.err) == (0, "")
    facts = json.loads(done.out)
    assert facts["disk_bytes"] > WEIGHTS // 2
    assert facts["model"] == model
    assert commands.weights_kept() == []
    if not ignores_ranges:
        small = sum(len(content) for name, content in hub.models[model].files.items() if ".safetensors" not in name)
        assert hub.sent_bytes <= small + (1 << 18)


def test_adapters_beside_weights_are_told_and_not_downloaded(hub: LoopbackHub, commands: Commands) -> None:
    note = "adapters in folders beside the weights are not applied: adapters/adapters.safetensors"
    assert note in json.loads(commands.run("info", "org/tuned", "--json").out)["notes"]
    done = commands.run("generate", "Hello", "--model", "org/tuned", "--max-tokens", "1")
    assert done.err.count(note) == 1, done.err
    assert not [name for name in hub.downloaded() if "adapters" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biased", "claimed", *(path.name for path in TOOLS)])
def test_a_model_is_planned_as_its_folder_would_be(
    hub: LoopbackHub, commands: Commands, name: str, tmp_path: Path
) -> None:
    """Numbers that only the weights tell are not taken from a preview, which has zeros in their place."""
    folder = tmp_path / name
    folder.mkdir()
    for file, content in hub.models[f"org/{name}"].files.items():
        (folder / file).write_bytes(content)
    remote, local = (json.loads(commands.run("info", model, "--json").out) for model in (f"org/{name}", str(folder)))
    for facts in (remote, local):
        del facts["model"], facts["path"], facts["notes"]
    if local["tokenizer_error"]:  # begins with the file, by the name that was asked for
        local["tokenizer_error"] = local["tokenizer_error"].replace(str(folder), f"org/{name}")
    assert remote == local
    done = commands.run("convert", f"org/{name}", str(tmp_path / "out"), "--strict")
    assert done.status == commands.run("convert", str(folder), str(tmp_path / "out2"), "--strict").status, done.err


@pytest.mark.slow
def test_notes_are_told_once_and_biases_after_the_download(commands: Commands) -> None:
    done = commands.run("generate", "Hello", "--model", "org/biased", "--max-tokens", "1")
    assert done.err.count("left out biases that are all zeros") == 1, done.err
    done = commands.run("generate", "Hello", "--model", "org/claimed", "--max-tokens", "1")
    assert done.err.count("config.json says that the weights are quantized (MLX), none is") == 1, done.err
    wrong = commands.run("generate", "Hello", "--model", "org/wrong", "--max-tokens", "1")
    assert "found biases that are not zero" in wrong.err
    assert "all zeros" not in wrong.err


def test_a_header_that_no_release_has_is_not_fetched(hub: LoopbackHub, commands: Commands) -> None:
    files = hub.models["org/whole"].files
    hub.models["org/huge"] = HubModel(
        {**files, "model.safetensors": (17 << 20).to_bytes(8, "little") + bytes(18 << 20)}
    )
    done = commands.run("info", "org/huge")
    assert (done.status, len(done.err.splitlines())) == (1, 2)
    assert "org/huge/model.safetensors: found a header of 17,825,800 bytes, expected at most 16,777,216" in done.err
    assert hub.sent_bytes < 4 << 20


def test_a_dry_run_reads_headers_alone(hub: LoopbackHub, commands: Commands, tmp_path: Path) -> None:
    done = commands.run("convert", "org/whole", str(tmp_path / "out"), "--dry-run")
    assert done.status == 0, done.err
    assert commands.weights_kept() == []
    assert hub.sent_bytes < WEIGHTS // 4


@pytest.mark.parametrize("command", [["generate", "Hello", "--model"], ["convert"]], ids=str)
def test_another_kind_of_model_is_refused_by_its_configuration_alone(
    hub: LoopbackHub, commands: Commands, command: list[str], tmp_path: Path
) -> None:
    more = [str(tmp_path / "out")] if command == ["convert"] else []
    done = commands.run(*command, "org/llama", *more)
    assert done.status == 1
    assert "org/llama" in done.err
    assert "'llama'" in done.err
    assert len(done.err.splitlines()) <= 2
    assert hub.downloaded() == {"config.json"}


@pytest.mark.parametrize(("model", "named"), [("org/damaged", "model.safetensors"), ("org/foreign", "tokenizer.json")])
def test_what_is_wrong_is_told_before_weights_come(
    hub: LoopbackHub, commands: Commands, model: str, named: str
) -> None:
    done = commands.run("generate", "Hello", "--model", model)
    assert done.status == 1
    assert done.err.startswith(f"error: {model}/{named}: ") or f"{model}/{named}" in done.err, done.err
    assert "mlxqwen-preview" not in done.err
    assert commands.weights_kept() == []
    assert hub.sent_bytes < WEIGHTS // 4


def test_info_tells_of_a_tokenizer_that_cannot_be_used(commands: Commands) -> None:
    facts = json.loads(commands.run("info", "org/foreign", "--json").out)
    assert facts["tokenizer_error"].startswith("org/foreign/tokenizer.json: ")
    assert not commands.weights_kept()


def test_a_model_that_is_there_is_not_downloaded_again(hub: LoopbackHub, commands: Commands) -> None:
    assert commands.run("generate", "Hello", "--model", "org/whole", "--max-tokens", "1").status == 0
    assert len(commands.weights_kept()) == 1
    hub.requests.clear()
    assert commands.run("info", "org/whole").status == 0
    assert hub.downloaded() == set()
    assert (
        commands.run("generate", "Hello", "--model", "org/whole", "--max-tokens", "1", HF_HUB_OFFLINE="1").status == 0
    )


def test_a_hub_that_never_answers_is_told(models: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, running_hub({}) as elsewhere:
        commands = Commands(f"http://127.0.0.1:{silent.getsockname()[1]}", elsewhere, tmp_path)
        done = commands.run("generate", "Hello", "--model", "org/whole", HF_HUB_ETAG_TIMEOUT="1")
    assert done.status == 1
    assert "the hub cannot be reached: no answer in 1 seconds (HF_HUB_ETAG_TIMEOUT sets them)" in done.err
    assert len(done.err.splitlines()) == 2


def test_a_download_that_stops_is_given_up(hub: LoopbackHub, commands: Commands) -> None:
    hub.models["org/whole"].stalled.add("model.safetensors")
    done = commands.run("generate", "Hello", "--model", "org/whole", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert done.status == 1
    assert "org/whole: no such folder here, " in done.err
    assert (
        "the hub cannot be reached: nothing came for 4 seconds (HF_HUB_DOWNLOAD_TIMEOUT sets half of them)" in done.err
    )
    assert len(done.err.splitlines()) == 2
    hub.models["org/whole"].stalled.clear()
    assert commands.run("generate", "Hello", "--model", "org/whole", "--max-tokens", "1").status == 0


def test_ctrl_c_ends_a_download_that_has_stopped(hub: LoopbackHub, commands: Commands) -> None:
    """Its connection would be given up after ten minutes."""
    hub.models["org/whole"].stalled.add("model.safetensors")
    command = shlex.join([sys.executable, "-m", "mlxqwen", "generate", "Hello", "--model", "org/whole"])
    terminal = pexpect.spawn(command, env=commands.environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}, timeout=120)
    terminal.expect_exact("Looking up org/whole")
    terminal.expect_exact("Downloading org/whole")
    terminal.expect_exact("nothing for")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130
    assert terminal.before is not None
    assert b"Traceback" not in terminal.before
    assert terminal.before.endswith(b"\r\n")


def test_a_disk_without_room_is_told_before_anything_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place, blobs = tmp_path / "hub" / "models--org--m", tmp_path / "hub" / "models--org--m" / "blobs"
    listing = Listing(
        name="org/m",
        commit="c",
        sizes={"config.json": 10, "model.safetensors": 6_000},
        missing=("config.json", "model.safetensors"),
        place=place,
        setting="HF_HOME",
        begun=lambda: bytes_of(blobs, "*.incomplete"),
        first_bytes=lambda name, count: b"",
    )
    usage = shutil.disk_usage(tmp_path)
    for free in (6_010, 6_009):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if free == 6_010:
            check_room(listing)
            continue
        with pytest.raises(HubError, match=r"^org/m: 0.0 GB are to be downloaded, the disk of .* has 0.0 GB free"):
            check_room(listing)
        blobs.mkdir(parents=True)
        (blobs / "x.incomplete").write_bytes(bytes(100))
        check_room(listing)  # of what has come already nothing is needed
