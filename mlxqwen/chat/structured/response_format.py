"""What an answer has to look like, as callers say it: OpenAI's, vLLM's and JSON Schema's forms, and pydantic models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlxqwen.chat.structured.json_schema import prepare_schema
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import json_kind, parse_json
from mlxqwen.text.messages import check_unicode, to_plain_json

__all__ = ["AnswerFormat", "read_response_format"]

MAX_CHOICES = 1_024
MAX_SOURCE_BYTES = 64 * 1024
"""Of a regular expression, a grammar, and all choices together."""

_FORMS = (
    'a JSON Schema, a pydantic model, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": …}}, '
    '{"regex": …}, {"choice": […]}, {"grammar": …} or {"type": "text"}'
)
_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|\#[^\n]*')
_TOKEN_NAME = re.compile(r"<[^>\n]*>?")
_ANY_OBJECT = {"type": "object"}
_STRUCTURED = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What an answer has to look like.

    Args:
        kind: "json_schema", "regex", "choice" or "lark".
        source: the JSON text of a schema or of a list of choices; the regular expression; the grammar.
    """

    kind: Literal["json_schema", "regex", "choice", "lark"]
    source: str


def read_response_format(value: object) -> AnswerFormat | None:
    """What `response_format` asks for; None for free text.

    Args:
        value: a pydantic model class; a JSON Schema; OpenAI's `{"type": "text"}`, `{"type": "json_object"}` or
            `{"type": "json_schema", …}`, with the schema inside `json_schema` or beside it, as in its Responses API; or
            vLLM's `{"json": …}`, `{"json_object": true}`, `{"regex": …}`, `{"choice": […]}`, `{"grammar": …}` (Lark).

    Raises:
        OptionError: anything else, or more of it than can be compiled.
    """
    if value is None or isinstance(value, AnswerFormat):
        return value
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return _of_model(value)
    if not isinstance(value, Mapping):
        raise _unfit(json_kind(value))
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _of_schema(_ANY_OBJECT)
    if kind == "json_schema":
        return _of_openai(value)
    given = [name for name in _STRUCTURED if name in value]
    if given and len(value) == 1:
        return _of_vllm(given[0], value[given[0]])
    if kind is not None and not _is_type(kind):
        raise _unfit(f"type {kind!r:.80}")
    return _of_schema(value)


def _of_model(model: Any) -> AnswerFormat:
    try:
        schema = model.model_json_schema()
    except Exception as cause:  # pydantic's own, for fields that no schema can tell
        raise OptionError(f"response_format: {model.__name__}: found no JSON schema for it: {cause}") from None
    return _of_schema(schema)


def _of_openai(value: Mapping[str, Any]) -> AnswerFormat:
    inner = value.get("json_schema", value)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if schema is None:
        raise _unfit('type "json_schema" without a schema')
    return _of_schema(schema)


def _of_vllm(name: str, value: object) -> AnswerFormat | None:
    if name == "json":
        if not isinstance(value, str):
            return _of_schema(value)
        try:
            return _of_schema(parse_json(_bounded("json", value)))
        except ValueError as cause:
            raise OptionError(f"response_format: json: not valid JSON: {cause}") from None
    if name == "json_object":
        if not isinstance(value, bool):
            raise _unfit(f"json_object {value!r:.80}")
        return _of_schema(_ANY_OBJECT) if value else None
    if name == "choice":
        return _of_choices(value)
    if not isinstance(value, str) or not value:
        found = "empty text" if value == "" else json_kind(value)
        raise OptionError(f"response_format: {name}: found {found}, expected text")
    text = _bounded(name, value)
    if name == "grammar" and (token := _TOKEN_NAME.search(_LITERALS.sub("", text))):
        raise OptionError(
            f"response_format: grammar: found {token[0][:60]}, the name of a token, expected text",
            hint="An answer ends where the grammar does; no other special token is part of it.",
        )
    return AnswerFormat("regex" if name == "regex" else "lark", text)


def _of_choices(value: object) -> AnswerFormat:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_CHOICES:
        found = f"a list of {len(value):,}" if isinstance(value, list | tuple) else json_kind(value)
        raise OptionError(f"response_format: choice: found {found}, expected a list of 1 to {MAX_CHOICES:,} texts")
    for place, text in enumerate(value):
        if not isinstance(text, str) or not text.strip("\n"):
            found = "empty text" if isinstance(text, str) else json_kind(text)
            raise OptionError(f"response_format: choice[{place}]: found {found}, expected text")
    return AnswerFormat("choice", _bounded("choice", json.dumps(list(value), ensure_ascii=False)))


def _of_schema(schema: object) -> AnswerFormat:
    plain = to_plain_json(schema, "response_format")
    return AnswerFormat("json_schema", json.dumps(prepare_schema(plain, "response_format"), ensure_ascii=False))


def _bounded(name: str, text: str) -> str:
    check_unicode(text, f"response_format: {name}")
    size = len(text.encode())
    if size > MAX_SOURCE_BYTES:
        raise OptionError(f"response_format: {name}: found {size:,} bytes, expected at most {MAX_SOURCE_BYTES:,}")
    return text


def _is_type(kind: object) -> bool:
    """Whether it is a `type` of JSON Schema."""
    names = kind if isinstance(kind, list | tuple) else [kind]
    return all(name in ("object", "array", "string", "number", "integer", "boolean", "null") for name in names)


def _unfit(found: str) -> OptionError:
    return OptionError(f"response_format: found {found}, expected {_FORMS}")
