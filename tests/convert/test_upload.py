"""`--upload-repo` against a hub on this machine that takes commits."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mlxqwen.errors import HubError
from mlxqwen_convert import convert
from tests.command_line import run as run_here
from tests.convert.checkpoints import make_source
from tests.convert.test_cli_convert import ENVIRONMENT


class UploadHub(ThreadingHTTPServer):
    """Takes every file whole, in the commit itself; `files` is what it was given."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: UploadHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "tags": [], "private": False})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path.startswith("/api/repos/create"):
            self.answer({"url": f"{self.server.url}/me/model", "id": "me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/me/model/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({"warnings": [], "errors": []})

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    server = UploadHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub: UploadHub, token: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    source = make_source(tmp_path / "in", "fp8").write()
    command = [sys.executable, "-m", "mlxqwen", "convert", str(source.folder), str(tmp_path / "out"), *arguments]
    environment = {**ENVIRONMENT, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in environment.items() if name.lower() not in _PROXIES}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def test_the_whole_folder_arrives(hub: UploadHub, tmp_path: Path) -> None:
    done = run(hub, "hf_right", tmp_path, "--upload-repo", "me/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"uploaded: {hub.url}/me/model/commit/{'0' * 40}\n")
    sent = {name: hashlib.sha256(data).digest() for name, data in hub.files.items()}
    here = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "out").iterdir()}
    assert sent == here
    assert "config.json" in sent


def test_a_token_that_is_refused(hub: UploadHub, tmp_path: Path) -> None:
    done = run(hub, "hf_wrong", tmp_path, "--upload-repo", "me/model")
    assert done.returncode == 1
    assert "not uploaded" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert done.stderr.endswith(f"hf upload me/model {tmp_path / 'out'}\n")
    assert "verified, in " in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out/config.json").exists()
    assert not hub.files


def test_no_token_ends_it_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match=r"found no token(.|\n)*HF_TOKEN"):
        convert(tmp_path / "nowhere", tmp_path / "out", upload_repo="me/model")


def test_ctrl_c_while_uploading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, repo_id: str) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr("mlxqwen_convert.upload.upload", interrupted)
    source = make_source(tmp_path / "in", "fp8").write()
    result = run_here("convert", str(source.folder), str(tmp_path / "my out"), "--upload-repo", "me/model")
    assert result.status == 130
    assert "verified, in " in result.out
    command = f"hf upload me/model '{tmp_path / 'my out'}'"
    assert f"interrupted; the folder is whole, this uploads it: {command}" in result.err.splitlines()
    assert (tmp_path / "my out/config.json").exists()


def test_a_name_that_is_none(hub: UploadHub, tmp_path: Path) -> None:
    done = run(hub, "hf_right", tmp_path, "--upload-repo", "no-organisation")
    assert done.returncode == 2
    assert "organisation/model" in done.stderr
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["in"]
    assert not hub.requests
