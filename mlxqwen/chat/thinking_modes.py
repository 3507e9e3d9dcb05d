"""Thinking modes: whether a model thinks, and whether a switch changes that, read off its chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from mlxqwen.chat.thinking import begins_in_thought, knows_think_blocks
from mlxqwen.errors import MlxqwenError, OptionError
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["ThinkingModes", "check_budget_use", "note_switch", "thinking_modes"]

logger = logging.getLogger("mlxqwen")

_QUESTION = {"role": "user", "content": "a"}
# Some templates ask for a system message.
_PROBES: Sequence[Sequence[Mapping[str, Any]]] = ([_QUESTION], [{"role": "system", "content": "a"}, _QUESTION])
_TOOL = {"type": "function", "function": {"name": "b", "description": "d", "parameters": {"type": "object"}}}

_WITHOUT_EFFECT = {
    True: "thinking=True (--thinking) changes nothing: the model's chat template has no such switch, and opens no "
    "think block; replies are read as without it",
    False: "thinking=False (--no-thinking) changes nothing: the model's chat template has no such switch, and opens a "
    "think block for every reply; a thinking budget of 0 ends it at once",
}


class ThinkingModes(NamedTuple):
    """How a model's chat template treats the hard switch.

    Attributes:
        default: whether the model is expected to think where the switch is not given.
        can_switch: whether the switch changes the prompt.
    """

    default: bool
    can_switch: bool

    def thinks(self, thinking: bool | None) -> bool:
        """Whether the model is expected to think with the switch at `thinking`; None where it is not given."""
        return thinking if self.can_switch and thinking is not None else self.default


_KNOWN: WeakKeyDictionary[Tokenizer, dict[tuple[object, ...], ThinkingModes]] = WeakKeyDictionary()
_NOTED: WeakKeyDictionary[Tokenizer, set[bool]] = WeakKeyDictionary()  # the switches whose note was logged
_LOCK = Lock()


def thinking_modes(tokenizer: Tokenizer, *, tools: bool = False) -> ThinkingModes:
    """The modes of a tokenizer's chat template, read off once from a few renderings of a short question.

    A template without think blocks has none. The switch works if its values render different prompts: Qwen3's closes a
    block for False. Without a switch, the model thinks if the template opens a block. Without a template it may think.

    Args:
        tokenizer: has the template.
        tools: whether tools are given; some checkpoints have another template then.
    """
    if tokenizer.chat_template is None and not tokenizer.chat_templates:
        return ThinkingModes(default=True, can_switch=False)
    key = (bool(tools), *tokenizer.chat_templates.items())
    with _LOCK:
        known = _KNOWN.setdefault(tokenizer, {})
        modes = known.get(key)
    if modes is None:
        modes = known[key] = _read_off(tokenizer, tools)
    return modes


def _read_off(tokenizer: Tokenizer, tools: bool) -> ThinkingModes:
    if not knows_think_blocks(tokenizer, tools=tools):
        return ThinkingModes(default=False, can_switch=False)
    for messages in _PROBES:
        try:
            absent, on, off, again = (_prompt(tokenizer, messages, tools, one) for one in (None, True, False, True))
        except MlxqwenError:  # a conversation that the template does not take
            continue
        if on == off or on != again:  # a template may print the time
            return ThinkingModes(default=begins_in_thought(tokenizer, absent) is True, can_switch=False)
        # Of a switch that is not given some templates make False.
        return ThinkingModes(default=absent != off, can_switch=True)
    return ThinkingModes(default=False, can_switch=False)


def _prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: bool, thinking: bool | None
) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tools=[_TOOL] if tools else None, add_generation_prompt=True, enable_thinking=thinking
    )


def note_switch(tokenizer: Tokenizer, thinking: bool | None, *, tools: bool = False) -> None:
    """Log, once for a tokenizer and a value, that the switch has no effect and the model does otherwise."""
    if thinking is None or thinking_modes(tokenizer, tools=tools).thinks(thinking) == thinking:
        return
    with _LOCK:
        noted = _NOTED.setdefault(tokenizer, set())
        is_noted = thinking in noted
        noted.add(thinking)
    if not is_noted:
        logger.warning(_WITHOUT_EFFECT[thinking])


def check_budget_use(tokenizer: Tokenizer, thinking: object, budget: object, early_stop_text: object) -> None:
    """Check that a budget is not given with thinking off, nor a sentence without a budget. Raises `OptionError`."""
    if thinking is False and budget and not thinking_modes(tokenizer).thinks(False):
        raise OptionError(
            f"thinking_budget: found {budget!r} where thinking is off, expected none, or 0",
            hint="Leave out thinking=False to let the model think, or the budget.",
        )
    if early_stop_text is not None and budget is None:
        raise OptionError(
            "early_stop_text: found one without a thinking_budget, expected both",
            hint="The sentence ends a thought over its budget: give one, such as thinking_budget=1000.",
        )
