"""The chat page: the files of `page/`, read once, which browsers get at `/` and below `/page/`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["PAGE_HEADERS", "PAGE_PATHS", "page_routes"]

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_BELOW = (
    "api.js",
    "app.js",
    "base.css",
    "conversations.js",
    "copying.js",
    "dialogs.js",
    "icon.svg",
    "layout.css",
    "markdown.js",
    "messages.css",
    "messages.js",
    "numbers.js",
    "phone.css",
    "replies.js",
    "server.js",
)

PAGE_PATHS = {"/": "index.html", **{f"/page/{name}": name for name in _BELOW}}
"""The page's files by their paths. No other file is reachable."""

# Nothing but these files is loaded or run, nothing but this server is called, and text cannot be made HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
"""The headers of each of them, beside type and `ETag`."""


def page_routes() -> list[Route]:
    """The routes of the page's files, for GET and HEAD."""
    return [Route(path, _sender(_FOLDER / name), methods=["GET"]) for path, name in PAGE_PATHS.items()]


def _sender(file: Path) -> Callable[[HttpRequest], Awaitable[Response]]:
    content = file.read_bytes()
    tag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**PAGE_HEADERS, "etag": tag}

    async def send(http: HttpRequest) -> Response:
        known = {one.strip().removeprefix("W/") for one in http.headers.get("if-none-match", "").split(",")}
        if known & {tag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_TYPES[file.suffix], headers=headers)

    return send
