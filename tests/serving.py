"""A server of the demo model, or another, in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from mlxqwen.engine.engine import Engine
from mlxqwen.server.app import make_app
from mlxqwen.server.models import ServedModel
from mlxqwen.server.registry import ModelRegistry
from mlxqwen.server.service import Service
from mlxqwen.server.settings import ServerSettings
from tests.asgi_calls import HOST, events_of

CHAT = "/v1/chat/completions"


def ask(text: str = "How many r's in strawberry?", **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}


@dataclass(frozen=True)
class Served:
    """A server, and a client of it."""

    engine: Engine
    service: Service
    app: Starlette
    client: TestClient

    def post(self, body: dict[str, Any], path: str = CHAT, **options: Any) -> Any:
        """The JSON of a reply. Fails unless the status is 200."""
        response = self.client.post(path, json={"model": "demo", **body}, **options)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, body: Any, path: str = CHAT) -> list[Any]:
        """The events of a reply that is streamed."""
        response = self.client.post(path, json={"model": "demo", **body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.content)

    def refused(self, body: dict[str, Any], status: int = 400, path: str = CHAT) -> dict[str, Any]:
        """The error object of a request that is refused."""
        response = self.client.post(path, json={"model": "demo", **body})
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Served]:
    """A server of `engine`."""
    chosen = ServerSettings(**settings)
    engine.scheduler.max_running = chosen.max_running
    models = ModelRegistry([], chosen)
    models.add(ServedModel("demo", engine, chosen))
    service = Service(models, chosen)
    app = make_app(service)
    client = TestClient(app, base_url=f"http://{HOST}", raise_server_exceptions=False)
    try:
        yield Served(engine, service, app, client)
    finally:
        client.close()
        service.close()
