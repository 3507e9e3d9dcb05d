"""A small hub on 127.0.0.1, for downloads without a network: models in memory, served as the real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import unquote, urlsplit

__all__ = ["HubModel", "LoopbackHub", "in_a_thread", "running_hub", "unasked_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubModel:
    """One model: its files, and who may have them.

    Attributes:
        files: path → content.
        revisions: the branches and tags that exist; all of them name one commit.
        token: the only token that sees the model, or None for a public one.
        gated: everyone sees the list of files, nobody may download them.
        cuts: how often the server still breaks off in the middle of a file.
        broken: files that the server fails to deliver.
        stalled: files of which it delivers half, and then nothing until it ends; parts of them are delivered.
        status: the HTTP status that is the answer to everything.
    """

    files: dict[str, bytes]
    revisions: set[str] = field(default_factory=lambda: {"main"})
    token: str | None = None
    gated: bool = False
    cuts: int = 0
    broken: set[str] = field(default_factory=set)
    stalled: set[str] = field(default_factory=set)
    status: int | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorization: str | None


class LoopbackHub(ThreadingHTTPServer):
    """The server; `requests` holds every request it was sent."""

    daemon_threads = True
    request_queue_size = 128  # a client connects for eight files at once; of more than waits here, some are dropped

    def __init__(self, models: dict[str, HubModel]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.models = models
        self.sent_bytes = 0  # of files, whole answers alone
        self.ignores_ranges = False
        self.requests: list[Request] = []
        self.ends = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self) -> set[str]:
        """The files whose content was asked for."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        return {path.split("/", 5)[5] for path in paths if "/resolve/" in path}


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_CONNECT(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""

    @property
    def hub(self) -> LoopbackHub:
        return cast(LoopbackHub, self.server)

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, authorization))
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision", *revision]:
                self.answer_for(f"{owner}/{name}", "/".join(revision), None)
            case ["api", "models", owner, name, "tree", *revision]:
                self.answer_for(f"{owner}/{name}", "/".join(revision), "tree")
            case [owner, name, "resolve", revision, *file]:
                self.answer_for(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self.refuse(404, "")

    def answer_for(self, repo_id: str, revision: str, wanted: str | None) -> None:
        model = self.hub.models.get(repo_id)
        authorization = self.headers.get("Authorization")
        if authorization is not None and authorization.startswith("Basic "):
            authorization = None
        if authorization not in {None, *(f"Bearer {known.token}" for known in self.hub.models.values())}:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif model is None or (model.token is not None and authorization != f"Bearer {model.token}"):
            self.refuse(401 if authorization is None else 404, "RepoNotFound")
        elif model.status is not None:
            self.refuse(model.status, "")
        elif revision not in model.revisions | {COMMIT}:
            self.refuse(404, "RevisionNotFound")
        elif wanted is None:
            files = [{"rfilename": path, "size": len(content)} for path, content in model.files.items()]
            self.send_json({"id": repo_id, "sha": COMMIT, "siblings": files})
        elif wanted == "tree":
            self.send_json([tree_entry(path, content) for path, content in model.files.items()])
        elif model.gated:
            self.refuse(403, "GatedRepo")
        elif wanted in model.broken and self.command == "GET":
            self.refuse(500, "")
        elif wanted in model.files:
            self.send_file(model, model.files[wanted], stalls=wanted in model.stalled)
        else:
            self.refuse(404, "EntryNotFound")

    def send_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, model: HubModel, content: bytes, *, stalls: bool) -> None:
        start, stop = self.wanted_bytes(len(content))
        is_part = (start, stop) != (0, len(content))
        self.send_response(206 if is_part else 200)
        self.send_header("ETag", f'"{blob_id(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if stalls and (self.headers.get("Range") or "-").endswith("-"):
            self.wfile.write(content[start : start + (stop - start) // 2])
            self.wfile.flush()
            self.hub.ends.wait()
            self.close_connection = True
        elif model.cuts > 0:
            model.cuts -= 1
            self.wfile.write(content[start : start + len(content) // 2])
            self.close_connection = True
        else:
            self.hub.sent_bytes += stop - start
            self.wfile.write(content[start:stop])

    def wanted_bytes(self, size: int) -> tuple[int, int]:
        """Where the bytes of a `Range` header begin and end; all of a file of `size` bytes without one."""
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1, size) if last and not self.hub.ignores_ranges else size

    def refuse(self, status: int, code: str, message: str = "Not for you") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def tree_entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}


def blob_id(content: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub(models: dict[str, HubModel]) -> Iterator[LoopbackHub]:
    """A hub that serves in a thread while the context lasts."""
    with LoopbackHub(models) as hub, in_a_thread(hub):
        try:
            yield hub
        finally:
            hub.ends.set()


@contextmanager
def unasked_hub() -> Iterator[LoopbackHub]:
    """A hub that must not be asked for anything while the context lasts."""
    with running_hub({}) as hub:
        yield hub
        assert hub.requests == []


@contextmanager
def in_a_thread(server: ThreadingHTTPServer) -> Iterator[None]:
    """Let a server answer in a thread while the context lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
