"""Where what a reply must look like goes to the engine: response formats, and calls that have to be made."""

from __future__ import annotations

from typing import Any

from mlxqwen.files.json_file import shown
from mlxqwen.server.chat_fields import ChatFields
from mlxqwen.server.errors import ApiError

__all__ = ["output_options", "tool_choice"]


def output_options(fields: ChatFields) -> dict[str, Any]:
    """The engine's options for the form that a request asks for. Raises `ApiError` for a form that is not made."""
    kind = (fields.response_format or {"type": "text"}).get("type")
    if kind != "text":
        raise ApiError(
            400,
            f"response_format.type: found {shown(kind)}, expected text",
            param="response_format",
            code="unsupported_value",
        )
    if fields.structured_outputs:
        raise ApiError(
            400, "structured_outputs: found some, expected none", param="structured_outputs", code="unsupported_value"
        )
    return {}


def tool_choice(fields: ChatFields) -> str:
    """ "auto" or "none", as the request says. Raises `ApiError` for a choice that is not made."""
    choice = fields.tool_choice
    if choice is None:
        return "auto"
    if choice in ("none", "auto"):
        return str(choice)
    raise ApiError(
        400,
        f"tool_choice: found {shown(choice)}, expected none or auto",
        param="tool_choice",
        code="unsupported_value",
    )
