"""Anthropic's `context_management`: old results of tools and old thoughts are cleared where a request asks for that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mlxqwen.server.bodies import Form, form_of

__all__ = ["ContextManagement", "apply_edits"]

Block = dict[str, Any]
Messages = Sequence[tuple[str, str | list[Block]]]
"""Roles and contents."""

_CLEARED = "[The result of this call was cleared from the conversation.]"
_USUAL_TRIGGER = 100_000  # tokens of a prompt
_USUAL_KEEP = 3  # uses of tools


class Tokens(Form):
    """So many tokens of a prompt."""

    type: Literal["input_tokens"]
    value: Annotated[int, Field(ge=0)]


class ToolUses(Form):
    """So many uses of tools."""

    type: Literal["tool_uses"]
    value: Annotated[int, Field(ge=0)]


class ThinkingTurns(Form):
    """So many turns with thoughts."""

    type: Literal["thinking_turns"]
    value: Annotated[int, Field(ge=0)]


class Trigger(Form):
    """How long a prompt is, in tokens or in uses of tools, before something is cleared."""

    type: Literal["input_tokens", "tool_uses"]
    value: Annotated[int, Field(ge=0)]


class ClearToolUses(Form):
    """Clear the results of all but the last calls, once the prompt is long."""

    trigger: Trigger | None = None
    keep: ToolUses | None = None
    clear_at_least: Tokens | None = None
    exclude_tools: list[str] | None = None
    clear_tool_inputs: bool | list[str] | None = None


class ClearThinking(Form):
    """Clear all but the last thoughts."""

    keep: Literal["all"] | ThinkingTurns | None = None


class ContextManagement(Form):
    """`context_management`: edits of the conversation, in their order."""

    edits: Annotated[list[dict[str, Any]], Field(max_length=16)] | None = None


def apply_edits(
    given: ContextManagement, messages: Messages, count: Callable[[Messages], int], notes: list[str]
) -> tuple[Messages, list[dict[str, Any]]]:
    """The messages as the edits leave them → them, and what was applied, as replies tell it.

    Args:
        given: the edits; of those of other kinds a note is taken.
        messages: of the request.
        count: how many tokens a prompt of these messages has.
        notes: what is left out of the request.

    Raises:
        ApiError: an edit of another form.
    """
    applied: list[dict[str, Any]] = []
    known: list[tuple[Messages, int]] = []

    def tokens(some: Messages) -> int:
        """Each prompt is rendered once: long ones take seconds."""
        found = next((number for one, number in known if one is some), None)
        if found is None:
            found = count(some)
            known.append((some, found))
        return found

    for place, edit in enumerate(given.edits or ()):
        kind = str(edit.get("type", ""))
        if kind.startswith("clear_tool_uses_"):
            edited, told = _without_results(form_of(edit, ClearToolUses), messages, tokens)
        elif kind.startswith("clear_thinking_"):
            edited, told = _without_thoughts(form_of(edit, ClearThinking), messages)
        else:
            notes.append(f"context_management.edits[{place}]")
            continue
        if told is None:
            continue
        applied.append({"type": kind, **told, "cleared_input_tokens": max(tokens(messages) - tokens(edited), 0)})
        messages = edited
    return messages, applied


def _without_results(
    edit: ClearToolUses, messages: Messages, count: Callable[[Messages], int]
) -> tuple[Messages, dict[str, Any] | None]:
    uses = {str(block.get("id")): str(block.get("name")) for block in _blocks(messages, "tool_use")}
    trigger = edit.trigger or Trigger(type="input_tokens", value=_USUAL_TRIGGER)
    reached = len(uses) if trigger.type == "tool_uses" else None
    if not uses or (count(messages) if reached is None else reached) <= trigger.value:
        return messages, None
    keep = _USUAL_KEEP if edit.keep is None else edit.keep.value
    old = list(uses)[: max(len(uses) - keep, 0)]
    cleared = {one for one in old if uses[one] not in (edit.exclude_tools or ())}
    inputs = edit.clear_tool_inputs or ()
    without_input = {one for one in cleared if inputs is True or (inputs and uses[one] in inputs)}
    edited = [(role, _cleared(content, cleared, without_input)) for role, content in messages]
    least = 0 if edit.clear_at_least is None else edit.clear_at_least.value
    if not cleared or (least and count(messages) - count(edited) < least):
        return messages, None
    return edited, {"cleared_tool_uses": len(cleared)}


def _cleared(content: str | list[Block], cleared: Collection[str], without_input: Collection[str]) -> str | list[Block]:
    if isinstance(content, str):
        return content
    blocks = []
    for block in content:
        if block.get("type") == "tool_result" and str(block.get("tool_use_id")) in cleared:
            block = {**block, "content": _CLEARED}
        elif block.get("type") == "tool_use" and str(block.get("id")) in without_input:
            block = {**block, "input": {}}
        blocks.append(block)
    return blocks


def _without_thoughts(edit: ClearThinking, messages: Messages) -> tuple[Messages, dict[str, Any] | None]:
    """Without the thoughts of all but the last turns: a turn is all that the assistant says behind what a user says."""
    if edit.keep == "all":
        return messages, None
    keep = 1 if edit.keep is None else edit.keep.value
    turns: list[list[int]] = [[]]
    for place, (role, content) in enumerate(messages):
        if role == "user" and not _is_results(content):
            turns.append([])
        elif isinstance(content, list) and any(block.get("type") == "thinking" for block in content):
            turns[-1].append(place)
    thinking = [turn for turn in turns if turn]
    old = thinking[: max(len(thinking) - keep, 0)]
    places = {place for turn in old for place in turn}
    if not places:
        return messages, None
    edited: list[tuple[str, str | list[Block]]] = []
    for place, (role, content) in enumerate(messages):
        if place in places and isinstance(content, list):
            content = [block for block in content if block.get("type") not in ("thinking", "redacted_thinking")]
        edited.append((role, content))
    return edited, {"cleared_thinking_turns": len(old)}


def _is_results(content: str | list[Block]) -> bool:
    return isinstance(content, list) and bool(content) and all(one.get("type") == "tool_result" for one in content)


def _blocks(messages: Messages, kind: str) -> list[Block]:
    lists = [content for _, content in messages if isinstance(content, list)]
    return [block for blocks in lists for block in blocks if block.get("type") == kind]
