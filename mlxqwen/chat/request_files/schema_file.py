"""The JSON schema of answers, in a file."""

from __future__ import annotations

from mlxqwen.chat.request_files.conversations import located, parse_json_text
from mlxqwen.chat.structured.response_format import AnswerFormat, read_response_format
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import json_kind

__all__ = ["parse_schema"]

_HINT = 'A schema is an object such as {"type": "object", "properties": {"name": {"type": "string"}}}.'


def parse_schema(text: str, source: str) -> AnswerFormat | None:
    """The format of answers that fit the schema of a JSON text, which may be in OpenAI's `json_schema` form.

    Args:
        source: where the text is from, for errors.

    Raises:
        OptionError: it is no JSON, or no schema.
    """
    with located(source):
        value = parse_json_text(text, hint=_HINT)
        if not isinstance(value, dict | bool):
            raise OptionError(f"found {json_kind(value)}, expected a JSON schema", hint=_HINT)
        wrapped = isinstance(value, dict) and value.get("type") == "json_schema"
        try:
            return read_response_format(value if wrapped else {"json": value})
        except OptionError as error:
            raise OptionError(error.problem.removeprefix("response_format: "), hint=error.hint) from None
