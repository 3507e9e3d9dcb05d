"""Where what a reply must look like goes to the engine: response formats, and calls that have to be made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlxqwen.chat.structured.response_format import AnswerFormat, read_response_format
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import shown
from mlxqwen.server.bodies import Form
from mlxqwen.server.chat_fields import ChatFields, ReplyFields

__all__ = ["call_options", "in_words_of", "is_function", "may_compile", "missing_schema", "response_format"]

_OPENAI = ("text", "json_object", "json_schema")
_STRUCTURED = ("json", "json_object", "regex", "choice", "grammar")
_OLDER = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "regex": "regex",
    "json_schema": "json",
}
_TOOL = re.compile(r"tools\[(\d+)\]")


def response_format(fields: ReplyFields) -> AnswerFormat | None:
    """What the answer has to be, for the engine, by whichever of its names it is given: OpenAI's, vLLM's or SGLang's.

    Raises:
        OptionError: several forms, or one that cannot be read. Whether it can be kept to the engine tells.
    """
    forms: dict[str, Any] = {}
    if fields.response_format is not None:
        kind = fields.response_format.get("type")
        if kind not in _OPENAI:
            raise _refused("response_format", f"found type {shown(kind)}, expected text, json_object or json_schema")
        if kind == "json_schema":
            _check_schema(fields.response_format)
        if kind != "text":
            forms["response_format"] = fields.response_format
    given = {name: value for name, value in (fields.structured_outputs or {}).items() if value is not None}
    if given:
        known = {name: value for name, value in given.items() if name in _STRUCTURED}
        if len(known) != 1:
            raise _refused(
                "structured_outputs", f"found {shown(sorted(given))}, expected one of {', '.join(_STRUCTURED)}"
            )
        if not isinstance(known.get("json_object", True), bool):
            found = shown(known["json_object"])
            raise _refused("structured_outputs", f"json_object: found {found}, expected true or false")
        forms["structured_outputs"] = known
    for name, own in _OLDER.items():
        if (value := getattr(fields, name)) is not None:
            forms[name] = {own: value}
    if fields.ebnf is not None:
        raise _refused("ebnf", "found one, expected structured_outputs with a grammar in Lark's form")
    if len(forms) > 1:
        first, second, *_ = forms
        raise _refused(second, f"found one beside {first}, expected one of them")
    for name, form in forms.items():
        try:
            return read_response_format(form)
        except OptionError as error:
            told = error.problem.replace("response_format", name, 1)
            raise OptionError(told, hint=error.hint) from None
    return None


def _check_schema(given: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a `response_format` of type `json_schema` that has no schema in its place."""
    inner = given.get("json_schema", given)  # the Responses API has it beside the type
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        form = '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'
        raise missing_schema("response_format", form, ".json_schema.schema")


def missing_schema(where: str, form: str, place: str = ".schema") -> OptionError:
    """The error of a form that has no schema in its place.

    Args:
        where: the field that the form is in.
        form: as it should be.
        place: of the schema, in the field.
    """
    return OptionError(f"{where}{place}: is missing, expected {form}")


@contextmanager
def in_words_of(fields: ReplyFields, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let errors of the engine about a field name it as the request does.

    Args:
        fields: the request's.
        names: the engine's name of a field → the request's, where they differ; `tools[]` stands for any of the tools.
    """
    try:
        yield
    except OptionError as error:
        given = next((one for one in ("structured_outputs", *_OLDER) if getattr(fields, one) is not None), None)
        known = {**(names or {}), **({} if given is None else {"response_format": given})}
        problem, place = _of_any_tool(error.problem, fields)
        own = next((own for own in known if problem.startswith(own)), "")
        told = (known.get(own, "") + problem.removeprefix(own)).replace("tools[]", place, 1)
        if told == error.problem:
            raise
        raise OptionError(told, hint=error.hint) from None


def _of_any_tool(problem: str, fields: ReplyFields) -> tuple[str, str]:
    """A problem of one of the functions with `tools[]` in the place of that, and its name in the request."""
    found = _TOOL.match(problem)
    if found is None:
        return problem, "tools[]"
    places = [place for place, tool in enumerate(getattr(fields, "tools", None) or ()) if is_function(tool)]
    number = int(found[1])
    place = places[number] if number < len(places) else number
    return f"tools[]{problem[found.end() :]}", f"tools[{place}]"


def is_function(tool: Mapping[str, Any]) -> bool:
    """Whether a tool of a chat completion is a function; others are left out."""
    return tool.get("type", "function") == "function"


def call_options(fields: ChatFields) -> dict[str, Any]:
    """The engine's options for calls that have to be made, or must not; none where the model decides."""
    if fields.tool_choice in (None, "auto"):
        return {}
    choice = fields.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice = _of_functions(choice)
    return {"tool_choice": choice, "parallel_tool_calls": fields.parallel_tool_calls is not False}


def _of_functions(choice: dict[str, Any]) -> str | dict[str, Any]:
    """A choice of some tools without those that are no functions, which were left out of the tools, too."""
    inner = choice.get("allowed_tools", choice)
    tools = inner.get("tools") if isinstance(inner, dict) else None
    if not isinstance(tools, list) or not tools:
        return choice
    functions = [tool for tool in tools if not isinstance(tool, dict) or is_function(tool)]
    if not functions and inner.get("mode") == "auto":
        return "none"
    return {"type": "allowed_tools", "mode": inner.get("mode"), "tools": functions}


def may_compile(fields: Form) -> bool:
    """Whether a request, of any API, asks for what has to be compiled: a form of its answer, or calls that fit schemas.

    Schemas of strangers may take seconds to compile, which other requests should not wait for.
    """
    names = ("response_format", "structured_outputs", *_OLDER, "output_format")
    forms = [getattr(fields, name, None) for name in names]
    forms.append((getattr(fields, "output_config", None) or {}).get("format"))
    forms.append(getattr(getattr(fields, "text", None), "format", None))
    choice = getattr(fields, "tool_choice", None)
    choice = getattr(choice, "type", choice)  # Anthropic's is an object
    tools = getattr(fields, "tools", None) or ()
    return (
        any(one is not None and not (isinstance(one, Mapping) and one.get("type") == "text") for one in forms)
        or (bool(tools) and choice not in (None, "auto", "none"))
        or (choice != "none" and any(map(_is_strict, tools)))
    )


def _is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether a tool in the form of any API is strict."""
    function = tool.get("function")
    return any(one.get("strict") is True for one in (tool, function) if isinstance(one, Mapping))


def _refused(name: str, what: str) -> OptionError:
    return OptionError(f"{name}: {what}")
