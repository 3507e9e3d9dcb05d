"""The options of a reply that go unchanged from a public function to its request.

A new option of one reply is a field here, and a keyword of `Engine.stream` and `stream_generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.sampling.constraint import Constraint

__all__ = ["DEFAULT_MAX_ROUNDS", "ConstraintFactory", "ReplyOptions"]

DEFAULT_MAX_ROUNDS = 8
"""Replies of a run with tools."""

ConstraintFactory: TypeAlias = Callable[[ReplyPipeline | None], Constraint]
"""Makes the constraint of one reply, given the pipeline that its tokens go through."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplyOptions:
    """Options that a request has by the names that callers use. `Request` checks them.

    Args:
        stop: strings; the reply ends before the first of them in its content.
        skip_special_tokens: whether special tokens leave no text. End tokens never do.
        stop_on_loop: whether a reply that repeats itself without end is ended; see `mlxqwen.engine.loops`.
        thinking_budget: the most tokens of thought, None without a limit.
        early_stop_text: the sentence that ends a thought over its budget; None for Qwen's.
        constraints: what else restricts the draws, applied in order, behind the budget.
        response_format: what the answer has to be, behind the thought; see `mlxqwen.chat.structured.response_format`.
            `text_request` makes a constraint of it.
        logprobs: None, or how many of the likeliest tokens are told with each token's log-probability, up to 20; see
            `mlxqwen.engine.logprobs`. Nothing is guessed for such a reply.
        prefill_chunk: prompt tokens a step; None for what fits the model and the machine.
        priority: -100 to 100, lower first; 0 by default.
        salt: only requests of the same salt share what was read.
    """

    stop: str | Sequence[str] = ()
    skip_special_tokens: bool = True
    stop_on_loop: bool = False
    thinking_budget: int | None = None
    early_stop_text: str | None = None
    constraints: Sequence[ConstraintFactory] = ()
    response_format: object = None
    logprobs: int | None = None
    prefill_chunk: int | None = None
    priority: int = 0
    salt: str = ""

    def passed_on(self) -> dict[str, Any]:
        """The options by name, without those that a subclass adds."""
        return {one.name: getattr(self, one.name) for one in fields(ReplyOptions)}
