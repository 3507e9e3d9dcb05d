"""A function's signature and docstring → the tool's schema, and its arguments from JSON. pydantic reads annotations."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

from mlxqwen.chat.tools.docstrings import own_docstring, parse_docstring
from mlxqwen.chat.tools.schemas import NAME_RULE, is_tool_name
from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.text.messages import to_plain_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["Arguments", "read_arguments", "tool_schema"]

MAX_TOLD = 3
_WAY_OUT = "Use str, int, float, bool, None, list, tuple, dict, Literal, Enum, Union, TypedDict, dataclasses, Any."


def tool_schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function in OpenAI's form, out of its signature and docstring.

    Annotations give the types, as pydantic reads them; parameters without one take any JSON value. Those with a
    default may be left out; `**names` stands for any further names. Descriptions come from `Annotated[T, "…"]` or
    pydantic's `Field`, else from a docstring in Google's or Sphinx's style. Parameters that `functools.partial` has
    bound are not shown.

    Args:
        name: what the model calls it: at most 128 characters, no `<`, `>`, quotes, backslashes or braces.
        function: a function, method, partial, class or object with `__call__`; not asynchronous.

    Raises:
        OptionError: what cannot be called with a JSON object of arguments, and why.
    """
    if not is_tool_name(name):
        raise OptionError(f"tool {name!r:.80}: found a name that no model can call it by, expected {NAME_RULE}")
    description, _ = parse_docstring(_docstring(function, _annotated(function)))
    schema: dict[str, Any] = {"name": name}
    if description:
        schema["description"] = description
    schema["parameters"] = read_arguments(name, function).schema
    plain: dict[str, Any] = to_plain_json({"type": "function", "function": schema}, f"tool {name}")
    return plain


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a function by name: their JSON schema, and how JSON values become keyword arguments."""

    schema: dict[str, Any]
    _adapter: TypeAdapter[dict[str, Any]]
    _bound: frozenset[str]

    def convert(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments for plain JSON values.

        Nothing is converted from one JSON type to another: "3" is no integer. 3.0 is one, as in JSON Schema.

        Raises:
            MessagesError: where the arguments do not fit, with what was found and what was expected there.
            What a class in the annotations raises, but for `ValueError` and `AssertionError`.
        """
        from pydantic import ValidationError

        if taken := sorted(self._bound & arguments.keys()):
            raise MessagesError(f"arguments: found the unknown name {_shown(taken[0])}")
        try:
            values = self._adapter.validate_json(json.dumps(arguments))
        except ValidationError:
            try:
                values = self._adapter.validate_json(json.dumps(_whole(arguments)))
            except ValidationError as error:
                errors = error.errors(include_url=False, include_context=False)
                raise MessagesError(_problem_of(errors, arguments, tuple(self.schema["properties"]))) from None
        return {name: value for name, value in values.items() if not isinstance(value, _Default)}


@dataclass(frozen=True, slots=True)
class _Default:
    """A parameter's default, shown in the schema; the function itself fills it in."""

    value: Any


def read_arguments(name: str, function: Callable[..., Any]) -> Arguments:
    """The arguments of a function. Raises `OptionError` as `tool_schema` does."""
    where = f"tool {name}"
    target = _annotated(function)
    _check_callable(function, target, where)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise OptionError(
            f"{where}: {function!r} has no signature that Python can read", hint="Wrap it in a function of your own."
        ) from None
    try:
        hints = typing.get_type_hints(target, include_extras=True)
    except Exception as cause:
        raise OptionError(
            f"{where}: an annotation cannot be resolved: {type(cause).__name__}: {cause}",
            hint="Names in annotations must be importable where the function is defined, not only for type checkers.",
        ) from None
    _, descriptions = parse_docstring(_docstring(function, target))
    bound = _bound_names(function)
    parameters = [
        _by_name(parameter, hints.get(parameter.name, Any), descriptions.get(parameter.name), where)
        for parameter in signature.parameters.values()
        if parameter.name not in bound
    ]
    try:
        schema, adapter = _compile(parameters)
    except Exception:
        for parameter in parameters:
            try:
                _compile([parameter])
            except Exception as cause:
                reason = " ".join(str(cause).split("\n\n")[0].split())
                raise OptionError(
                    f"{where}: parameter {parameter.name}: no JSON schema: {type(cause).__name__}: {reason}",
                    hint=_WAY_OUT,
                ) from None
        raise
    return Arguments(schema, adapter, bound)


def _by_name(parameter: Parameter, hint: Any, description: str | None, where: str) -> Parameter:
    """The parameter as a keyword, with its description and its default, for pydantic."""
    from pydantic import Field
    from pydantic.fields import FieldInfo

    if parameter.kind is Parameter.POSITIONAL_ONLY or parameter.kind is Parameter.VAR_POSITIONAL:
        found = f"*{parameter.name}" if parameter.kind is Parameter.VAR_POSITIONAL else "a positional-only parameter"
        raise OptionError(
            f"{where}: parameter {parameter.name}: found {found}, expected one that can be given by name",
            hint="JSON arguments have names: wrap the function in one that takes them.",
        )
    notes = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    described = any(isinstance(note, FieldInfo) and note.description for note in notes)
    description = next((note for note in notes if isinstance(note, str)), description)
    if parameter.default is None:
        hint = typing.Optional[hint]  # noqa: UP045 (`|` does not take hints written as text)
    if parameter.kind is Parameter.VAR_KEYWORD:
        return parameter.replace(annotation=hint)
    if description and not described:
        hint = typing.Annotated[hint, Field(description=description)]
    default = parameter.default if parameter.default is Parameter.empty else _Default(parameter.default)
    return parameter.replace(annotation=hint, default=default, kind=Parameter.KEYWORD_ONLY)


def _compile(parameters: Sequence[Parameter]) -> tuple[dict[str, Any], TypeAdapter[dict[str, Any]]]:
    from pydantic import ConfigDict, TypeAdapter

    def collect(**arguments: Any) -> dict[str, Any]:
        return arguments

    collect.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    collect.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(collect, config=config)  # type: ignore[arg-type]
    schema = adapter.json_schema(schema_generator=_schema_generator())
    definitions = schema.pop("$defs", {})
    for definition in definitions.values():
        definition.pop("title", None)
    try:
        return _inlined(schema, definitions, ()), adapter
    except RecursionError:  # a class that refers to itself can only be referred to
        return {**schema, "$defs": definitions}, adapter


@functools.cache
def _schema_generator() -> Any:
    """pydantic's generator without titles, unsorted, with defaults that JSON can hold."""
    from pydantic.json_schema import GenerateJsonSchema
    from pydantic_core import PydanticSerializationError

    class Generator(GenerateJsonSchema):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "union_format": "primitive_type_array"})
            self.ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

        def sort(self, value: Any, parent_key: str | None = None) -> Any:
            return value

        def get_default_value(self, schema: Any) -> Any:
            default = super().get_default_value(schema)
            return default.value if isinstance(default, _Default) else default

        def encode_default(self, dft: Any) -> Any:
            try:
                return json.loads(json.dumps(super().encode_default(dft), allow_nan=False))
            except (TypeError, ValueError, RecursionError) as cause:
                raise PydanticSerializationError(str(cause)) from None

    return Generator


def _inlined(node: Any, definitions: Mapping[str, Any], around: tuple[str, ...]) -> Any:
    """A schema with each reference replaced by its definition: templates that list types read no references.

    Raises:
        RecursionError: a definition that holds itself.
    """
    if isinstance(node, list):
        return [_inlined(item, definitions, around) for item in node]
    if not isinstance(node, dict):
        return node
    reference = node.get("$ref")
    name = reference.removeprefix("#/$defs/") if isinstance(reference, str) else ""
    if name not in definitions:
        return {key: _inlined(value, definitions, around) for key, value in node.items()}
    if name in around:
        raise RecursionError
    own = {key: value for key, value in node.items() if key != "$ref"}
    return {**_inlined(definitions[name], definitions, (*around, name)), **own}


def _problem_of(errors: Sequence[Any], arguments: Mapping[str, Any], names: Sequence[str]) -> str:
    """What is wrong with arguments, in words for the model that wrote them; `names` are the known ones."""
    problems: dict[str, list[str]] = {}
    for error in errors:
        path, found, rest = _follow(error["loc"], arguments)
        kind, message = error["type"], error["msg"]
        if kind.startswith("missing") and rest:
            problems.setdefault(f"{path}: {rest[-1]} is missing", [])
        elif kind in ("unexpected_keyword_argument", "extra_forbidden"):
            above, _, _ = _follow(error["loc"][:-1], arguments)
            expected = f", expected {' or '.join(names) or 'none'}" if above == "arguments" else ""
            problems.setdefault(f"{above}: found the unknown name {_shown(error['loc'][-1])}{expected}", [])
        elif message.startswith("Input should be "):
            problems.setdefault(f"{path}: found {_shown(found)}", []).append(message.removeprefix("Input should be "))
        else:
            problems.setdefault(f"{path}: found {_shown(found)}: {message}", [])
    lines = [
        f"{head}{', expected ' if tails else ''}{' or '.join(dict.fromkeys(tails))}" for head, tails in problems.items()
    ]
    return "; ".join(lines[:MAX_TOLD])


def _follow(place: Sequence[str | int], value: Any) -> tuple[str, Any, list[str | int]]:
    """Where `place` leads within the arguments, what is there, and its steps without a value: options of a union."""
    path, rest = "arguments", []
    for step in place:
        if isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}", value[step]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path, value = f"{path}[{step}]", value[step]
        else:
            rest.append(step)
    return path, value, rest


def _whole(value: Any) -> Any:
    """The same value with floats that have no fraction as integers."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _check_callable(function: Any, target: Any, where: str) -> None:
    if not callable(function):
        raise OptionError(f"{where}: found {type(function).__name__}, expected a function")
    if inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
        raise OptionError(
            f"{where}: found an asynchronous function, expected one that returns its result",
            hint="Wrap it: lambda …: asyncio.run(function(…)).",
        )
    if inspect.isgeneratorfunction(target):
        raise OptionError(f"{where}: found a generator, expected a function that returns its result")


def _annotated(function: Any) -> Any:
    """What carries the annotations of a callable: beneath `partial`, the constructor, or `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isclass(function):
        return function if hasattr(function, "__dataclass_fields__") else function.__init__
    if inspect.isroutine(function) or not callable(function):
        return function
    return _annotated(type(function).__call__)


def _docstring(function: Any, target: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isclass(function):
        return own_docstring(function)
    return target.__doc__ or ("" if inspect.isroutine(function) else own_docstring(type(function)))


def _bound_names(function: Any) -> frozenset[str]:
    """Names that `partial` has bound: the model must neither see nor change them."""
    names: set[str] = set()
    while isinstance(function, functools.partial):
        names |= function.keywords.keys()
        function = function.func
    return frozenset(names)
