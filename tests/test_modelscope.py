"""Models of ModelScope, by its own client, against a hub of our own on loopback."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

import mlxqwen
from mlxqwen.errors import HubError, OptionError
from mlxqwen.files import hub_source, modelscope
from mlxqwen.files.hub import DEMO_FOLDER, cached_folder, located, resolve_model
from mlxqwen.files.hub_source import Source
from tests.command_line import run as run_command
from tests.loopback_hub import LoopbackHub, running_hub
from tests.loopback_modelscope import LoopbackModelScope, ModelScopeModel, running_modelscope
from tests.sparse_checkpoints import write_sparse
from tests.test_hub import RESOLVE, UNWANTED, WANTED
from tests.test_hub import files_in as all_files_in

DEMO = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir() if path.is_file()}
OUTSIDE = [
    "../model.safetensors",
    "model/../../model.safetensors",
    "additional_chat_templates/../../x.jinja",
    "/tmp/model.safetensors",
    "..\\model.safetensors",
    "a/\0",
]


class Client:
    """Calls `resolve_model` in a process of its own; whatever leaves 127.0.0.1 would reach `elsewhere`."""

    def __init__(self, url: str, elsewhere: LoopbackHub, home: Path) -> None:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_", "MLXQWEN_"))
        }
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), elsewhere.url)
        self.environment = {
            **kept,
            **proxies,
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
            **settings(url, home),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RESOLVE, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=180,
        )


def settings(url: str, home: Path) -> dict[str, str]:
    """The environment of ModelScope's client; attempts are few, for the run to be short."""
    return {
        "MODELSCOPE_ENDPOINT": url,
        "MODELSCOPE_CACHE": str(home / "cache"),
        "MODELSCOPE_HOME": str(home / "home"),
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
        "MODELSCOPE_API_MAX_RETRIES": "1",
        "MODELSCOPE_API_TIMEOUT": "60",  # by default 10: more is lost where the machine has other things to do
        "MODELSCOPE_DOWNLOAD_TIMEOUT": "60",
    }


@pytest.fixture
def hub() -> Iterator[LoopbackModelScope]:
    models = {
        "org/model": ModelScopeModel({**WANTED, **UNWANTED}, revisions={"master", "v2"}),
        "org/demo": ModelScopeModel(DEMO),
        "org/tuned": ModelScopeModel({**WANTED, "checkpoint-9/adapter_model.safetensors": b"x"}),
        "org/private": ModelScopeModel(WANTED, token="ms-secret"),
        "org/unsteady": ModelScopeModel(WANTED, cuts=1),
        "org/broken": ModelScopeModel(WANTED, broken={"tokenizer.json"}),
        "org/changed": ModelScopeModel(WANTED, changed={"model.safetensors"}),
        **{f"org/status-{status}": ModelScopeModel(WANTED, status=status) for status in (403, 418, 429, 503)},
        **{f"org/outside-{n}": ModelScopeModel({**WANTED, path: b"x"}) for n, path in enumerate(OUTSIDE)},
        "org/gguf": ModelScopeModel({"model.gguf": b"GGUF"}),
        "org/weightless": ModelScopeModel({"config.json": b"{}"}),
    }
    with running_modelscope(models) as server:
        yield server


@pytest.fixture
def here(hub: LoopbackModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process's client use the loopback hub; it has read how often it tries when it was imported."""
    from modelscope_hub import _download, _legacy_api, config

    for name, value in settings(hub.url, tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_OFFLINE", "MLXQWEN_USE_MODELSCOPE", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "_default_config", None)
    monkeypatch.setattr(_legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(_download, "DOWNLOAD_RETRY_TIMES", 1)
    monkeypatch.setattr(_download, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.0)


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of the model."""
    return {path: content for path, content in all_files_in(folder).items() if path != ".mlxqwen-checked.json"}


def failure(name: str, **options: Any) -> str:
    with pytest.raises(HubError) as caught:
        resolve_model(name, **options)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_downloads_what_is_needed_and_serves_it_offline(hub: LoopbackModelScope, tmp_path: Path) -> None:
    with running_hub({}) as elsewhere:
        client = Client(hub.url, elsewhere, tmp_path)
        first = client.run("modelscope:org/model")
        assert (first.returncode, first.stderr) == (0, "")
        folder = Path(first.stdout.strip())
        assert files_in(folder) == WANTED
        assert hub.downloaded() == set(WANTED)
        assert folder.is_relative_to(tmp_path / "cache")

        hub.requests.clear()
        again = client.run("org/model", MLXQWEN_USE_MODELSCOPE="true", HF_HUB_OFFLINE="1")
        assert (again.returncode, again.stdout) == (0, first.stdout)
        assert hub.requests == []
        unreachable = client.run("modelscope:org/model", MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
        assert (unreachable.returncode, unreachable.stdout) == (0, first.stdout)
        assert elsewhere.requests == []


def test_progress_is_shown_on_a_terminal(hub: LoopbackModelScope, tmp_path: Path) -> None:
    with running_hub({}) as elsewhere:
        client = Client(hub.url, elsewhere, tmp_path)
        command = shlex.join([sys.executable, "-c", RESOLVE, "modelscope:org/model"])
        output, status = pexpect.run(command, env=client.environment, withexitstatus=True, timeout=60)
    assert status == 0
    assert output.startswith(b"\rLooking up modelscope:org/model\r\x1b[K\rDownloading modelscope:org/model ")
    assert b"tokenizer.json" not in output


@pytest.mark.usefixtures("here")
def test_what_is_there_is_neither_downloaded_nor_read_again(
    hub: LoopbackModelScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelscope_hub._download import DownloadManager

    folder = resolve_model("modelscope:org/model")
    hub.requests.clear()
    looked_at: list[Path] = []
    cache_hit = DownloadManager._cache_hit

    def recorded(target: Path, *arguments: Any, **options: Any) -> bool:
        looked_at.append(target)
        return bool(cache_hit(target, *arguments, **options))

    monkeypatch.setattr(DownloadManager, "_cache_hit", staticmethod(recorded))
    assert resolve_model("modelscope:org/model") == folder
    assert (looked_at, hub.downloaded()) == ([], set())
    # Files that were changed here or there are seen, and so is a record that was lost.
    (folder / "tokenizer.json").write_bytes(b"?" * len(WANTED["tokenizer.json"]))
    hub.models["org/model"].files["vocab.json"] = b"[]"
    assert files_in(resolve_model("modelscope:org/model")) == {**WANTED, "vocab.json": b"[]"}
    assert hub.downloaded() == {"tokenizer.json", "vocab.json"}
    hub.requests.clear()
    (folder / ".mlxqwen-checked.json").write_text("{")
    resolve_model("modelscope:org/model")
    assert len({*looked_at}) == len(WANTED)
    assert hub.downloaded() == set()


@pytest.mark.usefixtures("here")
def test_adapters_beside_weights_are_told(hub: LoopbackModelScope, caplog: pytest.LogCaptureFixture) -> None:
    folder = resolve_model("modelscope:org/tuned")
    assert files_in(folder) == WANTED
    told = [record.getMessage() for record in caplog.records if record.name == "mlxqwen"]
    assert told == ["adapters in folders beside the weights are not applied: checkpoint-9/adapter_model.safetensors"]


@pytest.mark.usefixtures("here")
def test_revisions() -> None:
    assert resolve_model("modelscope:org/model", revision="v2").name == "v2"
    assert "modelscope:org/model: the model has no revision 'v9'" in failure("modelscope:org/model", revision="v9")
    with pytest.raises(OptionError, match="revision"):
        resolve_model("modelscope:org/model", revision="../v2")


def test_the_token_opens_a_private_model(hub: LoopbackModelScope, tmp_path: Path) -> None:
    with running_hub({}) as elsewhere:
        client = Client(hub.url, elsewhere, tmp_path)
        assert "misspelt, or the model is private" in client.run("modelscope:org/private").stderr
        refused = client.run("modelscope:org/private", MODELSCOPE_API_TOKEN="ms-wrong").stderr
        assert "ModelScope refused the token" in refused
        assert "ms-wrong" not in refused
        assert client.run("modelscope:org/private", MODELSCOPE_API_TOKEN="ms-secret").returncode == 0


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("repo_id", "said"),
    [
        ("org/nothing", "no such folder here, and not found on ModelScope"),
        ("org/gguf", "found GGUF files (model.gguf), which are not read"),
        ("org/weightless", "no safetensors weights"),
        ("org/status-403", "ModelScope answered 403"),
        ("org/status-418", "the download failed"),
        ("org/status-429", "too many requests"),
        ("org/status-503", "ModelScope answered 503"),
        ("org/broken", "ModelScope answered 500"),
        ("org/changed", "model.safetensors is not what ModelScope lists (size or SHA-256)"),
        ("org", "neither an existing folder nor a hub id"),
        ("org/模型", "neither an existing folder nor a hub id"),
        ("org/..", "neither an existing folder nor a hub id"),
    ],
)
def test_failures_have_one_clear_line(repo_id: str, said: str) -> None:
    told = failure(f"modelscope:{repo_id}")
    assert said in told
    assert f"modelscope:{repo_id}" in told


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", range(len(OUTSIDE)))
def test_names_outside_the_folder_are_refused(hub: LoopbackModelScope, tmp_path: Path, number: int) -> None:
    assert "the hub lists a file" in failure(f"modelscope:org/outside-{number}")
    assert hub.downloaded() == set()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.usefixtures("here")
def test_an_interrupted_download_goes_on(hub: LoopbackModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files_in(resolve_model("modelscope:org/unsteady")) == WANTED
    resumed = [request for request in hub.requests if request.first_byte]
    assert [request.file for request in resumed] == ["model.safetensors"]

    assert "ModelScope answered 500" in failure("modelscope:org/broken")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder,) = Path(os.environ["MODELSCOPE_CACHE"]).glob("models/org--broken/snapshots/master")
    (folder / "tokenizer.json").write_bytes(b"x")
    (folder / "model.safetensors.incomplete").write_bytes(b"x")
    told = failure("modelscope:org/broken")
    assert "it is not completely in ModelScope's cache, and HF_HUB_OFFLINE forbids to download it" in told
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (folder / "model.safetensors.incomplete").unlink()
    hub.models["org/broken"].broken.clear()
    hub.requests.clear()
    assert files_in(resolve_model("modelscope:org/broken")) == WANTED
    assert hub.downloaded() == {"tokenizer.json"}


@pytest.mark.usefixtures("here")
def test_an_earlier_download_without_a_shard_is_not_complete(
    hub: LoopbackModelScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = b'{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    hub.models["org/model"].files["model.safetensors.index.json"] = index
    resolve_model("modelscope:org/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not completely" in failure("modelscope:org/model")


@pytest.mark.usefixtures("here")
def test_without_hub_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://bob:s3cr3t@127.0.0.1:9")
    told = failure("modelscope:org/model")
    assert "ModelScope cannot be reached: Connection refused" in told
    assert "MODELSCOPE_ENDPOINT" in told
    assert "s3cr3t" not in told


@pytest.mark.usefixtures("here")
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import modelscope_hub

    def late(*arguments: object, **options: object) -> None:
        raise modelscope_hub.RequestTimeoutError("[E1001] 下载总时限已耗尽")

    monkeypatch.setattr(modelscope_hub.HubApi, "list_repo_files", late)
    assert "ModelScope cannot be reached: no answer in time" in failure("modelscope:org/model")


@pytest.mark.usefixtures("here")
def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import modelscope_hub

    folder, speaks = resolve_model("modelscope:org/model"), threading.Event()

    def silent(*arguments: object, **options: object) -> list[object]:
        speaks.wait()
        return []

    monkeypatch.setattr(modelscope_hub.HubApi, "list_repo_files", silent)
    monkeypatch.setenv("MODELSCOPE_API_TIMEOUT", "0.1")
    assert resolve_model("modelscope:org/model") == folder  # an earlier download
    told = failure("modelscope:org/demo")
    assert (
        "ModelScope cannot be reached: nothing came for 0.2 seconds (MODELSCOPE_API_TIMEOUT sets half of them)" in told
    )
    speaks.set()


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1", "1e999"])
@pytest.mark.usefixtures("here")
def test_seconds_that_never_end_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TIMEOUT", value)
    told = failure("modelscope:org/model")
    assert f"MODELSCOPE_API_TIMEOUT: found '{value}', expected seconds, above 0 and with an end" in told
    assert "or unset it" in told


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert 'pip install "mlxqwen[modelscope]"' in failure("modelscope:org/model")


@pytest.mark.usefixtures("here")
def test_the_variable_makes_it_the_default(hub: LoopbackModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = hub_source.downloaded

    def from_either(source: Source, check: object) -> Path:
        return downloaded(source) if source.place.is_on_modelscope else Path("the other hub")

    monkeypatch.setattr(hub_source, "downloaded", from_either)
    for value, is_default in (("", False), ("false", False), ("0", False), ("True", True), ("1", True)):
        monkeypatch.setenv("MLXQWEN_USE_MODELSCOPE", value)
        assert (resolve_model("org/model") != Path("the other hub")) == is_default
    monkeypatch.setenv("MLXQWEN_USE_MODELSCOPE", "maybe")
    with pytest.raises(OptionError, match="MLXQWEN_USE_MODELSCOPE: found 'maybe'"):
        resolve_model("org/model")
    assert resolve_model() == DEMO_FOLDER


@pytest.mark.usefixtures("here")
def test_aliases_and_pages(hub: LoopbackModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = hub_source.downloaded

    def from_either(source: Source, check: object) -> Path:
        place = source.place
        return downloaded(source) if place.is_on_modelscope else Path("the other hub") / place.repo_id

    monkeypatch.setattr(hub_source, "downloaded", from_either)
    hub.models["Qwen/Qwen3-4B-FP8"] = ModelScopeModel(WANTED)
    assert "Qwen--Qwen3-4B-FP8" in resolve_model("modelscope:qwen3:4b-fp8").parts
    monkeypatch.setenv("MLXQWEN_USE_MODELSCOPE", "true")
    assert "Qwen--Qwen3-4B-FP8" in resolve_model("qwen3:4b-fp8").parts
    page = "https://huggingface.co/Qwen/Qwen3-4B-FP8"  # says whose it is
    assert resolve_model(page) == Path("the other hub/Qwen/Qwen3-4B-FP8")


@pytest.mark.usefixtures("here")
def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("modelscope_hub.HubApi.download_repo", full)
    assert "the disk is full" in failure("modelscope:org/model")


@pytest.mark.usefixtures("here")
def test_wherever_a_model_can_be_named(tmp_path: Path) -> None:
    name = "modelscope:org/demo"
    assert run_command("generate", "Hello", "--model", name, "--max-tokens", "1").status == 0
    info = run_command("info", name, "--json")
    assert (info.status, "parameters" in info.out) == (0, True)
    converted = run_command("convert", name, str(tmp_path / "out"), "--bits", "8")
    assert converted.status == 0, converted
    assert "base_model: org/demo\n" in (tmp_path / "out" / "README.md").read_text()
    model, _ = mlxqwen.load(name)
    assert mlxqwen.Engine.load(draft=name).model.config == model.config
    nothing = run_command("generate", "Hello", "--model", "modelscope:org/nothing")
    assert (nothing.status, nothing.out) == (1, "")
    assert "not found on ModelScope" in nothing.err


@pytest.fixture
def large(hub: LoopbackModelScope, tmp_path: Path) -> int:
    """A model whose weights are larger than all else, and two that are refused → bytes of its weights."""
    config = json.loads(DEMO["config.json"])
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "tie_word_embeddings": True}
    files = DEMO | {path.name: path.read_bytes() for path in write_sparse(tmp_path / "large", config).iterdir()}
    llama = files | {"config.json": json.dumps({**config, "model_type": "llama"}).encode()}
    damaged = files | {"model.safetensors": files["model.safetensors"][:-3]}
    for name, content in (("large", files), ("llama", llama), ("damaged", damaged)):
        hub.models[f"org/{name}"] = ModelScopeModel(content)
    return len(files["model.safetensors"])


@pytest.mark.usefixtures("here")
def test_it_is_looked_at_before_its_weights_come(hub: LoopbackModelScope, large: int, tmp_path: Path) -> None:
    info = run_command("info", "modelscope:org/large", "--json")
    assert (info.status, json.loads(info.out)["model"]) == (0, "modelscope:org/large"), info
    planned = run_command("convert", "modelscope:org/large", str(tmp_path / "out"), "--dry-run")
    assert planned.status == 0, planned
    assert hub.sent_bytes < large // 4
    hub.requests.clear()
    llama = run_command("generate", "Hello", "--model", "modelscope:org/llama")
    assert llama.status == 1
    assert "modelscope:org/llama" in llama.err
    assert "'llama'" in llama.err
    assert hub.downloaded() == {"config.json"}
    damaged = run_command("generate", "Hello", "--model", "modelscope:org/damaged")
    assert damaged.status == 1
    assert "modelscope:org/damaged/model.safetensors" in damaged.err
    assert "mlxqwen-preview" not in damaged.err
    assert hub.sent_bytes < large // 2
    loaded = run_command("generate", "Hello", "--model", "modelscope:org/large", "--max-tokens", "1")
    assert loaded.status == 0, loaded
    hub.requests.clear()
    assert run_command("info", "modelscope:org/large").status == 0
    assert len(hub.requests) == 1  # the list


@pytest.mark.usefixtures("here")
def test_a_download_that_stops_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelscope_hub import HubApi

    real, stopped = HubApi.download_repo, threading.Event()

    def stops(*arguments: Any, **options: Any) -> Any:
        if options.get("file_list"):
            stopped.wait()
            raise OSError
        return real(*arguments, **options)

    monkeypatch.setattr(HubApi, "download_repo", stops)
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_TIMEOUT", "0.2")
    told = failure("modelscope:org/model")
    assert "ModelScope cannot be reached: nothing came for 0.4 seconds (MODELSCOPE_DOWNLOAD_TIMEOUT sets half" in told
    stopped.set()


def test_nothing_of_it_is_loaded_without_need() -> None:
    program = "import sys; from mlxqwen.files.hub import resolve_model; resolve_model(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"modelscope_hub", "requests", modelscope.__name__} & {*loaded}


@pytest.mark.usefixtures("here")
def test_what_the_cache_has_is_found_without_the_hub(hub: LoopbackModelScope) -> None:
    place = located("modelscope:org/demo", None)
    assert isinstance(place, hub_source.HubModel)
    assert cached_folder(place) == (None, False)
    folder = resolve_model("modelscope:org/demo")
    asked = len(hub.requests)
    assert cached_folder(place) == (folder, True)
    (folder / "model.safetensors").unlink()
    assert cached_folder(place) == (folder, False)
    assert len(hub.requests) == asked
