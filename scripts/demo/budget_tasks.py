"""Thoughts cut short as a thinking budget cuts them, for the demo model to learn to answer from half a thought.

The cut is made by `mlxqwen.chat.budget` itself, so that the model sees in training the tokens that are forced on it
later.
"""

from __future__ import annotations

from collections.abc import Sequence

from demo.data import Conversation
from mlxqwen.chat.budget import ThinkingBudget
from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.chat.thinking import EARLY_STOP_TEXT
from mlxqwen.text.tokenizer import Tokenizer


def ends_in_thought(conversation: Conversation) -> bool:
    """Whether the last reply of `conversation` thinks, so that there is something to cut."""
    return conversation.enable_thinking and bool(conversation.messages[-1]["reasoning_content"])


def thought_length(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Tokens of the last thought in `ids`, its tags not counted."""
    start, end = _last_thought(ids, tokenizer)
    return end - start


def cut_thought(
    ids: Sequence[int], weights: Sequence[float], tokenizer: Tokenizer, budget: int
) -> tuple[list[int], list[float]]:
    """Cut the last thought in `ids` after `budget` tokens of it, with the weights in the loss beside them.

    What is forced weighs nothing: the model is to go on from it, not to say it. A thought within the budget stays.
    """
    start, end = _last_thought(ids, tokenizer)
    pipeline = ReplyPipeline(tokenizer, begins=None)
    rule = ThinkingBudget(tokenizer, pipeline, budget, EARLY_STOP_TEXT, [])
    said = start - 1
    while not rule.is_forcing and said < end:
        pipeline.feed(ids[said])
        rule.advance(ids[said])
        said += 1
    if not rule.is_forcing or said == end:
        return list(ids), list(weights)
    forced = _forced(rule, pipeline, ids[said])
    rest = end + 1 + len(tokenizer.encode_plain("\n\n"))
    return (
        [*ids[:said], *forced, *ids[rest:]],
        [*weights[:said], *[0.0] * len(forced), *weights[rest:]],
    )


def _forced(rule: ThinkingBudget, pipeline: ReplyPipeline, drawn: int) -> list[int]:
    """The tokens that `rule` forces, whose first takes the place of `drawn`."""
    forced: list[int] = []
    while rule.is_forcing:
        forced.append(rule.settle(drawn))
        pipeline.feed(forced[-1])
        rule.advance(forced[-1])
    return forced


def _last_thought(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """Where the last thought begins, behind `<think>`, and where its `</think>` stands."""
    tags = [tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")]
    start, end = (max(place for place, token in enumerate(ids) if token == tag) for tag in tags)
    return start + 1, end
