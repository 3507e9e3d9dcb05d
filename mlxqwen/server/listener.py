"""The socket that a server listens on, without the libraries that serving takes: they are imported later."""

from __future__ import annotations

import socket

from mlxqwen.errors import ServerError

__all__ = ["open_socket"]

_BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `ServerError` if it cannot."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ServerError(
            f"{host}:{port}: cannot listen there: {reason}",
            hint="Another server may be using the port: give another one with --port, or 0 for a free one.",
        ) from None
    return listener
