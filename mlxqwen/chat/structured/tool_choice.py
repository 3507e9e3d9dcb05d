"""Which calls of tools a reply may, must or must not make, as callers say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mlxqwen.checks import check_flag
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import json_kind

__all__ = ["CallRules", "read_tool_choice"]

_FORMS = (
    '"auto", "none", "required", {"type": "function", "function": {"name": …}} or {"type": "allowed_tools", '
    '"allowed_tools": {"mode": …, "tools": […]}}'
)


class CallRules(NamedTuple):
    """Which calls a reply makes.

    Args:
        mode: "none"; "auto", as the model decides; or "required".
        tools: those that may be called, in OpenAI's form `{"type": "function", "function": {…}}`.
        most_one: whether there is at most one call.
        is_narrowed: whether there are further tools, which may not be called.
    """

    mode: Literal["none", "auto", "required"]
    tools: tuple[Mapping[str, Any], ...]
    most_one: bool
    is_narrowed: bool = False

    @property
    def is_free(self) -> bool:
        """Whether nothing restricts the calls."""
        is_restricted = self.most_one or self.is_narrowed or any(is_strict(tool) for tool in self.tools)
        return self.mode == "auto" and not is_restricted


def read_tool_choice(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: object, parallel_tool_calls: object
) -> CallRules:
    """What `tool_choice` and `parallel_tool_calls` ask for. Of several tools of one name, calls are those of the first.

    Args:
        tools: as `Engine.stream` takes them.
        tool_choice: OpenAI's: None or "auto", "none", "required", one function, by
            `{"type": "function", "function": {"name": …}}` or `{"type": "function", "name": …}`, or some of them, by
            `{"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required", "tools": […]}}` or with `mode`
            and `tools` beside `type`. The prompt has all tools in every case.
        parallel_tool_calls: whether a reply may make several calls.

    Raises:
        OptionError: no such choice, a choice without tools, or a tool that is not there.
    """
    parallel = check_flag("parallel_tool_calls", parallel_tool_calls)
    known = first_of_each_name([_with_function(tool) for tool in tools or ()])
    if tool_choice is None or tool_choice == "auto":
        return CallRules("auto", known, not parallel)
    if tool_choice == "none":
        return CallRules("none", known, not parallel)
    if tool_choice == "required":
        if not known:
            raise OptionError('tool_choice: found "required" without tools, expected tools to choose from')
        return CallRules("required", known, not parallel)
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "allowed_tools":
        return _allowed(known, tool_choice, not parallel)
    name = _chosen_name(tool_choice)
    chosen = tuple(tool for tool in known if tool["function"].get("name") == name)
    if not chosen:
        raise _no_such_tool(name, known)
    return CallRules("required", chosen, True)


def _allowed(known: tuple[Mapping[str, Any], ...], choice: Mapping[str, Any], most_one: bool) -> CallRules:
    """Calls of some of the tools."""
    inner = choice.get("allowed_tools", choice)
    mode = inner.get("mode") if isinstance(inner, Mapping) else None
    tools = inner.get("tools") if isinstance(inner, Mapping) else None
    if mode not in ("auto", "required"):
        found = f"{mode!r:.80}" if isinstance(mode, str) else json_kind(mode)
        raise OptionError(f'tool_choice: mode: found {found}, expected "auto" or "required"')
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not tools:
        found = "none" if isinstance(tools, Sequence) and not tools else json_kind(tools)
        raise OptionError(f"tool_choice: tools: found {found}, expected a list of at least one function")
    wanted = dict.fromkeys(_chosen_name(tool) for tool in tools)
    by_name = {tool["function"].get("name"): tool for tool in known}
    for name in wanted:
        if name not in by_name:
            raise _no_such_tool(name, known)
    chosen = tuple(by_name[name] for name in wanted)
    return CallRules("required" if mode == "required" else "auto", chosen, most_one, len(chosen) < len(known))


def first_of_each_name(tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The tools that a call can mean: by its name, the first that has it."""
    by_name: dict[object, Mapping[str, Any]] = {}
    for tool in tools:
        by_name.setdefault(tool["function"].get("name"), tool)
    return tuple(by_name.values())


def _no_such_tool(name: str, known: Sequence[Mapping[str, Any]]) -> OptionError:
    names = ", ".join(str(tool["function"].get("name")) for tool in known)
    return OptionError(f"tool_choice: found {name!r:.80}, expected one of the tools: {names or 'there are none'}")


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether calls of a tool have to fit its schema, whatever the model would write."""
    return tool["function"].get("strict") is True


def _chosen_name(choice: object) -> str:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        inner = choice.get("function", choice)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if isinstance(name, str):
            return name
    found = f"{choice!r:.80}" if isinstance(choice, str | Mapping) else json_kind(choice)
    raise OptionError(f"tool_choice: found {found}, expected {_FORMS}")


def _with_function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tool in OpenAI's form; a bare function is wrapped."""
    function = tool.get("function", tool)
    return {"type": "function", "function": function if isinstance(function, Mapping) else {}}
