"""One connection: uvicorn's, with bounds on how long and how large the head of a request may be."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Connection"]

SILENT_SECONDS = 30.0
LARGEST_HEAD = 64 * 1024  # bytes

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


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
        super().data_received(data)
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
        """A head is there."""
        self._silence.cancel()
        self._is_in_head = False
        super().on_headers_complete()

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
