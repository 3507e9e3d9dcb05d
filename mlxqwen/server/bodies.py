"""Bodies of requests: read within bounds of size and time, parsed strictly, and checked against a form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_json
from starlette.requests import Request as HttpRequest

from mlxqwen.files.json_file import json_kind, parse_json
from mlxqwen.server.errors import ApiError, validation_error, with_null

__all__ = ["Form", "check_aside", "parse_body", "read_body", "unknown_fields"]

_MOST_VALUES = 1_000_000
_MOST_ASIDE = 256 * 1024  # bytes
_FormT = TypeVar("_FormT", bound="Form")


class Form(BaseModel):
    """A request's fields. Null means not given; what is unknown is kept apart, to be told of.

    Attributes:
        aside: fields that change no reply, and are held as long as it runs: their size is bounded, as that of unknown
            fields is.
    """

    aside: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=(), arbitrary_types_allowed=False)


async def read_body(
    request: HttpRequest,
    *,
    most: int,
    seconds: float,
    take: Callable[[int], None] = lambda count: None,
    limits: set[asyncio.Timeout] | None = None,
) -> bytes:
    """The body of a request.

    Args:
        most: bytes that it may have.
        seconds: how long it may take.
        take: told of bytes as they come; raises if there is no room for them.
        limits: has the limit of time in it as long as the body is read, so that it can be made to end now.

    Raises:
        ApiError: 413 if it is too large, 408 if it takes too long, 415 if it is compressed.
        ClientDisconnect: the client has gone.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415,
            f"body: found Content-Encoding {encoding[:40]!r}, expected none: send it uncompressed",
            code="unsupported_content_encoding",
            headers={"accept-encoding": "identity", "connection": "close"},
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(most)
    pieces: list[bytes] = []
    size = 0
    limits = set() if limits is None else limits
    try:
        async with asyncio.timeout(seconds) as limit:
            limits.add(limit)
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise _too_large(most)
                take(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(
            408, f"body: found {size:,} bytes after {seconds:g} seconds, expected all of it", code="body_timeout"
        ) from None
    finally:
        limits.discard(limit)
    return b"".join(pieces)


def _too_large(most: int) -> ApiError:
    headers = {"connection": "close"}
    return ApiError(
        413, f"body: found more than {most:,} bytes, expected fewer", code="body_too_large", headers=headers
    )


def parse_body(body: bytes, form: type[_FormT]) -> _FormT:
    """The fields that a JSON body holds. Raises `ApiError` for what is no JSON, or not of that form."""
    if not body.strip():
        raise ApiError(400, "body: is empty, expected a JSON object", code="invalid_json")
    try:
        value = parse_json(body.decode("utf-8"), max_items=_MOST_VALUES)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: not UTF-8 at byte {error.start}, expected JSON", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"body: not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"body: found {json_kind(value)}, expected a JSON object", code="invalid_json")
    return form_of(value, form)


def form_of(value: Mapping[str, Any], form: type[_FormT]) -> _FormT:
    """The fields of a JSON object. Raises `ApiError` for what is not of that form."""
    try:
        made = form.model_validate({name: item for name, item in value.items() if item is not None})
    except ValidationError as error:
        raise validation_error(error, lambda place: _wanted_at(place, value, form)) from None
    held = {name: value[name] for name in form.aside if name in made.model_fields_set} | (made.model_extra or {})
    if held:
        check_aside(_shown_name(max(held, key=lambda name: len(to_json(held[name])))), held)
    return made


def _wanted_at(place: tuple[int | str, ...], value: Mapping[str, Any], form: type[Form]) -> Sequence[ErrorDetails]:
    """What is wrong with a null at a place that has nothing, which says what is expected there."""
    try:
        form.model_validate(with_null(value, place))
    except ValidationError as error:
        return [one for one in error.errors(include_url=False) if one["loc"][: len(place)] == place]
    return []


def check_aside(name: str, held: object) -> None:
    """Check the size of what is held beside a request and changes no reply. Raises `ApiError` 400, which names it."""
    found = len(to_json(held))
    if found > _MOST_ASIDE:
        raise ApiError(
            400,
            f"{name}: found {found:,} bytes of JSON in what no reply depends on, expected at most {_MOST_ASIDE:,}",
            code="invalid_value",
            param=name,
        )


def unknown_fields(form: Form) -> list[str]:
    """The names of the fields that nobody knows here."""
    return sorted(_shown_name(name) for name in form.model_extra or {})


def _shown_name(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 64 else "…"
