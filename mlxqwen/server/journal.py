"""One line of log for each request, the count of those under way, and the metrics of their ends."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxqwen.errors import one_line
from mlxqwen.server.load import Load
from mlxqwen.server.metrics import Metrics
from mlxqwen.server.page_files import PAGE_PATHS

__all__ = ["Journal"]

logger = logging.getLogger("mlxqwen.server")

_MOST_LOGGED = 10_000  # characters
_LONGEST_PARAM = 100
_LONGEST_WAY_OUT = 300
_GONE = 499
# What is asked for every few seconds, and the parts of the page, for which "/" stands.
_QUIET = {"/health", "/metrics", *PAGE_PATHS} - {"/"}


class Journal:
    """Counts and logs requests.

    Args:
        app: what answers them.
        load: counts those under way.
        metrics: count them by path and status.
        paths: that are counted under their own names; others are together, so that nobody can make many.
        log_content: whether what was answered is logged, too.
    """

    def __init__(self, app: ASGIApp, load: Load, metrics: Metrics, paths: set[str], log_content: bool) -> None:
        self._app = app
        self._load = load
        self._metrics = metrics
        self._paths = paths
        self._log_content = log_content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 0, time.perf_counter()
        details: dict[str, Any] = scope.setdefault("mlxqwen", {})
        details["began"] = began

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = os.urandom(12).hex().encode()
                message["headers"] = [*message["headers"], (b"x-request-id", name), (b"request-id", name)]
                details["request_id"] = name.decode()
            await send(message)

        self._load.requests += 1
        try:
            await self._app(scope, receive, noted)
        finally:
            self._load.requests -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            if scope["path"] not in _QUIET:
                _log(scope, status, time.perf_counter() - began, details)
                if self._log_content:
                    _log_content(details)
            details.clear()  # a connection keeps its last request, which must not keep a model


def _log(scope: Scope, status: int, seconds: float, details: dict[str, Any]) -> None:
    reason = _reason(status, details)
    parts = [f"{(scope.get('client') or ('-',))[0]} {scope['method'][:16]} {scope['path'][:100]!a} {status}{reason}"]
    replies = details.get("replies")
    if replies is not None:
        said = sum(handle.token_count for handle in replies.handles)
        parts.append(f"{replies.prompt_tokens} tokens ({replies.cached_tokens} known), {said} said")
        if replies.seconds_to_first is not None:
            waited = f" ({replies.seconds_waited:.2f} s of them for its model)" if replies.seconds_waited else ""
            parts.append(f"first after {replies.seconds_to_first:.2f} s{waited}")
    if ignored := details.get("ignored"):
        parts.append(f"ignored: {ignored}")
    if (error := details.get("error")) is not None and error.for_owner:
        parts.append(f"way out: {one_line(error.for_owner, _LONGEST_WAY_OUT).rstrip('.')}")
    parts.append(f"{seconds:.2f} s, {details.get('request_id', '-')}")
    logger.info("%s", ", ".join(parts))


def _reason(status: int, details: dict[str, Any]) -> str:
    """Why a request was refused or its reply ended: a word and the field, nothing of what was asked."""
    error = details.get("error")
    if error is None:
        replies = details.get("replies")
        is_gone = status in (0, _GONE) or "is_cut" in details or (replies is not None and replies.is_cut)
        return " (client gone)" if is_gone else ""
    where = "" if error.param is None else f": {one_line(error.param, _LONGEST_PARAM)}"
    return f" ({error.code or 'refused'}{where})"


def _log_content(details: dict[str, Any]) -> None:
    if "error" in details:
        logger.info("refused: %s", one_line(details["error"].message, _MOST_LOGGED))
    if "replies" in details:
        for text in details["replies"].texts():
            logger.info("said: %s", one_line(text, _MOST_LOGGED))
