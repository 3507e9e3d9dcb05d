"""Against a hub of our own on loopback, in fresh processes: the client reads its environment once."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from mlxqwen.errors import HubError, MlxqwenError, OptionError
from mlxqwen.files.hub import DEMO_FOLDER, resolve_model
from mlxqwen.files.hub_errors import hub_error
from tests.loopback_hub import COMMIT, HubModel, LoopbackHub, running_hub, unasked_hub

WANTED = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": bytes(range(256)) * 200,
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "README.md": b"#",
    "LICENSE": b"as you like",
    "vocab.json": b"{}",
}
UNWANTED = {
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"PK",
    "model.gguf": b"GGUF",
    "licenses/LICENSE": b"x",
    "docs/README.md": b"#",
    "onnx/config.json": b"{}",
    "original/consolidated.safetensors": b"x",
    "consolidated.safetensors": b"x",
    "model/model.safetensors": b"x",
    "adapters/config.json": b"{}",
    "additional_chat_templates/old/tool_use.jinja": b"x",
    "trainer_state.json": b"{}",
}
RESOLVE = """
import sys
from mlxqwen.errors import MlxqwenError
from mlxqwen.files.hub import resolve_model
try:
    print(resolve_model(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None))
except MlxqwenError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Client:
    """Calls `resolve_model` in a process of its own; whatever leaves 127.0.0.1 would reach `elsewhere`."""

    def __init__(self, hub_url: str, elsewhere: LoopbackHub, home: Path) -> None:
        inherited = {
            name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))
        }
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), elsewhere.url)
        self.environment = {
            **inherited,
            **proxies,
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(home),
            # A busy machine takes its time; a connection that is given up is another error than the one looked for.
            "HF_HUB_ETAG_TIMEOUT": "60",
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RESOLVE, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def folder(self, *arguments: str, **environment: str) -> Path:
        done = self.run(*arguments, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        return Path(done.stdout.strip())

    def failure(self, *arguments: str, **environment: str) -> str:
        done = self.run(*arguments, **environment)
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.strip().splitlines()) <= 2
        assert done.stderr.startswith("HubError: ")
        return done.stderr


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    models = {
        "org/model": HubModel({**WANTED, **UNWANTED}, revisions={"main", "v2"}),
        "org/private": HubModel(WANTED, token="hf_secret"),
        "org/gated": HubModel(WANTED, gated=True),
        "org/unsteady": HubModel(WANTED, cuts=1),
        "org/broken": HubModel(WANTED, broken={"tokenizer.json"}),
        **{f"org/status-{status}": HubModel(WANTED, status=status) for status in (403, 418, 429, 503)},
        "org/gguf": HubModel({"model.gguf": b"GGUF"}),
        "org/weightless": HubModel({"config.json": b"{}"}),
    }
    with running_hub(models) as server:
        yield server


@pytest.fixture
def elsewhere() -> Iterator[LoopbackHub]:
    with unasked_hub() as server:
        yield server


@pytest.fixture
def client(hub: LoopbackHub, elsewhere: LoopbackHub, tmp_path: Path) -> Client:
    return Client(hub.url, elsewhere, tmp_path / "home")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_downloads_what_is_needed_and_serves_it_offline(hub: LoopbackHub, client: Client) -> None:
    folder = client.folder("org/model")
    assert files_in(folder) == WANTED
    assert hub.downloaded() == set(WANTED)
    assert folder.is_relative_to(client.environment["HF_HOME"])

    hub.requests.clear()
    assert client.folder("org/model", HF_HUB_OFFLINE="1") == folder
    assert hub.requests == []
    assert client.folder("org/model", HF_ENDPOINT="http://127.0.0.1:9") == folder


def test_progress_is_shown_on_a_terminal(client: Client) -> None:
    output, status = pexpect.run(
        shlex.join([sys.executable, "-c", RESOLVE, "org/model"]),
        env=client.environment,
        withexitstatus=True,
        timeout=60,
    )
    assert status == 0
    assert output.startswith(b"\rLooking up org/model\r\x1b[K\rDownloading org/model ")
    assert b"Fetching" not in output
    assert b"tokenizer.json" not in output


def test_what_is_there_is_asked_for_once(hub: LoopbackHub, client: Client) -> None:
    folder = client.folder("org/model")
    hub.requests.clear()
    assert client.folder("org/model") == folder
    assert asked(hub) == ["/api/models/org/model/revision/main"]
    assert client.folder("org/model", "v2") == folder  # a name that the cache does not know yet
    hub.requests.clear()
    assert client.folder("org/model", "v2") == folder
    assert asked(hub) == ["/api/models/org/model/revision/v2"]


def asked(hub: LoopbackHub) -> list[str]:
    """What was asked of the model; its client asks for other things of its own, too."""
    return [request.path for request in hub.requests if "org/model" in request.path]


def test_revisions(hub: LoopbackHub, client: Client) -> None:
    assert client.folder("org/model", "v2").name == COMMIT
    assert client.folder("org/model", COMMIT, HF_HUB_OFFLINE="1").name == COMMIT
    assert "no revision 'v9'" in client.failure("org/model", "v9")


def test_the_token_opens_a_private_model(hub: LoopbackHub, client: Client) -> None:
    assert "misspelt, or the model is private" in client.failure("org/private")
    assert "refused the token" in client.failure("org/private", HF_TOKEN="hf_wrong")
    client.folder("org/private", HF_TOKEN="hf_secret")
    assert "Bearer hf_secret" in {request.authorization for request in hub.requests}


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [
        ("org/nothing", "no such folder here, and not found on the hub"),
        ("org/gated", "gated"),
        ("org/gguf", "found GGUF files (model.gguf), which are not read"),
        ("org/weightless", "no safetensors weights"),
        ("org/double--dash", "not a hub id"),
    ],
)
def test_failures_have_one_clear_line(client: Client, repo_id: str, said: str) -> None:
    assert said in client.failure(repo_id)


@pytest.mark.slow
def test_an_interrupted_download_goes_on(hub: LoopbackHub, client: Client) -> None:
    assert files_in(client.folder("org/unsteady")) == WANTED

    assert "the hub answered 500" in client.failure("org/broken")
    assert "HF_HUB_OFFLINE" in client.failure("org/broken", HF_HUB_OFFLINE="1")
    (snapshot,) = Path(client.environment["HF_HOME"]).glob("hub/models--org--broken/snapshots/*")
    kept = set(files_in(snapshot))  # several files come at a time: which ones were whole by then is chance
    assert "tokenizer.json" not in kept
    hub.models["org/broken"].broken.clear()
    hub.requests.clear()
    assert files_in(client.folder("org/broken")) == WANTED
    assert hub.downloaded() == set(WANTED) - kept


def test_without_hub_and_cache(client: Client) -> None:
    assert "HF_HUB_OFFLINE forbids" in client.failure("org/model", HF_HUB_OFFLINE="1")
    assert "cannot be reached" in client.failure("org/model", HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("environment", "way_out"),
    [({"HF_HUB_OFFLINE": "1"}, "Unset HF_HUB_OFFLINE"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Check the network")],
    ids=["offline", "no network"],
)
def test_an_id_that_may_be_meant_as_a_folder(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], way_out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    failure = client.failure("made/model", **environment)
    assert failure.startswith("HubError: made/model: no such folder here, ")
    assert way_out in failure
    partial = tmp_path / "made/model.partial"
    partial.mkdir(parents=True)
    assert "no such folder here" in client.failure("made/model", **environment)
    (partial / "conversion.json").write_text('{"source": "/published/model", "options": {"quality": true}}')
    failure = client.failure("made/model", **environment)
    assert failure.startswith("HubError: made/model: here is only made/model.partial, an unfinished conversion, ")
    assert failure.endswith("\nFinish it: mlxqwen convert /published/model made/model --quality --resume\n")


@pytest.mark.parametrize(
    ("status", "said", "way_out"),
    [
        (403, "the token may not read", "HF_TOKEN"),
        (418, "the download failed", ""),
        (429, "too many requests", "Wait"),
        (503, "the hub answered 503", "later"),
    ],
)
def test_what_the_hub_answers(client: Client, status: int, said: str, way_out: str) -> None:
    failure = client.failure(f"org/status-{status}")
    assert said in failure
    assert way_out in failure
    assert "cannot be reached" not in failure


def test_credentials_in_the_hub_s_address_are_never_shown(client: Client, hub: LoopbackHub) -> None:
    for address in (hub.url, "http://127.0.0.1:9"):
        failure = client.failure("org/status-418", HF_ENDPOINT=address.replace("://", "://bob:s3cr3t@"))
        assert "s3cr3t" not in failure
        assert "bob" not in failure


@pytest.mark.parametrize(
    ("name", "value"), [("HF_ENDPOINT", "http://[bad"), ("HF_ENDPOINT", "bad"), ("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]
)
def test_malformed_settings(client: Client, name: str, value: str) -> None:
    client.failure("org/model", **{name: value})


def test_credentials_are_cut_out_of_any_address() -> None:
    cause = RuntimeError("a://u:p@ss@h/x@y and https://tok@127.0.0.1:9?q=a@b, mail me@home")
    assert hub_error("o/m", None, cause).problem.endswith("a://h/x@y and https://127.0.0.1:9?q=a@b, mail me@home")


def test_a_full_disk_is_told() -> None:
    error = hub_error("org/model", None, OSError(errno.ENOSPC, "No space left on device"))
    assert error.problem == "org/model: the disk is full"


def test_a_file_that_cannot_be_written_is_told(client: Client) -> None:
    code = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{RESOLVE}".replace(
        "\ntry:", "\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\ntry:"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "org/model"], env=client.environment, capture_output=True, text=True
    )
    assert "File too large" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_an_existing_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model("org/model") == Path("org/model")
    assert resolve_model("org") == Path("org")
    assert resolve_model("~/org") == tmp_path / "org"


def test_nothing_means_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.files.hub.DEMO_FOLDER", tmp_path)
    assert resolve_model() == resolve_model(None) == tmp_path
    assert DEMO_FOLDER.parent.name == "mlxqwen"
    monkeypatch.setattr("mlxqwen.files.hub.DEMO_FOLDER", tmp_path / "demo")
    with pytest.raises(HubError, match="install it again"):
        resolve_model()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/such/folder", "no such folder"),
        ("./model", "no such folder"),
        ("../org/model", "no such folder"),
        ("~/no-such-folder-at-all", "no such folder"),
        ("~nobody-of-this-name/x", "no such folder"),
        ("org/model/files", "no such folder"),
        ("models\\qwen", "no such folder"),
        (Path("org/model"), "no such folder"),
        ("qwen3", "neither an existing folder nor a hub id"),
        ("qwen/..", "neither an existing folder nor a hub id"),
        ("qwen/.", "neither an existing folder nor a hub id"),
        ("", "neither"),
        ("org/", "neither"),
        ("org/a b", "neither"),
        ("org/nul\0", "neither"),
        ("org/\ud800", "neither"),
        ("org/模型", "neither"),
        ("x" * 500, "neither"),
    ],
)
def test_names_of_nothing(name: str | Path, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=said) as caught:
        resolve_model(name)
    assert caught.value.hint


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(HubError, match="a file, expected a model's folder") as caught:
        resolve_model(str(weights))
    assert caught.value.hint.startswith("Give the folder that holds config.json and the weights, or a hub id")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HubError, match="a file, expected a model's folder") as caught:
        resolve_model(str(weights))
    assert caught.value.hint == f"Give {tmp_path} instead."


@pytest.mark.parametrize("revision", ["", "../../x", "/etc", "a//b", "a b", "-f", "x\0", "."])
def test_malformed_revisions(revision: str) -> None:
    with pytest.raises(OptionError, match="revision"):
        resolve_model("org/model", revision=revision)


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    for place in (tmp_path, None):
        with pytest.raises(MlxqwenError, match="revision"):
            resolve_model(place, revision="main")
