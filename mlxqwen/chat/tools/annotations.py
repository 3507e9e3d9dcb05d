"""Annotations → JSON schemas, and JSON values → what the annotations ask for: one walk gives both."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from inspect import Parameter, Signature, signature
from typing import Any

from mlxqwen.chat.tools.docstrings import own_docstring, parse_docstring
from mlxqwen.chat.tools.validation import find_problem, same_json
from mlxqwen.errors import OptionError

__all__ = ["Kind", "object_kind", "resolve_hints"]

MAX_DEPTH = 32

_SCALARS: tuple[tuple[Any, str], ...] = (
    (str, "string"),
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (None, "null"),
    (types.NoneType, "null"),
)
_LISTS = (list, Sequence, Iterable, Collection)
_DICTS = (dict, Mapping, MutableMapping)
_SUPPORTED = (
    "str, int, float, bool, None, list, tuple, dict, Literal, Enum, Union, TypedDict, dataclass, Annotated, Any"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a parameter takes: the schema of its JSON values, and how one that fits becomes the Python value."""

    schema: dict[str, Any]
    convert: Callable[[Any], Any]

    def with_keys(self, **keys: Any) -> Kind:
        """The same with more keys in its schema; those of None are left out."""
        return Kind(self.schema | {key: value for key, value in keys.items() if value is not None}, self.convert)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an annotation stands: a name for errors, and the classes around it."""

    name: str
    around: tuple[Any, ...] = ()

    def within(self, annotation: Any) -> _Place:
        if any(annotation is outer for outer in self.around):
            raise OptionError(f"{self.name}: {_shown(annotation)} refers to itself", hint="Nest it to a fixed depth.")
        if len(self.around) >= MAX_DEPTH:
            raise OptionError(f"{self.name}: annotations nested deeper than {MAX_DEPTH} levels")
        return _Place(self.name, (*self.around, annotation))


def object_kind(
    signature: Signature,
    hints: Mapping[str, Any],
    descriptions: Mapping[str, str],
    name: str,
    *,
    hidden: Collection[str] = (),
    build: Callable[..., Any] = dict,
    around: tuple[Any, ...] = (),
) -> Kind:
    """The kind of the object that holds the arguments of a call.

    Args:
        signature, hints: what is called; hints are resolved annotations by parameter.
        descriptions: of parameters, by name.
        name: of what is called, for errors.
        hidden: parameters that are no longer free.
        build: takes the converted arguments by keyword.
        around: classes that this object stands in.

    Raises:
        OptionError: names the parameter that JSON cannot give.
    """
    members: dict[str, Kind] = {}
    required: list[str] = []
    others: Kind | None = None
    for parameter in signature.parameters.values():
        if parameter.name in hidden:
            continue
        place = _Place(f"{name}: parameter {parameter.name}", around)
        kind = _parameter_kind(parameter, hints.get(parameter.name, Any), place)
        if parameter.kind is Parameter.VAR_KEYWORD:
            others = kind
            continue
        if "description" not in kind.schema:
            kind = kind.with_keys(description=descriptions.get(parameter.name) or None)
        members[parameter.name] = kind
        if parameter.default is Parameter.empty:
            required.append(parameter.name)
    return _members_kind(members, required, others, build)


def resolve_hints(annotated: Any, name: str) -> dict[str, Any]:
    """`typing.get_type_hints` with what `Annotated` says.

    Raises:
        OptionError: an annotation written as text that means nothing where `annotated` was defined.
    """
    try:
        return typing.get_type_hints(annotated, include_extras=True)
    except Exception as cause:
        raise OptionError(
            f"{name}: an annotation cannot be resolved: {type(cause).__name__}: {cause}",
            hint="Names in annotations must be importable where the function is defined, not only for type checkers.",
        ) from None


def _parameter_kind(parameter: Parameter, annotation: Any, place: _Place) -> Kind:
    if parameter.kind is Parameter.POSITIONAL_ONLY or parameter.kind is Parameter.VAR_POSITIONAL:
        found = f"*{parameter.name}" if parameter.kind is Parameter.VAR_POSITIONAL else "a positional-only parameter"
        raise OptionError(
            f"{place.name}: found {found}, expected one that can be given by name",
            hint="JSON arguments have names: wrap the function in one that takes them.",
        )
    kind = _kind_of(annotation, place)
    if parameter.default is None:
        kind = _or_null(kind)
    if parameter.default is Parameter.empty:
        return kind
    default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    try:
        plain = json.loads(json.dumps(default, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return kind
    return Kind(kind.schema | {"default": plain}, kind.convert)


def _kind_of(annotation: Any, place: _Place) -> Kind:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    place = place.within(annotation) if not isinstance(annotation, type) or _is_class_of_members(annotation) else place
    for scalar, name in _SCALARS:
        if annotation is scalar:
            return Kind({"type": name}, annotation if annotation in (int, float) else _as_it_is)
    if annotation is Any or annotation is object:
        return Kind({}, _as_it_is)
    if isinstance(annotation, typing.NewType):
        return _kind_of(annotation.__supertype__, place)
    if type(annotation).__name__ == "TypeAliasType":  # Python 3.12's `type X = …`
        return _kind_of(annotation.__value__, place)
    if origin is typing.Annotated:
        description = next((note for note in arguments[1:] if isinstance(note, str)), None)
        return _kind_of(arguments[0], place).with_keys(description=description)
    if origin is typing.Union or origin is types.UnionType:
        return _union_kind(arguments, place)
    if origin is typing.Literal:
        return _choice_kind([getattr(choice, "value", choice) for choice in arguments], arguments, place)
    return _container_kind(annotation, origin or annotation, arguments, place) or _class_kind(annotation, place)


def _container_kind(annotation: Any, container: Any, arguments: tuple[Any, ...], place: _Place) -> Kind | None:
    if any(container is known for known in _LISTS):
        return _list_kind(arguments[0] if arguments else Any, list, place)
    if container is tuple:
        if annotation is tuple or annotation is typing.Tuple:  # noqa: UP006
            return _list_kind(Any, tuple, place)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return _list_kind(arguments[0], tuple, place)
        return _tuple_kind([_kind_of(argument, place) for argument in arguments])
    if any(container is known for known in _DICTS):
        key, item = arguments or (str, Any)
        if key is not str:
            raise OptionError(f"{place.name}: found keys of {_shown(key)}, expected str, as JSON has no others")
        return _members_kind({}, [], _kind_of(item, place), dict)
    return None


def _is_class_of_members(annotation: Any) -> bool:
    return isinstance(annotation, type) and (typing.is_typeddict(annotation) or is_dataclass(annotation))


def _class_kind(annotation: Any, place: _Place) -> Kind:
    if typing.is_typeddict(annotation):
        return _typed_dict_kind(annotation, place)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        members = tuple(annotation)
        return _choice_kind([member.value for member in members], members, place)
    if isinstance(annotation, type) and is_dataclass(annotation):
        name = f"{place.name}: {annotation.__name__}"
        hints = resolve_hints(annotation, name)
        _, descriptions = parse_docstring(own_docstring(annotation))
        return object_kind(signature(annotation), hints, descriptions, name, build=annotation, around=place.around)
    raise OptionError(
        f"{place.name}: found the annotation {_shown(annotation)}, which has no form in JSON",
        hint=f"Use {_SUPPORTED}.",
    )


def _choice_kind(values: Sequence[Any], choices: Sequence[Any], place: _Place) -> Kind:
    """One of `choices`, each written as the JSON value beside it."""
    if not values:
        raise OptionError(f"{place.name}: found nothing to choose from, expected one value or more")
    for value in values:
        if type(value) not in (str, int, bool, float, types.NoneType):
            raise OptionError(
                f"{place.name}: found the choice {_shown(value)}, expected text, a number, a bool or None"
            )
    names = list(dict.fromkeys(name for value in values for scalar, name in _SCALARS if type(value) is scalar))
    schema = {"type": names[0] if len(names) == 1 else names, "enum": list(values)}

    def convert(value: Any) -> Any:
        return next(choice for text, choice in zip(values, choices, strict=True) if same_json(value, text))

    return Kind(schema, convert)


def _union_kind(options: tuple[Any, ...], place: _Place) -> Kind:
    """The first option that fits, but a value that is already of one of the options stays as it is."""
    kinds = [_kind_of(option, place) for option in options if option is not types.NoneType]
    if len(kinds) == 1:
        return _or_null(kinds[0])
    if all(kind.schema.keys() == {"type"} and isinstance(kind.schema["type"], str) for kind in kinds):
        schema: dict[str, Any] = {"type": [kind.schema["type"] for kind in kinds]}
    else:
        schema = {"anyOf": [kind.schema for kind in kinds]}

    def convert(value: Any) -> Any:
        if any(type(value) is option for option in options if option in (str, int, float, bool)):
            return value
        return next(kind.convert(value) for kind in kinds if find_problem(value, kind.schema, "") is None)

    kind = Kind(schema, convert)
    return _or_null(kind) if types.NoneType in options else kind


def _or_null(kind: Kind) -> Kind:
    schema = dict(kind.schema)
    if find_problem(None, schema, "") is None:
        return kind
    if "type" in schema:
        names = schema["type"]
        schema["type"] = [*([names] if isinstance(names, str) else names), "null"]
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    if "anyOf" in schema:
        schema["anyOf"] = [*schema["anyOf"], {"type": "null"}]
    return Kind(schema, lambda value: None if value is None else kind.convert(value))


def _list_kind(annotation: Any, build: Callable[[Iterable[Any]], Any], place: _Place) -> Kind:
    item = _kind_of(annotation, place)
    schema = {"type": "array", "items": item.schema} if item.schema else {"type": "array"}
    return Kind(schema, lambda values: build(item.convert(value) for value in values))


def _tuple_kind(items: list[Kind]) -> Kind:
    size = {"minItems": len(items), "maxItems": len(items)}
    schema: dict[str, Any] = {"type": "array", **size}
    if items:
        schema = {"type": "array", "prefixItems": [item.schema for item in items], **size}
    return Kind(schema, lambda values: tuple(item.convert(value) for item, value in zip(items, values, strict=True)))


def _typed_dict_kind(annotation: Any, place: _Place) -> Kind:
    members: dict[str, Kind] = {}
    required: list[str] = []
    _, descriptions = parse_docstring(own_docstring(annotation))
    for name, hint in resolve_hints(annotation, f"{place.name}: {annotation.__name__}").items():
        # Wrappers written as text are unknown to `__required_keys__`.
        wrapper = typing.get_origin(hint)
        is_wrapped = wrapper is typing.Required or wrapper is typing.NotRequired
        kind = _kind_of(typing.get_args(hint)[0] if is_wrapped else hint, place)
        if "description" not in kind.schema:
            kind = kind.with_keys(description=descriptions.get(name) or None)
        members[name] = kind
        if wrapper is typing.Required or (not is_wrapped and name in annotation.__required_keys__):
            required.append(name)
    return _members_kind(members, required, None, dict)


def _members_kind(
    members: Mapping[str, Kind], required: list[str], others: Kind | None, build: Callable[..., Any]
) -> Kind:
    schema: dict[str, Any] = {"type": "object"}
    if members or others is None:
        schema["properties"] = {name: kind.schema for name, kind in members.items()}
    if required:
        schema["required"] = required
    schema["additionalProperties"] = False if others is None else others.schema or True

    def convert(value: Mapping[str, Any]) -> Any:
        kinds = {name: members.get(name, others) for name in value}
        return build(**{name: kind.convert(value[name]) for name, kind in kinds.items() if kind is not None})

    return Kind(schema, convert)


def _as_it_is(value: Any) -> Any:
    return value


def _shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else repr(annotation).removeprefix("typing.")
