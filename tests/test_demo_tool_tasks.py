"""The demo model's conversations with tools: as the template writes them, and with answers that the tools gave."""

from __future__ import annotations

import random
from collections import Counter

from demo import data, tool_tasks
from demo.source import Source

from mlxqwen.chat.tools import tool_schema
from mlxqwen.text.tokenizer import Tokenizer


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: The expression.
    """
    return expression


def clock() -> str:
    """Tell the time of day."""
    return "14:32"


def _conversations(count: int) -> list[data.Conversation]:
    source = Source(random.Random(0))
    return [tool_tasks.tool_conversation(source) for _ in range(count)]


def test_training_text_is_what_the_template_writes_and_fits_the_context(tokenizer: Tokenizer) -> None:
    for conversation in _conversations(300):
        ids = tokenizer.apply_chat_template(list(conversation.messages), tools=list(conversation.tools))
        assert tokenizer.decode(ids) == data.render(conversation)
        assert len(ids) <= 512


def test_the_tools_are_what_functions_become() -> None:
    assert tool_schema("clock", clock) == tool_tasks.clock_tool()
    description = "Evaluate an arithmetic expression."
    assert tool_schema("calculator", calculator) == tool_tasks.strict_calculator_tool(description)


def test_only_tools_at_hand_are_called_and_their_results_told() -> None:
    seen: Counter[str] = Counter()
    for conversation in _conversations(1000):
        names = {tool["function"]["name"] for tool in conversation.tools}
        messages = conversation.messages
        for message, following in zip(messages, (*messages[1:], None), strict=True):
            for called in message.get("tool_calls", ()):
                seen[called["function"]["name"]] += 1
                assert called["function"]["name"] in names
            if message["role"] == "tool" and following is not None:
                failed = message["content"].startswith("Error")
                seen["failed" if failed else "told"] += 1
                assert failed or message["content"] in following["content"]
                assert not failed or "does not work" in following["content"]
    assert min(seen[kind] for kind in ("calculator", "clock", "failed", "told")) > 20
