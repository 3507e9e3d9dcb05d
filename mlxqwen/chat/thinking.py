"""Thinking: whether a reply begins in thought, by the end of its prompt, and the checks of a budget's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from mlxqwen.checks import check_integer
from mlxqwen.errors import OptionError
from mlxqwen.text.tokenizer import Tokenizer

__all__ = [
    "EARLY_STOP_TEXT",
    "begins_in_thought",
    "check_budget",
    "check_early_stop_text",
    "knows_think_blocks",
]

EARLY_STOP_TEXT = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
)

_OPEN, _CLOSE = "<think>", "</think>"
_HEADER = "<|im_start|>"
_TAGS = (_OPEN, _CLOSE, "<tool_call>", "</tool_call>")


def knows_think_blocks(tokenizer: Tokenizer, *, tools: bool = False) -> bool:
    """Whether the chat template contains think blocks; True without a template.

    Args:
        tools: whether tools are given: a template of their own, `tool_use`, is used then.
    """
    template = tokenizer.chat_templates.get("tool_use", tokenizer.chat_template) if tools else tokenizer.chat_template
    return template is None or _OPEN in template


def begins_in_thought(tokenizer: Tokenizer, prompt: Sequence[int], *, expect_thought: bool = False) -> bool | None:
    """How a reply begins: True in an open think block, False after a closed one, None if the model decides.

    A block is open if the prompt ends in `<think>`, or the assistant's last turn holds one that is not closed.

    Where the tokenizer has tokens for the tags, text that spells them is no tag.

    Args:
        expect_thought: True if a model that decides begins in thought, even without a tag; the result is True then.
    """
    end = prompt[-8:]
    last = next((int(token) for token in reversed(end) if tokenizer.token_bytes(token).strip()), None)
    for tag, begins in ((_OPEN, True), (_CLOSE, False)):
        token = tokenizer.token_to_id(tag)
        if tokenizer.decode(end).rstrip().endswith(tag) if token is None else last == token:
            return begins
    return True if expect_thought or _is_inside_thought(tokenizer, prompt) else None


def _is_inside_thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether `prompt` ends in an assistant's turn with a `<think>` token that is not closed."""
    opening, header = tokenizer.token_to_id(_OPEN), tokenizer.token_to_id(_HEADER)
    if opening is None or header is None:
        return False
    end = {opening, header, tokenizer.token_to_id(_CLOSE)}
    at = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in end), -1)
    if at < 0 or prompt[at] != opening:
        return False
    start = next((i for i in range(at, -1, -1) if prompt[i] == header), None)
    return start is not None and tokenizer.decode(prompt[start + 1 : at]).startswith("assistant")


def check_budget(budget: object) -> int | None:
    """The budget as an `int`, or None for no limit. Raises `OptionError`."""
    return cast("int | None", check_integer("thinking_budget", budget, 0, optional="None for no limit"))


def check_early_stop_text(text: object) -> str:
    """The sentence without line breaks around it. Raises `OptionError` if it is no text, or contains a tag."""
    if not isinstance(text, str):
        raise OptionError(f"early_stop_text: found {type(text).__name__}, expected a string")
    for tag in _TAGS:
        if tag in text:
            raise OptionError(
                f"early_stop_text: found {tag} in it, expected a sentence alone",
                hint=f"Leave it out: {_CLOSE} is added to the sentence, and only a model may call tools.",
            )
    return text.strip("\n")
