"""The tags of a reply."""

from __future__ import annotations

from enum import Enum

__all__ = ["Tag"]


class Tag(Enum):
    """A tag of a reply; its value is how it is spelled."""

    THINK = "<think>"
    END_THINK = "</think>"
    CALL = "<tool_call>"
    END_CALL = "</tool_call>"
