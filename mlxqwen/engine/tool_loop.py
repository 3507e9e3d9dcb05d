"""The loop of tools: the model calls functions, reads their results and answers, until it calls no more."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxqwen.chat.reply import Reply, ToolCall
from mlxqwen.chat.tools import call_tool, tool_schema
from mlxqwen.checks import check_integer
from mlxqwen.engine.events import Done, Event, assistant_message
from mlxqwen.engine.generation import FinishReason
from mlxqwen.engine.options import DEFAULT_MAX_ROUNDS
from mlxqwen.errors import ContextLengthError, OptionError

__all__ = ["ToolEvent", "ToolResult", "ToolRun", "Tools", "stream_tool_loop", "tool_choices"]

_NOT_CALLED = "Error: the reply was cut off, so the tool was not called"


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A call of the model, and the text that the model reads as its result."""

    call: ToolCall
    content: str


@dataclass(frozen=True, slots=True)
class ToolRun:
    """How a run with tools ended.

    Args:
        reply: the last one.
        finish_reason: that of the last reply: "tool_calls" if the rounds are used up, although it called tools once
            more. "length" also if the results left no room in the context for another reply.
        messages: all that the run adds to the conversation, well-formed however it ended: each call has its result.
            Behind the caller's messages they can be asked about, or be run on.
        rounds: the end of each reply, the last one's included.
    """

    reply: Reply
    finish_reason: FinishReason
    messages: tuple[dict[str, Any], ...]
    rounds: tuple[Done, ...]


ToolEvent = Event | ToolResult | ToolRun
Tools = Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]]


def stream_tool_loop(
    answer: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], Iterator[Event]],
    messages: Sequence[Mapping[str, Any]],
    tools: Tools,
    *,
    max_rounds: int = DEFAULT_MAX_ROUNDS,
) -> Generator[ToolEvent]:
    """Let the model answer, make its calls in order, tell it the results, and repeat until it calls none.

    Args:
        answer: messages and schemas of tools → the events of a reply.
        messages: the conversation; never modified.
        tools: functions by the names that the model calls them by, or a list of functions with names of their own; no
            others are ever called. What goes wrong with a call, exceptions and `sys.exit` included, is told to the
            model as text. A call has no time limit: the run waits for it, and Ctrl-C ends both.
        max_rounds: the most replies. The calls of the last one are still made, so that the messages can be run on.

    Returns:
        the events of each reply, each followed by the results of its calls, and `ToolRun` at the end. A reply that did
        not end by itself calls nothing: its calls' results say so.

    Raises:
        OptionError: tools that are no functions by name, functions that cannot be tools, or `max_rounds` below 1.
        All that `answer` raises, but for a `ContextLengthError` behind the first reply: the run ends there.
    """
    functions = _by_name(tools)
    max_rounds = check_integer("max_rounds", max_rounds, 1)
    schemas = [tool_schema(name, function) for name, function in functions.items()]
    return _rounds(answer, answer(messages, schemas), list(messages), functions, schemas, max_rounds)


def tool_choices(first: object) -> Iterator[object]:
    """The `tool_choice` of each reply of a run: a call that has to be made is made in the first one."""
    yield first
    later: object = first if first == "none" else None
    if isinstance(first, Mapping) and first.get("type") == "allowed_tools":
        inner = first.get("allowed_tools", first)
        later = {**inner, "type": "allowed_tools", "mode": "auto"} if isinstance(inner, Mapping) else None
    while True:
        yield later


def _by_name(tools: object) -> dict[str, Callable[..., Any]]:
    if isinstance(tools, Mapping):
        return dict(tools)
    if not isinstance(tools, list | tuple):
        found = type(tools).__name__
        raise OptionError(
            f"tools: found {found}, expected functions by name, {{name: function}}, or a list of functions"
        )
    functions: dict[str, Callable[..., Any]] = {}
    for place, function in enumerate(tools):
        name = getattr(function, "__name__", None)
        if not callable(function) or not isinstance(name, str) or name in functions:
            found = f"a second {name}" if name in functions else f"{type(function).__name__} without a name"
            raise OptionError(
                f"tools[{place}]: found {found}, expected functions of different names",
                hint="Give them by name: {name: function}.",
            )
        functions[name] = function
    return functions


def _rounds(
    answer: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], Iterator[Event]],
    events: Iterator[Event],
    messages: list[Mapping[str, Any]],
    functions: Mapping[str, Callable[..., Any]],
    schemas: Sequence[Mapping[str, Any]],
    max_rounds: int,
) -> Generator[ToolEvent]:
    added: list[dict[str, Any]] = []
    rounds: list[Done] = []
    while True:
        for event in events:
            yield event
            if isinstance(event, Done):
                rounds.append(event)
        done = rounds[-1]
        added.append(assistant_message(done.reply))
        finish_reason = done.finish_reason
        for call in done.reply.whole_calls:
            content = _call(functions, schemas, call) if finish_reason == "tool_calls" else _NOT_CALLED
            added.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content})
            yield ToolResult(call, content)
        if finish_reason != "tool_calls" or len(rounds) == max_rounds:
            break
        try:
            events = answer([*messages, *added], schemas)
        except ContextLengthError:
            finish_reason = "length"
            break
    yield ToolRun(done.reply, finish_reason, tuple(added), tuple(rounds))


def _call(functions: Mapping[str, Callable[..., Any]], schemas: Sequence[Mapping[str, Any]], call: ToolCall) -> str:
    return call_tool(functions, schemas, {"name": call.name, "arguments": call.arguments})
