"""Summaries as items of a talk, in `encrypted_content`, where clients hand them back unread: encoded, not encrypted."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from mlxqwen.errors import MessagesError
from mlxqwen.files.json_file import shown

__all__ = ["encoded_summary", "read_summary"]

_PREFIX = "mlxqwen-summary-1:"


def encoded_summary(summary: str) -> str:
    """A summary as the content of a `compaction` item."""
    return _PREFIX + base64.urlsafe_b64encode(summary.encode()).decode()


def read_summary(content: Any, where: str) -> str:
    """The summary that a `compaction` item holds. Raises `MessagesError` for one that is not from here."""
    if isinstance(content, str) and content.startswith(_PREFIX):
        try:
            return base64.b64decode(content.removeprefix(_PREFIX), altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError):
            pass
    raise MessagesError(
        f"{where}: encrypted_content: found {shown(content)}, expected one of this server's",
        hint="What other servers have encrypted cannot be read here: leave the item out, or send the talk itself.",
    )
