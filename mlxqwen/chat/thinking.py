"""Where a reply's thinking begins and ends, and how a budget ends it; over token ids, no model and no arrays.

Qwen's way (https://arxiv.org/abs/2505.09388, section 4.3): once a thought has used up its tokens, a sentence that says
so and `</think>` are put into the model's mouth, and the answer follows from what was thought until then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from mlxqwen.chat.old_reply import ReplyParser
from mlxqwen.chat.reply import Delta
from mlxqwen.chat.reply_tags import reply_tags
from mlxqwen.errors import OptionError
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["EARLY_STOP_TEXT", "ThinkingBudget", "begins_in_thought", "can_think"]

EARLY_STOP_TEXT = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
)

_OPEN, _CLOSE, _TOOL_CALL = "<think>", "</think>", "<tool_call>"
_TAGS = (_OPEN, _CLOSE, _TOOL_CALL, "</tool_call>")
_LONGEST_CHARACTER = 4  # bytes of UTF-8


def can_think(tokenizer: Tokenizer) -> bool:
    """Whether the chat template knows think blocks; without a template nothing speaks against it."""
    return tokenizer.chat_template is None or _OPEN in tokenizer.chat_template


def begins_in_thought(tokenizer: Tokenizer, prompt: Sequence[int], *, expect_thought: bool = False) -> bool | None:
    """How a reply begins: True behind an open `<think>`, False behind a closed block, None where the model is free.

    Where the tokenizer has tokens for the tags, text that spells them is no tag.

    Args:
        expect_thought: whether a model that is free begins in thought, be it without a tag of its own: True then.
    """
    end = prompt[-8:]
    last = next((int(token) for token in reversed(end) if tokenizer.token_bytes(token).strip()), None)
    for tag, begins in ((_OPEN, True), (_CLOSE, False)):
        token = tokenizer.token_to_id(tag)
        if tokenizer.decode(end).rstrip().endswith(tag) if token is None else last == token:
            return begins
    return True if expect_thought else None


class ThinkingBudget:
    """Counts the tokens of one reply's thought, and says what ends it when they are used up.

    The thought is what `mlxqwen.chat.reply.ReplyParser` takes for reasoning, its tags not counted. It begins with the
    reply if the prompt ends in an open block, or a thought is expected; if the prompt leaves the model free, with the
    model's own `<think>`, line breaks at most before it; behind a closed block there is none. A call of a tool ends it
    too, if there are `tools`; while a `<tool_call>` may become one, no budget does.

    After `budget` tokens the thought ends: at once, or up to three tokens later if they would cut a character in two.
    A budget that is not reached changes nothing, be it larger than the context.
    A thought that the model ends in time, with a `</think>` right behind the last token included, is left alone.

    Args:
        tokenizer: gives the ids and text of tokens.
        prompt: ids; its end tells how the reply begins.
        budget: tokens of thought; 0 gives the tokens of an empty think block; None only counts.
        early_stop_text: the sentence that ends the thought, a paragraph of its own; by default Qwen's. Encoded as plain
            text: no token can be forged by it. Empty for no sentence.
        tools: whether the reply may call tools.
        expect_thought: see `begins_in_thought`.

    Raises:
        OptionError: a budget that is no integer from 0, or for a tokenizer without `</think>`; a sentence that is no
            text, or holds a tag of its own.

    Attributes:
        exhausted: whether the budget ended the thought.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        budget: int | None = None,
        early_stop_text: str | None = None,
        tools: bool = False,
        expect_thought: bool = False,
    ) -> None:
        self.exhausted = False
        self._tokenizer = tokenizer
        self._budget = check_budget(budget)
        self._sentence = check_early_stop_text(EARLY_STOP_TEXT if early_stop_text is None else early_stop_text)
        close = tokenizer.token_to_id(_CLOSE)
        if budget is not None and close is None:
            raise OptionError(
                f"thinking_budget: found {budget}, but the tokenizer has no {_CLOSE} to end a thought with",
                hint="This model does not think between tags; leave the budget out.",
            )
        tokenizer.encode_plain(self._sentence)  # complains now rather than in the middle of a reply
        self._block_end = [] if close is None else [close, *tokenizer.encode_plain("\n\n")]
        ends = (close, tokenizer.token_to_id(_TOOL_CALL) if tools else None)
        self.closing = frozenset(token for token in ends if token is not None)
        self._tags = reply_tags(tokenizer)
        begins = begins_in_thought(tokenizer, prompt, expect_thought=expect_thought)
        self._parser = ReplyParser(thinking=begins, tools=tools, tags=self._tags)
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
        # What stands behind `<think>` in the prompt: no more than line breaks.
        self._end = tokenizer.decode(prompt[-8:]).rpartition(_OPEN)[2] if begins else ""
        self._starts: list[int] = []  # where in the parser's text each token begins
        self._is_blank = True

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thought so far, the early-stop sentence among them; 0 while they are but line breaks."""
        return 0 if self._is_blank else self._count

    def start(self) -> list[int]:
        """What to force before the reply's first token; mostly nothing."""
        return self._ending_if_due()

    def feed(self, token: int, *, forced: bool = False) -> list[int]:
        """Take the reply's next token → what to force behind it; mostly nothing.

        To be forced unless the model itself draws one of `closing` or ends its reply.

        Args:
            token: its id.
            forced: whether it was forced.
        """
        if not self._parser.may_reason:
            return []
        self.exhausted |= forced and self._parser.in_reasoning
        text = self._tags.mark(token, self._detokenizer.add(token))
        # A tag may have to complete a character that was cut off before it.
        self._starts.append(self._parser.length + (len(text) - 1 if token in self._tags.marks else 0))
        self._look_at(self._parser.feed(text))
        self._end = (self._end + text)[-2:]
        return self._ending_if_due()

    def finish(self) -> None:
        """No more tokens will come: what is not yet a call becomes none."""
        self._look_at(self._parser.finish())

    def _look_at(self, deltas: Iterable[Delta]) -> None:
        self._is_blank &= not any(delta.reasoning for delta in deltas)

    @property
    def _count(self) -> int:
        start, end = self._parser.reasoning_start, self._parser.reasoning_end
        if start is None:
            return 0
        return bisect_left(self._starts, self._parser.length + 1 if end is None else end) - bisect_left(
            self._starts, start
        )

    def _ending_if_due(self) -> list[int]:
        count = self._count
        if not self._parser.in_reasoning or self.exhausted or self._budget is None or count < self._budget:
            return []
        if self._detokenizer.is_inside_character and count < self._budget + _LONGEST_CHARACTER - 1:
            return []
        return self._ending()

    def _ending(self) -> list[int]:
        """The tokens that end the thought; line breaks that stand there already are not repeated."""
        breaks = "\n" * (2 - len(self._end) + len(self._end.rstrip("\n")))
        if self._sentence and self._budget:
            text = f"{breaks}{self._sentence}\n"
        else:
            text = breaks if self._count == 0 else breaks[1:]
        return [*self._tokenizer.encode_plain(text), *self._block_end]


def check_budget(budget: object) -> int | None:
    """A budget as it is. Raises `OptionError` for what is none."""
    if budget is None or (isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0):
        return budget
    raise OptionError(f"thinking_budget: found {budget!r}, expected an integer from 0, or None for no limit")


def check_budget_use(thinking: object, budget: object, early_stop_text: object) -> None:
    """Refuse a budget where thinking is switched off, and a sentence without a budget. Raises `OptionError`."""
    if thinking is False and budget:
        raise OptionError(
            f"thinking_budget: found {budget!r} with thinking=False, expected none, or 0",
            hint="Leave out thinking=False to let the model think, or the budget.",
        )
    if early_stop_text is not None and budget is None:
        raise OptionError(
            "early_stop_text: found one without a thinking_budget, expected both",
            hint="The sentence ends a thought over its budget: give one, such as thinking_budget=1000.",
        )


def check_early_stop_text(text: object) -> str:
    """A sentence without the line breaks around it. Raises `OptionError` for what is no text, or holds a tag."""
    if not isinstance(text, str):
        raise OptionError(f"early_stop_text: found {type(text).__name__}, expected a string")
    for tag in _TAGS:
        if tag in text:
            raise OptionError(
                f"early_stop_text: found {tag} in it, expected a sentence alone",
                hint=f"Leave it out: {_CLOSE} is added to the sentence, and only a model may call tools.",
            )
    return text.strip("\n")
