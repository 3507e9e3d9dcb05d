"""Calls of an ASGI application, part by part: bodies that come late, readers that are slow, clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette

HOST = "127.0.0.1:8000"
PATIENCE = 120.0
"""Seconds after which a test that waits for what does not come fails: far more than a busy machine takes."""


class Call:
    """One HTTP request to `app`, in the running loop.

    Args:
        body: a JSON value, or bytes; None for a body that does not come.
        reads: whether what is sent is taken; otherwise the sender waits.
    """

    def __init__(
        self,
        app: Starlette,
        path: str,
        body: object = b"",
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        query: str = "",
        reads: bool = True,
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.sent: list[bytes] = []
        self.may_read = asyncio.Event()
        if reads:
            self.may_read.set()
        self._has_gone = asyncio.Event()
        self._body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"host": HOST, **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._has_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        await self.may_read.wait()
        self.sent.append(message.get("body", b""))

    def leave(self) -> None:
        """The client hangs up."""
        self._has_gone.set()

    async def end(self) -> Call:
        """Wait for the end of the response."""
        await asyncio.wait_for(self.task, PATIENCE)
        return self

    @property
    def body(self) -> bytes:
        """All that was sent."""
        return b"".join(self.sent)

    @property
    def json(self) -> Any:
        """The JSON that was sent."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of the events that were sent, `[DONE]` left out."""
        return events_of(self.body)


def events_of(body: bytes) -> list[Any]:
    """The JSON of server-sent events, `[DONE]` left out."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def until(condition: Any) -> None:
    """Wait until `condition()` holds. Raises `TimeoutError` if it never does."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)
