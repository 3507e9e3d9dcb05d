"""A small ModelScope on 127.0.0.1: listings, revisions and files, as its own client asks for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback_hub import in_a_thread

__all__ = ["LoopbackModelScope", "ModelScopeModel", "running_modelscope"]


@dataclass
class ModelScopeModel:
    """One model: its files, and who may have them.

    Attributes:
        files: path → content.
        revisions: the branches and tags that exist; all of them have the same files.
        token: the only token that sees the model, or None for a public one.
        cuts: how often the server still breaks off in the middle of a file.
        broken: files that the server fails to deliver.
        changed: files that are delivered with another byte than they are listed with.
        status: the HTTP status that is the answer to everything.
    """

    files: dict[str, bytes]
    revisions: set[str] = field(default_factory=lambda: {"master"})
    token: str | None = None
    cuts: int = 0
    broken: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    status: int | None = None


@dataclass(frozen=True)
class Request:
    path: str
    file: str | None
    first_byte: int


class LoopbackModelScope(ThreadingHTTPServer):
    """The server; `requests` holds every request it was sent."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, models: dict[str, ModelScopeModel]) -> None:
        super().__init__(("127.0.0.1", 0), ModelScopeHandler)
        self.models = models
        self.requests: list[Request] = []
        self.sent_bytes = 0  # of files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self) -> set[str]:
        """The files whose content was asked for."""
        return {request.file for request in self.requests if request.file is not None}


class ModelScopeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    last_byte: int | None = None

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""

    @property
    def hub(self) -> LoopbackModelScope:
        return cast(LoopbackModelScope, self.server)

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, self.last_byte = int(first), int(last) if last else None
        self.hub.requests.append(Request(unquote(split.path), query.get("FilePath"), start))
        match unquote(split.path).strip("/").split("/"):
            case ["api", "v1", "models", owner, name, *wanted]:
                self.answer_for(f"{owner}/{name}", "/".join(wanted), query, start)
            case _:
                self.refuse(404, "no such page")

    def answer_for(self, repo_id: str, wanted: str, query: dict[str, str], start: int) -> None:
        model = self.hub.models.get(repo_id)
        authorization = self.headers.get("Authorization")
        if authorization not in {None, *(f"Bearer {known.token}" for known in self.hub.models.values())}:
            self.refuse(401, "the access token is invalid")
        elif model is None or (model.token is not None and authorization != f"Bearer {model.token}"):
            self.refuse(404, "record not found")
        elif model.status is not None:
            self.refuse(model.status, "not now")
        elif wanted == "revisions":
            branches = [{"Revision": one} for one in sorted(model.revisions)]
            self.send_json({"RevisionMap": {"Branches": branches, "Tags": []}})
        elif query.get("Revision", "master") not in model.revisions:
            self.refuse(404, "the revision does not exist")
        elif wanted == "repo/files":
            self.send_json({"Files": [*folders(model.files), *(entry(*one) for one in model.files.items())]})
        elif wanted == "repo" and (path := query.get("FilePath", "")) in model.files:
            if path in model.broken:
                self.refuse(500, "broken")
            else:
                content = model.files[path]
                self.send_file(model, content[:-1] + b"?" if path in model.changed else content, start)
        else:
            self.refuse(404, "record not found")

    def send_json(self, data: object, status: int = 200) -> None:
        content = json.dumps({"Code": status, "Data": data, "Success": status == 200}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str) -> None:
        content = json.dumps({"Code": 10_010_205_001, "Message": message, "Success": False}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, model: ModelScopeModel, content: bytes, start: int) -> None:
        stop = len(content) if self.last_byte is None else min(self.last_byte + 1, len(content))
        is_part = (start, stop) != (0, len(content))
        self.send_response(206 if is_part else 200)
        self.send_header("Accept-Ranges", "bytes")
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.hub.sent_bytes += stop - start
        if model.cuts > 0 and len(content) > 1_000:
            model.cuts -= 1
            self.wfile.write(content[start : start + len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:stop])


def entry(path: str, content: bytes) -> dict[str, object]:
    sha256 = hashlib.sha256(content).hexdigest()
    return {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(content), "Sha256": sha256}


def folders(files: dict[str, bytes]) -> list[dict[str, object]]:
    names = {path.rpartition("/")[0] for path in files} - {""}
    return [{"Path": name, "Name": name, "Type": "tree", "Size": 0, "Sha256": ""} for name in sorted(names)]


@contextmanager
def running_modelscope(models: dict[str, ModelScopeModel]) -> Iterator[LoopbackModelScope]:
    """A hub that serves in a thread while the context lasts."""
    with LoopbackModelScope(models) as hub, in_a_thread(hub):
        yield hub
