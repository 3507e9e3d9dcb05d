"""One connection: uvicorn's, with bounds on how long and how large the head of a request may be.

An upgrade that a request offers is not taken: it is answered as if it had offered none, as HTTP lets servers do. Java's
client offers HTTP/2 with each request.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlxqwen.server.errors import ApiError, openai_error

__all__ = ["Connection"]

logger = logging.getLogger("mlxqwen.server")

SILENT_SECONDS = 30.0
LARGEST_HEAD = 64 * 1024  # bytes

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_NOT_UNDERSTOOD = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
)
_TLS_HANDSHAKE = b"\x16\x03"  # what a connection begins with where https is spoken
_HTTP_2 = b"PRI * HTTP/2.0"  # the same, where HTTP/2 is spoken without asking
_TOLD_AGAIN = 3600.0  # seconds, so that nobody can fill the log

_told: dict[str, float] = {}  # what the log was told of, and when that was


class Connection(HttpToolsProtocol):
    """Hangs up on who has sent no whole head of a request for a while, or one that does not end."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._head = 0
        self._is_in_head = True
        self._silence = self.loop.call_later(SILENT_SECONDS, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._silence.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take data; those of a head are counted."""
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._is_in_head and self.parser is not None:
            self._head += len(data)
            if self._head > LARGEST_HEAD and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self._hang_up()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._silence.cancel()
        self._silence = self.loop.call_later(SILENT_SECONDS, self._hang_up)
        self._head, self._is_in_head = 0, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is there. One that offers an upgrade comes once more, without."""
        self._silence.cancel()
        self._is_in_head = False
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is there, unless its head is to come once more."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        """Have data parsed; what is no HTTP is refused."""
        rest = data
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except HttpParserUpgrade as offered:
                if self.parser.get_method() == b"CONNECT":
                    self._refuse("found CONNECT, which is a proxy's", "a request of this server's own")
                    return
                rest = self._head_without_upgrade() + rest[offered.args[0] :]
            except HttpParserCallbackError:
                self._refuse("found an address that cannot be read", "a path in ASCII, such as /v1/models")
                return
            except HttpParserError as error:
                self._refuse(*_seen(rest, error))
                return

    def _head_without_upgrade(self) -> bytes:
        """The head that was read last, but for what makes the parser take all behind it for another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _refuse(self, found: str, expected: str) -> None:
        """Hang up on who does not speak HTTP; the first of each kind in an hour is logged."""
        now = time.monotonic()
        if now - _told.get(expected, -_TOLD_AGAIN) >= _TOLD_AGAIN:
            _told[expected] = now
            client = "-" if self.client is None else self.client[0]
            logger.warning("%s was not understood: %s, expected %s", client, found, expected)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            error = ApiError(400, f"request: {found}, expected {expected}", code="invalid_http")
            body = json.dumps(openai_error(error)).encode()
            self.transport.write(_NOT_UNDERSTOOD % len(body) + body)
        self._hang_up()

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def _seen(data: bytes, error: HttpParserError) -> tuple[str, str]:
    """What was found in place of a request, and what was expected."""
    if data.startswith(_TLS_HANDSHAKE):
        return "found a TLS handshake", "HTTP without TLS: an address with http:// in place of https://"
    if data.startswith(_HTTP_2):
        return "found HTTP/2", "HTTP/1.1, which clients speak that do not begin with HTTP/2 unasked"
    return f"found no request that can be read ({error})", "HTTP/1.1"
