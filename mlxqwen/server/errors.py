"""Errors as clients get them: a status, and OpenAI's or Anthropic's error object."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mlxqwen.errors import (
    ContextLengthError,
    HubError,
    InsufficientMemoryError,
    MlxqwenError,
    OptionError,
    TemplateError,
    one_line,
)
from mlxqwen.files.json_file import shown
from mlxqwen.server.client_words import in_client_words

__all__ = ["ApiError", "anthropic_error", "api_error", "load_error", "openai_error", "validation_error", "with_null"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {**_TYPES, 405: "not_found_error", 500: "api_error", 503: "overloaded_error"}
_PARAM = re.compile(r"([a-z_]+(?:\[\d+\])*(?:\.[a-z_]+(?:\[\d+\])*)*)(?: [a-z0-9 ]+)?: ")
_ABSOLUTE_PATH = re.compile(r"(?:^|[^\w./])~?/\w|\b[A-Za-z]:\\")
_RELATIVE_PATH = re.compile(r"(?:^|[\s'\"(])\.{1,2}/")
_MISSING = "missing_required_parameter"
_PYTHONS = re.compile(r"a valid dictionary(?: or (?:object to extract fields from|instance of \w+))?")
_ANOTHER = "Ask another model."
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_KINDS = {"str", "int", "float", "bool", "dict", "list"}
_PARAMS = {
    "salt": "cache_salt",
    "thinking": "chat_template_kwargs.enable_thinking",
    "template_variables": "chat_template_kwargs",
}


class ApiError(Exception):
    """What a request is refused or ended with.

    Args:
        status: of HTTP.
        message: names the thing, what was found and what was expected.
        code: a word for programs.
        param: the field that is wrong.
        headers: of the response.
        for_owner: what the server's owner can do about it, for the log alone.

    Attributes:
        is_logged: whether the log has it already, as one that many requests end with.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        for_owner: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.for_owner = for_owner
        self.is_logged = False


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def api_error(error: BaseException) -> ApiError:
    """What a client is told of `error`: of what is not ours, or names a folder, nothing but that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return validation_error(error)
    if isinstance(error, MlxqwenError):
        return _own_error(error)
    if _is_out_of_memory(error):
        return ApiError(503, "memory: found none left for this request", code="out_of_memory")
    return _internal_error()


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, which MLX's RuntimeErrors say in words."""
    words = ("allocate", "OutOfMemory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(one in str(error) for one in words)
    )


def _own_error(error: MlxqwenError) -> ApiError:
    message, for_owner = in_client_words(error)
    told = _by_kind(error, message)
    told.for_owner = for_owner
    return told


def _by_kind(error: MlxqwenError, message: str) -> ApiError:
    found = _PARAM.match(f"{error.problem} ")
    head, dot, rest = ("", "", "") if found is None else found[1].partition(".")
    param = None if found is None else _PARAMS.get(head, head) + dot + rest
    if found is not None and param is not None and message.startswith(found[1]):
        message = param + message[len(found[1]) :]
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, code="context_length_exceeded", param="messages")
    if isinstance(error, OptionError) and error.problem.startswith("engine: "):
        return ApiError(503, message, code="engine_closed")
    if isinstance(error, OptionError):
        return ApiError(400, message, code="invalid_value", param=param)
    if isinstance(error, TemplateError):
        return ApiError(400, message, code="invalid_value", param="messages")
    if isinstance(error, InsufficientMemoryError):
        return ApiError(503, message, code="out_of_memory", headers={"retry-after": "10"})
    return _internal_error() if _ABSOLUTE_PATH.search(message) else ApiError(500, message, code="internal_error")


def _internal_error() -> ApiError:
    return ApiError(500, "server: an error of its own, which its log tells", code="internal_error")


def load_error(error: BaseException, name: str, location: str) -> ApiError:
    """What those are told who wait for a model that cannot be loaded; its cause and place the caller logs, once.

    Args:
        name: of the model.
        location: the folder or hub id that errors name.
    """
    if isinstance(error, ApiError):
        return error
    told = api_error(error)
    status, code = (503, "model_unavailable") if isinstance(error, HubError) else (told.status, told.code)
    why = told.message
    if isinstance(error, HubError | InsufficientMemoryError):
        why = in_client_words(error, _ANOTHER)[0]
    elif isinstance(error, MlxqwenError):
        why = error.problem  # what helps is for who has the files
    why = why if not location else why.replace(location, name)
    if _ABSOLUTE_PATH.search(why) or _RELATIVE_PATH.search(why):
        why = "the server's log tells why"
    made = ApiError(500 if status < 500 else status, f"model: {shown(name)} cannot be loaded: {why}", code=code)
    made.is_logged = True
    return made


def validation_error(
    error: ValidationError, wanted_at: Callable[[tuple[int | str, ...]], Sequence[ErrorDetails]] | None = None
) -> ApiError:
    """The first thing that is wrong with a body, as one line.

    Args:
        error: of pydantic.
        wanted_at: what would be wrong with a null at the place of a field that is missing.
    """
    details = error.errors(include_url=False)
    if not details:
        return ApiError(400, "body: not as expected", code="invalid_value")
    closest = _closest(details)
    first = closest[0]
    path = _path(first["loc"])
    if first["type"] == "missing":
        asked = () if wanted_at is None else wanted_at(first["loc"])
        expected = " or ".join(dict.fromkeys(map(_wanted, asked))) or "a value"
        return ApiError(400, f"{path}: is missing, expected {expected}", code=_MISSING, param=path)
    wanted = " or ".join(dict.fromkeys(_wanted(one) for one in closest))
    found = _found(first["input"], counted=first["type"] in ("too_long", "too_short", "string_too_long"))
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, one_line(f"{path or 'body'}: found {found}, expected {wanted}"), code=code, param=path or None)


def _closest(details: Sequence[ErrorDetails], depth: int = 0) -> list[ErrorDetails]:
    """The first thing that is wrong; of a value that may be of several kinds, as the kind says that came furthest.

    Args:
        details: in the order of the body; their places agree up to `depth`.
        depth: parts of the places that have been looked at.
    """
    first = details[0]["loc"]
    at = next((n for n in range(depth, len(first)) if _is_kind(first[n])), None)
    if at is None:
        return [details[0]]
    kinds: dict[int | str, list[ErrorDetails]] = {}
    for one in details:
        if len(one["loc"]) > at and one["loc"][:at] == first[:at]:
            kinds.setdefault(one["loc"][at], []).append(one)
    found = [_closest(those, at + 1) for those in kinds.values()]
    furthest = max(_progress(those[0], at) for those in found)
    return [one for those in found if _progress(those[0], at) == furthest for one in those]


def _progress(detail: ErrorDetails, depth: int) -> tuple[list[int], bool]:
    """How much of a value is of its kind: the place behind `depth` where it is not any more, then whether more than its
    type was looked at."""
    place = [part if isinstance(part, int) else 0 for part in detail["loc"][depth:] if not _is_kind(part)]
    return place, not detail["type"].endswith("_type")


def _is_kind(part: int | str) -> bool:
    """Whether a part of a place is one of the kinds that a value may be of, and no field or index."""
    return isinstance(part, str) and (part in _KINDS or not _NAME.fullmatch(part))


def _path(location: Sequence[int | str]) -> str:
    """Where in the body, without the kinds that a field may be of."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _is_kind(part):
            path += f".{part}" if path else part
    return path


def with_null(value: Any, place: Sequence[int | str]) -> Any:
    """A copy of a JSON value that has null at a place of pydantic's; as it is where that leads nowhere."""
    if not place:
        return None
    head, rest = place[0], place[1:]
    if _is_kind(head):
        return with_null(value, rest) if rest else value
    if isinstance(value, list) and isinstance(head, int) and head < len(value):
        return [*value[:head], with_null(value[head], rest), *value[head + 1 :]]
    if isinstance(value, Mapping) and isinstance(head, str) and (head in value or not rest):
        return {**value, head: with_null(value.get(head), rest)}
    return value


def _wanted(detail: ErrorDetails) -> str:
    """What was expected."""
    bounds = detail.get("ctx", {})
    forms = {
        "greater_than_equal": ("at least {ge}", "ge"),
        "less_than_equal": ("at most {le}", "le"),
        "too_long": ("at most {max_length:,} of them", "max_length"),
        "too_short": ("at least {min_length:,} of them", "min_length"),
        "string_too_long": ("at most {max_length:,} characters", "max_length"),
    }
    if detail["type"] == "string_too_short":
        return "text that is not empty"
    form, name = forms.get(detail["type"], ("", ""))
    if name in bounds:
        return form.format(**bounds)
    wanted = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("Input should ")
    return one_line(_PYTHONS.sub("an object", wanted).replace("a valid list", "a list"), 300)


def _found(value: object, *, counted: bool) -> str:
    if counted and isinstance(value, Sized):
        return f"{len(value):,}"
    try:
        return shown(value)
    except (TypeError, ValueError):  # not from JSON
        return type(value).__name__
