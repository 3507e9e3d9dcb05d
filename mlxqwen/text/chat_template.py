"""A conversation → the text that a chat template makes of it, as Hugging Face transformers does."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mlxqwen.errors import MessagesError
from mlxqwen.text.sandbox import render

__all__ = ["render_chat"]


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    replacements: Mapping[str, str] | None = None,
) -> str:
    """Render a conversation.

    Args:
        source: the template.
        messages: as `mlxqwen.text.messages.prepare_messages` returns them.
        tools: as `mlxqwen.text.messages.prepare_tools` returns them.
        add_generation_prompt: passed to the template.
        continue_final_message: cut the text after the last message's content.
        variables: further variables of the template.
        replacements: texts in the template's own literals → what stands in their place.

    Raises:
        TemplateError: the template is broken, forbidden or too expensive.
        MessagesError: the template drops or changes the last message's content, so it cannot be continued.
    """
    marker = f"continues-{secrets.token_hex(8)} " if continue_final_message else ""
    last = dict(messages[-1])
    final_content = last["content"]
    last["content"] = final_content + marker
    text = render(
        source,
        {
            "messages": [*messages[:-1], last],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **(variables or {}),
        },
        replacements=replacements,
    )
    return _cut_at(text, marker, final_content) if continue_final_message else text


def _cut_at(text: str, marker: str, final_content: str) -> str:
    """`text` up to `marker`; without white space before it if the template stripped the blank after it."""
    cut = text.rfind(marker.strip())
    if cut < 0 or final_content.strip() not in text:
        raise MessagesError(
            "continue_final_message: the last message's content does not appear in the rendered conversation",
            hint="The chat template drops or changes it: such a message cannot be continued.",
        )
    kept = text[:cut]
    return kept if text.startswith(marker, cut) else kept.rstrip()
