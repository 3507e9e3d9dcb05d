"""How a chat tells of thinking: its mode in a sentence, and the tokens of a thought that its budget ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlxqwen.chat.tags import Tag
from mlxqwen.chat.thinking import EARLY_STOP_TEXT
from mlxqwen.chat.thinking_modes import thinking_modes
from mlxqwen.console import counted
from mlxqwen.engine.events import Done
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["describe_thinking", "without_sentence"]


def describe_thinking(tokenizer: Tokenizer, options: Mapping[str, Any]) -> str:
    """One sentence on how the next answers are thought about.

    Args:
        tokenizer: its chat template says whether the model thinks by itself.
        options: of the conversation: `thinking`, `thinking_budget`, `tools`.
    """
    switch, budget = options.get("thinking"), options.get("thinking_budget")
    if budget == 0 or not thinking_modes(tokenizer, tools=bool(options.get("tools"))).thinks(switch):
        return "The model does not think before it answers."
    limit = "as long as it likes" if budget is None else f"for at most {counted(budget, 'token')}"
    return f"The model thinks {limit} before it answers."


def without_sentence(done: Done, tokenizer: Tokenizer, options: Mapping[str, Any]) -> Done:
    """`done` with the model's own tokens alone as reasoning, without the sentence that a budget puts behind them.

    Args:
        done: of a reply to a conversation with these options.
        tokenizer: the model's.
        options: of the conversation: `thinking_budget`, `early_stop_text`.
    """
    budget = options.get("thinking_budget")
    if not done.usage.budget_exhausted or budget is None:
        return done
    sentence = options.get("early_stop_text")
    said = f"{EARLY_STOP_TEXT if sentence is None else sentence}\n"
    close = tokenizer.token_to_id(Tag.END_THINK.value)
    thought = list(done.tokens[: done.tokens.index(close)] if close in done.tokens else done.tokens)
    own = min(done.usage.reasoning_tokens, budget)  # of a reply that ended in the midst of the sentence
    for breaks in ("\n\n", "\n", ""):
        forced = tokenizer.encode_plain(breaks + said)
        count = done.usage.reasoning_tokens - len(forced)
        if thought[-len(forced) :] == forced and count >= budget:
            own = count
            break
    return replace(done, usage=replace(done.usage, reasoning_tokens=own))
