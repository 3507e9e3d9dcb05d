"""Who may call: the `Host` that is asked for, the page that asks, and the key that is brought."""

from __future__ import annotations

import hmac
import re
import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mlxqwen.errors import one_line
from mlxqwen.server.errors import ApiError, anthropic_error, openai_error
from mlxqwen.server.page_files import PAGE_PATHS
from mlxqwen.server.settings import ServerSettings, is_loopback

__all__ = ["KeyCheck", "OriginCheck", "error_response"]

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::[0-9]{1,5})?")
_LONGEST_NAME = 100  # characters, in the log
_OPEN_PATHS = {"/health", *PAGE_PATHS}


def error_response(scope: Scope, error: ApiError, path: str | None = None) -> JSONResponse:
    """The response to a request that tells an error, which the log has too, in the form of the path's API.

    Args:
        scope: the request's.
        error: what is told.
        path: that it was meant for, if not the one that it has.
    """
    scope.setdefault("mlxqwen", {})["error"] = error
    is_anthropic = (path or scope["path"]).startswith("/v1/messages")
    body = anthropic_error(error) if is_anthropic else openai_error(error)
    return JSONResponse(body, error.status, headers=error.headers)


class OriginCheck:
    """Refuses what another site's page sends, by its `Origin`, and names that are not the server's (DNS rebinding).

    Args:
        app: what is called if all is well.
        settings: the server's.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        names = {"localhost", settings.host.lower().strip("[]"), *(name.lower() for name in settings.allowed_hosts)}
        if not is_loopback(settings.host):
            names |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except ApiError as error:
                await error_response(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        given = headers.getlist("host")
        host = given[0] if len(given) == 1 else ""
        found = _HOST.fullmatch(host)
        name = "" if found is None else found[1].strip("[]").lower().rstrip(".")
        if not name or not self._is_own(name):
            raise ApiError(
                403,
                "host: found a name that is not this server's, expected its address",
                code="host_not_allowed",
                for_owner=_way_in(name, host),
            )
        origin = headers.get("origin")
        if origin is None or {origin, "*"} & set(self._settings.cors_origins):
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(
                403,
                "origin: found another site's, expected none, or one that the server lets in",
                code="origin_not_allowed",
                for_owner="--cors-origin lets an origin in.",
            )

    def _is_own(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self._settings.host)


def _way_in(name: str, host: str) -> str:
    """What the owner can do about a request with this `Host`; what is no name is no argument of an option."""
    if not name or name.startswith("-") or len(name) > _LONGEST_NAME:
        return f"--allowed-host NAME adds a name; the Host was {one_line(ascii(host), _LONGEST_NAME)}."
    return f"--allowed-host {name} lets this name in."


class KeyCheck:
    """Refuses requests without one of the server's keys, if it has any.

    Args:
        app: what is called if all is well.
        settings: the server's.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in _OPEN_PATHS:
            headers = Headers(scope=scope)
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer":
                key = headers.get("x-api-key", "")
            if not self._is_known(key.strip().encode("utf-8", "replace")):
                found = "one that is not known" if key else "none"
                error = ApiError(
                    401,
                    f"api key: found {found}, expected one as Authorization: Bearer KEY, or x-api-key: KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await error_response(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, given: bytes) -> bool:
        # All keys are compared, each in a time that does not tell where it differs.
        return sum([hmac.compare_digest(given, key) for key in self._keys]) > 0
