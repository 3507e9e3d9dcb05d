"""What of a conversation its chat template fails on: the message, tool or variable, and the place in it.

A template fails in its own words, such as "'list object' has no attribute 'items'", which name nothing that the caller
wrote. So parts are left out until it fails no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mlxqwen.errors import MessagesError, MlxqwenError, TemplateError, one_line
from mlxqwen.files.json_file import json_kind
from mlxqwen.text.messages import Message
from mlxqwen.text.sandbox import RenderError

__all__ = ["naming_what_fails", "words_of"]

Render = Callable[[Sequence[Message], Mapping[str, Any]], object]

_MOST_RENDERINGS = 200
_MOST_CHARACTERS = 4_000_000  # that all of them read
_MOST_SECONDS = 0.5  # of processor time, after which none is begun
_LONGEST_WORDS = 200
_HARMLESS: tuple[Any, ...] = ("", {}, [])
_PLAIN = (Message({"role": "user", "content": "a"}),)
_TOOL_HINT = (
    'A tool is {"type": "function", "function": {"name": …, "description": …, "parameters": …}}, whose parameters are '
    'a JSON schema, such as {"type": "object", "properties": {…}}: correct this part of it, or leave it out.'
)
_MESSAGE_HINT = (
    'Write it as OpenAI\'s API has it, such as {"role": "user", "content": "Hello"}, or leave this part of it out.'
)
_VARIABLE_HINT = "Leave the variable out, or give it another value."
_BROKEN_HINT = "Use the chat template of the model's page."


def words_of(error: TemplateError) -> str:
    """What a template says itself, bounded."""
    return one_line(error.problem.removeprefix("chat template: "), _LONGEST_WORDS)


@contextmanager
def naming_what_fails(messages: Sequence[Message], values: Mapping[str, Any], render: Render) -> Iterator[None]:
    """Let errors of a template that fails say on what.

    Args:
        messages: as they are rendered.
        values: the template's other variables by name, `tools` among them.
        render: messages and such variables → their text.

    Raises:
        MessagesError: names the place in `messages`, `tools` or the variables.
        TemplateError: the template fails on any conversation, or no place was found in bounds.
    """
    try:
        yield
    except RenderError as error:
        raise _named(error, messages, values, render) from error


class _SpentError(Exception):
    pass


def _named(error: RenderError, messages: Sequence[Message], values: Mapping[str, Any], render: Render) -> MlxqwenError:
    words = words_of(error)
    size = sum(len(str(dict(message))) for message in messages) + len(str(values)) + 1
    left = min(_MOST_RENDERINGS, _MOST_CHARACTERS // size)
    until = time.thread_time() + _MOST_SECONDS

    def fails(some: Sequence[Message], others: Mapping[str, Any]) -> bool:
        nonlocal left
        left -= 1
        if left < 0 or time.thread_time() > until:
            raise _SpentError
        try:
            render(some, others)
        except RenderError:
            return True
        except MlxqwenError:
            return False
        return False

    try:
        place, hint = _place(messages, values, fails)
    except _SpentError:
        return TemplateError(
            f"chat template: it raises an error on this conversation: {words}",
            hint="Leave messages and tools out until it does not, to see on which.",
        )
    if place is None:
        return TemplateError(f"chat template: it raises an error on any conversation: {words}", hint=_BROKEN_HINT)
    return MessagesError(f"{place}: the chat template raises an error: {words}", hint=hint)


def _place(
    messages: Sequence[Message],
    values: Mapping[str, Any],
    fails: Callable[[Sequence[Message], Mapping[str, Any]], bool],
) -> tuple[str | None, str]:
    """The place and what was found there, and the way out; None for the template itself."""
    tools = values.get("tools") or []
    bare = {name: value for name, value in values.items() if name != "tools"}
    if fails(_PLAIN, bare):
        for name, value in bare.items():
            if not fails(_PLAIN, {other: one for other, one in bare.items() if other != name}):
                return f"template_variables.{name}: found {json_kind(value)}", _VARIABLE_HINT
        return None, ""
    if tools and not fails(messages, bare):
        at = _first_failing(len(tools), lambda count: fails(messages, {**bare, "tools": tools[:count]}))
        fails_with = _in_place(tools, at, lambda some: fails(messages, {**bare, "tools": some}))
        return _described(f"tools[{at}]", tools[at], fails_with), _TOOL_HINT
    at = _first_failing(len(messages), lambda count: fails(messages[:count], values))
    fails_with = _in_place(
        [dict(message) for message in messages[: at + 1]], at, lambda some: fails([*map(Message, some)], values)
    )
    return _described(f"messages[{at}]", dict(messages[at]), fails_with), _MESSAGE_HINT


def _first_failing(count: int, fails: Callable[[int], bool]) -> int:
    """A place without which those before it pass, and with which they fail, though all together fail."""
    passing, failing = 0, count
    while failing - passing > 1:
        middle = (passing + failing) // 2
        if fails(middle):
            failing = middle
        else:
            passing = middle
    return failing - 1


def _in_place(parts: Sequence[Any], at: int, fails: Callable[[list[Any]], bool]) -> Callable[[Any], bool]:
    """Whether it fails with another value in one place of a list."""
    return lambda value: fails([*parts[:at], value, *parts[at + 1 :]])


def _described(path: str, value: Any, fails: Callable[[Any], bool]) -> str:
    """The innermost place with another value in which it does not fail, and what was found there."""
    found = [(path, value, True)]
    with suppress(_SpentError):
        _look_into(found, fails)
    path, value = next((path, value) for path, value, is_sure in reversed(found) if is_sure)
    return f"{path}: found {json_kind(value)}"


def _look_into(found: list[tuple[str, Any, bool]], fails: Callable[[Any], bool]) -> bool:
    """Look for the place within the last one of `found`, and add it there → whether it is there.

    With each place of `found` stands what is there, and whether it is the place, or around it, for sure.
    """
    path, value, _ = found[-1]
    parts = dict(_parts(value))

    def is_within(name: int | str, *, is_cause: bool, is_sure: bool = True) -> bool:
        step = f"[{name}]" if isinstance(name, int) else f".{name}"
        found.append((path + one_line(step, 80), parts[name], is_sure))
        if _look_into(found, lambda changed: fails(_replaced(value, name, changed))) or is_cause:
            return True
        found.pop()
        return False

    def passes_with_another(name: int | str) -> bool:
        return any(not fails(_replaced(value, name, other)) for other in _HARMLESS if other != parts[name])

    # A part that may be left out tells most; where none may, the others are looked at, too.
    needless = [name for name in parts if not fails(_without(value, name))]
    return (
        any(is_within(name, is_cause=passes_with_another(name)) for name in needless)
        or any(is_within(name, is_cause=True) for name in parts if name not in needless and passes_with_another(name))
        or any(
            is_within(name, is_cause=False, is_sure=False)
            for name, part in parts.items()
            if isinstance(part, dict | list)
        )
    )


def _parts(value: Any) -> Iterator[tuple[int | str, Any]]:
    """The parts of a list or an object that can be left out; a message keeps its role and its content."""
    if isinstance(value, list):
        yield from enumerate(value)
    elif isinstance(value, dict):
        kept = ("role", "content") if "role" in value else ()
        yield from ((name, part) for name, part in value.items() if name not in kept)


def _without(value: Any, name: int | str) -> Any:
    if isinstance(value, list):
        return [part for place, part in enumerate(value) if place != name]
    return {other: part for other, part in value.items() if other != name}


def _replaced(value: Any, name: int | str, part: Any) -> Any:
    if isinstance(value, list):
        return [part if place == name else other for place, other in enumerate(value)]
    return {**value, name: part}
