"""A function's signature and docstring → the tool's schema, and how its arguments are made from JSON."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from mlxqwen.chat.tools.annotations import Kind, object_kind, resolve_hints
from mlxqwen.chat.tools.docstrings import own_docstring, parse_docstring
from mlxqwen.errors import OptionError
from mlxqwen.text.messages import to_plain_json

__all__ = ["NAME_RULE", "arguments_kind", "bound_names", "is_tool_name", "tool_schema"]

NAME_RULE = "1 to 64 letters, digits, _ and - of ASCII"


def is_tool_name(name: object) -> bool:
    """Whether OpenAI's API would take the name."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is not None


def tool_schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function in OpenAI's form, out of its signature and docstring.

    Annotations give the types; parameters without one take any JSON value. Those with a default may be left out;
    `**names` stands for any further names. Descriptions come from `Annotated[T, "…"]`, or else from a docstring in
    Google's or Sphinx's style. Parameters that `functools.partial` has bound are not shown.

    Args:
        name: what the model calls it: 1 to 64 letters, digits, `_` and `-`.
        function: a function, method, partial, class or object with `__call__`; not asynchronous.

    Raises:
        OptionError: what cannot be called with a JSON object of arguments, and why.
    """
    if not is_tool_name(name):
        raise OptionError(f"tool {name!r}: found a name that no model can call it by, expected {NAME_RULE}")
    target = _annotated(function)
    description, _ = parse_docstring(_docstring(function, target))
    schema: dict[str, Any] = {"name": name}
    if description:
        schema["description"] = description
    schema["parameters"] = arguments_kind(name, function).schema
    plain: dict[str, Any] = to_plain_json({"type": "function", "function": schema}, f"tool {name}")
    return plain


def arguments_kind(name: str, function: Callable[..., Any]) -> Kind:
    """What a function takes as keyword arguments.

    Raises:
        OptionError: as `tool_schema`.
    """
    where = f"tool {name}"
    target = _annotated(function)
    _check_callable(function, target, where)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise OptionError(
            f"{where}: {function!r} has no signature that Python can read", hint="Wrap it in a function of your own."
        ) from None
    _, descriptions = parse_docstring(_docstring(function, target))
    return object_kind(signature, resolve_hints(target, where), descriptions, where, hidden=bound_names(function))


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


def bound_names(function: Any) -> set[str]:
    """Names that `partial` has given a value: a model shall neither see nor change it."""
    names: set[str] = set()
    while isinstance(function, functools.partial):
        names |= function.keywords.keys()
        function = function.func
    return names
