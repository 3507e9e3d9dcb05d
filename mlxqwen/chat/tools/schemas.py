"""Schemas of tools, and arguments checked against them by jsonschema, within bounds.

A schema may come from a stranger's server. A chat shows it as it is; arguments are checked against it in a bounded
number of steps. No reference is fetched, and no pattern is matched, as Python's `re` may not end on one.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from mlxqwen.errors import MessagesError, OptionError, one_line
from mlxqwen.text.messages import prepare_tools

__all__ = ["MAX_STEPS", "NAME_RULE", "check_tool_schemas", "find_problem", "is_tool_name"]

NAME_RULE = "1 to 128 printable characters without <, >, quotes, \\, { and }"
MAX_NAME = 128
MAX_STEPS = 200_000  # a keyword's visit, an entry of its value, an item of what it judges, or 16 characters of an error
MAX_TOLD = 300
MAX_FORMS = 4
MAX_FOUND = 60

logger = logging.getLogger("mlxqwen")

_UNCHECKED = {"pattern", "patternProperties", "unevaluatedItems", "unevaluatedProperties"}
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
# Of these, what a keyword below lets pass may be what is wrong.
_TURNING = {"not", "disallow", "oneOf", "if", "contains", "minContains", "maxContains"}


def is_tool_name(name: object) -> bool:
    """Whether a model can call a tool by this name: the name must not end a tag or a string."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or name != name.strip():
        return False
    return name.isprintable() and not set(name) & set("<>\"'`\\{}")


def check_tool_schemas(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of tool schemas, each in the form `{"type": "function", "function": {"name": …}}`.

    Bare functions are wrapped, keys of None in a function dropped. `parameters`, if there are any, are an object or a
    bool, and stay as they are: where they break the rules of JSON Schema, or several tools have one name, one note of
    the logger `mlxqwen` says so.

    Raises:
        MessagesError: names the tool, the place in it and what is wrong.
    """
    functions = [_check_function(tool, f"tools[{i}]") for i, tool in enumerate(prepare_tools(tools) or [])]
    for name, count in Counter(function["name"] for function in functions).items():
        if count > 1:
            _note(f"tool {name!r}: found {count} of this name; shown as given, and a call of it means the first")
    for function in functions:
        if "parameters" in function:
            _note_problem(function["name"], json.dumps(function["parameters"]))
    return [{"type": "function", "function": function} for function in functions]


def find_problem(arguments: Mapping[str, Any], schema: Any, name: str) -> str | None:
    """Why a call's arguments do not fit a schema, in words for the model that wrote them; None if they fit.

    `pattern`, `patternProperties`, `unevaluatedItems`, `unevaluatedProperties` and `format` are left to the function;
    where a `not`, `oneOf`, `if` or `contains` depends on them, that is too.

    Args:
        arguments: plain JSON values.
        schema: as it was shown.
        name: the tool's.

    Raises:
        OptionError: the schema is none, or refers to what it does not hold: names the tool.
    """
    text = json.dumps(schema)
    if problem := schema_problem(text):
        raise OptionError(
            f"tool {name!r}: parameters{problem}: no arguments can be checked against it",
            hint="Repair the schema, or leave this tool out.",
        )
    try:
        found = _best(_draft_of(schema), schema, arguments, _Steps(len(text)))
    except (_TooExpensiveError, RecursionError):
        return f"arguments: not checked: this takes more than {MAX_STEPS:,} steps, or goes too deep"
    except Exception as cause:  # jsonschema's own for references, and what a number or a URI may raise in it
        raise OptionError(
            f"tool {name!r}: parameters: no arguments can be checked against it: {cause}",
            hint="References stay within the schema, as nothing is fetched. Repair it, or leave this tool out.",
        ) from None
    return None if found is None else f"arguments{found}"


@lru_cache(maxsize=256)
def schema_problem(text: str) -> str | None:
    """Where the JSON text of a schema breaks the rules of its draft, and which rule; None if nowhere.

    The draft is that of `$schema`, else 2020-12.
    """
    schema = json.loads(text)
    if not isinstance(schema, dict):
        return f": found {text[:60]}, expected an object"
    try:
        draft = _draft_of(schema)
        return _best(draft, draft.META_SCHEMA, schema, _Steps())
    except (_TooExpensiveError, RecursionError):
        return f": more than {MAX_STEPS:,} steps to check"


@lru_cache(maxsize=256)
def _note_problem(name: str, text: str) -> None:
    """Log once what is wrong with a tool's parameters."""
    if problem := schema_problem(text):
        _note(f"tool {name!r}: parameters{problem}; shown as given")


@lru_cache(maxsize=256)
def _note(text: str) -> None:
    """Log a text once."""
    logger.warning("%s", one_line(text))


@dataclass(slots=True)
class _Steps:
    """What a check may still cost, the length of a stranger's schema, and how often a rule was left to the function."""

    characters: int = 0
    left: int = MAX_STEPS
    unchecked: int = 0


class _TooExpensiveError(Exception):
    pass


_steps: ContextVar[_Steps] = ContextVar("_steps")


def _draft_of(schema: Any) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    declared = schema.get("$schema")
    try:
        return validator_for({"$schema": declared} if isinstance(declared, str) else {}, default=Draft202012Validator)
    except ValueError:  # no URI
        return Draft202012Validator


@cache
def _bounded(draft: Any) -> Any:
    """A draft's validator that counts its steps, fetches nothing and matches no patterns."""
    from attrs import evolve
    from jsonschema.validators import extend

    validator = extend(draft, {keyword: _counted(keyword, check) for keyword, check in draft.VALIDATORS.items()})
    # jsonschema's own `evolve` takes the plain class of its draft for a subschema that names one.
    validator.evolve = lambda self, **changes: evolve(self, **changes)
    return validator


def _counted(keyword: str, check: Callable[..., Iterator[Any] | None]) -> Callable[..., Sequence[Any]]:
    def counted(validator: Any, value: Any, instance: Any, schema: Mapping[str, Any]) -> Sequence[Any]:
        steps = _steps.get()
        items = _size(instance)
        steps.left -= 1 + _size(value) + (items * items if keyword == "uniqueItems" else items)
        if isinstance(value, str) and keyword in _REFERENCES:
            # Each look-up of an anchor or an address walks the whole schema.
            steps.left -= (len(value) if value.startswith("#/") else steps.characters) // 16
        if steps.left < 0:
            raise _TooExpensiveError
        if keyword in _UNCHECKED or (keyword == "additionalProperties" and "patternProperties" in schema):
            steps.unchecked += 1
            return ()
        before = steps.unchecked
        errors = list(check(validator, value, instance, schema) or ())
        steps.left -= sum(len(error.message) for error in errors) // 16
        return () if keyword in _TURNING and steps.unchecked > before else errors

    return counted


def _size(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 0


def _best(draft: Any, schema: Any, value: Any, steps: _Steps) -> str | None:
    """The most helpful problem of a value, after its name; None if the schema fits."""
    from jsonschema.exceptions import best_match
    from referencing import Registry

    token = _steps.set(steps)
    try:
        error: Any = best_match(_bounded(draft)(schema, registry=Registry()).iter_errors(value))
    finally:
        _steps.reset(token)
    if error is None:
        return None
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    # Of several forms none of which fits, each says what it would take.
    forms = [form for form in error.context or () if not form.path] or [error]
    messages = dict.fromkeys(_message(form) for form in forms[:MAX_FORMS])
    return one_line(f"{path}: {'; '.join(messages)}", MAX_TOLD)


def _message(error: Any) -> str:
    """The text of an error, with long values cut."""
    found, text = repr(error.instance), str(error.message)
    return (
        f"{found[: MAX_FOUND - 1]}…{text[len(found) :]}" if len(found) > MAX_FOUND and text.startswith(found) else text
    )


def _check_function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type", "function")
    if kind != "function":
        raise _wrong(f"{where}: type", kind, "'function'")
    if "function" not in tool:
        function = {key: value for key, value in tool.items() if key != "type"}
    else:
        where, function = f"{where}: function", tool["function"]
    if not isinstance(function, dict):
        raise _wrong(where, function, "an object")
    function = {key: value for key, value in function.items() if value is not None}
    if not is_tool_name(function.get("name")):
        raise _wrong(f"{where}: name", function.get("name"), NAME_RULE)
    if not isinstance(function.get("parameters", {}), dict | bool):
        raise MessagesError(
            f"{where.replace(': ', '.')}.parameters: found {function['parameters']!r:.80}, expected a JSON schema, "
            "which is an object",
            hint='For example {"type": "object", "properties": {}}, or none where the function takes nothing.',
        )
    return function


def _wrong(where: str, found: object, expected: str) -> MessagesError:
    return MessagesError(f"{where}: found {found!r:.80}, expected {expected}")
