"""The thinking budget: a constraint that ends a thought once it has used up its tokens.

Qwen's way (https://arxiv.org/abs/2505.09388, section 4.3): a sentence that says so and `</think>` are forced, and the
model answers from what it has thought until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.chat.tags import Tag
from mlxqwen.chat.thinking import check_budget, check_early_stop_text
from mlxqwen.errors import OptionError
from mlxqwen.sampling.constraint import Constraint, Unconstrained
from mlxqwen.sampling.sampler import BAD_TOKEN
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["ThinkingBudget"]

_LONGEST_CHARACTER = 4  # bytes of UTF-8


class ThinkingBudget:
    """A `Constraint` that ends the thought of a reply after `budget` tokens, its tags not counted.

    It ends at once, or up to three tokens later if they would cut a character in two; while a `<tool_call>` may become
    a call, it does not. A budget that is not reached changes nothing. A thought that the model ends in time, with an
    end token or a tag that ends it right behind the last token included, is left alone.

    Each `advance` follows the `feed` of the same token to the pipeline.

    Args:
        tokenizer: encodes the sentence, as plain text: no token can be forged by it.
        pipeline: the reply's; says what is thought.
        budget: tokens of thought; 0 gives the tokens of an empty think block.
        sentence: ends the thought, a paragraph of its own; empty for none. See `EARLY_STOP_TEXT`.
        ends: the tokens that end a reply.
        prompt: its end tells how many line breaks stand before the reply.

    Raises:
        OptionError: a budget that is no integer from 0, or for a tokenizer without `</think>`; a sentence that is no
            text, or holds a tag.

    Attributes:
        exhausted: whether the budget has ended the thought.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pipeline: ReplyPipeline,
        budget: int,
        sentence: str,
        ends: Collection[int],
        *,
        prompt: Sequence[int] = (),
    ) -> None:
        close = tokenizer.token_to_id(Tag.END_THINK.value)
        checked = check_budget(budget)
        if checked is None or close is None:
            raise OptionError(
                f"thinking_budget: found {budget}, but the tokenizer has no </think> to end a thought with",
                hint="This model does not think between tags; leave the budget out.",
            )
        call = tokenizer.token_to_id(Tag.CALL.value) if pipeline.tools else None
        self.exhausted = False
        self._tokenizer = tokenizer
        self._pipeline = pipeline
        self._budget = checked
        self._sentence = check_early_stop_text(sentence)
        tokenizer.encode_plain(self._sentence)  # raises now rather than in the middle of a reply
        self._block_end = [close, *tokenizer.encode_plain("\n\n")]
        self._ends = frozenset(ends)
        self._kept = {BAD_TOKEN, close, *ends, *(() if call is None else (call,))}
        # The text after `<think>` in the prompt.
        self._before = tokenizer.decode(prompt[-8:]).rpartition(Tag.THINK.value)[2] if pipeline.in_reasoning else ""
        self._pending: deque[int] = deque()
        self._has_begun = False  # whether one of those pending has been forced
        self._keeps_draw = False
        self._ends_thought = False
        self._plan()

    @property
    def is_forcing(self) -> bool:
        """Whether the next token is forced, unless the model itself ends its thought with it."""
        return bool(self._pending)

    def mask(self) -> None:
        """None: every token may be drawn."""

    def settle(self, drawn: int) -> int:
        """The token to force, if one is due; `drawn` if none is, or if `drawn` ends the thought."""
        self._keeps_draw = drawn == BAD_TOKEN or (not self._has_begun and drawn in self._kept)
        self._ends_thought = self._pipeline.in_reasoning
        return drawn if self._keeps_draw or not self._pending else self._pending[0]

    def advance(self, token: int) -> None:
        """Continue with `token`, which `settle` returned and the pipeline was fed."""
        if token in self._ends:
            self._pending.clear()
            return
        if self._pending:
            if self._keeps_draw:
                self._pending.clear()
            else:
                self.exhausted |= self._ends_thought
                self._pending.popleft()
            self._has_begun = bool(self._pending)
        self._plan()

    def fork(self) -> Constraint:
        """An `Unconstrained`: no guesses are made while tokens are forced."""
        return Unconstrained()

    def _plan(self) -> None:
        """Plan the tokens that end the thought, if that is due."""
        pipeline, budget = self._pipeline, self._budget
        if self.exhausted or self._pending or not pipeline.in_reasoning or (count := pipeline.thought_tokens) < budget:
            return
        if not pipeline.is_inside_character or count >= budget + _LONGEST_CHARACTER - 1:
            self._pending.extend(self._ending(count))

    def _ending(self, count: int) -> list[int]:
        """The tokens that end a thought of `count` tokens; line breaks that are there already are not repeated."""
        end = (self._before + self._pipeline.tail)[-2:]
        breaks = "\n" * (2 - len(end) + len(end.rstrip("\n")))
        if self._sentence and self._budget:
            text = f"{breaks}{self._sentence}\n"
        else:
            text = breaks if count == 0 else breaks[1:]
        return [*self._tokenizer.encode_plain(text), *self._block_end]
