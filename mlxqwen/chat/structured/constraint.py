"""The constraint that keeps a reply to a grammar: its thought is free, what follows it is not.

The phases of a reply are told by token ids alone, as those are all that a check of guesses has.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto
from typing import TYPE_CHECKING

from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.chat.structured.compiler import CompiledGrammar, problem_of
from mlxqwen.chat.structured.ending import closing_tokens, finishes, way_to_end
from mlxqwen.chat.tags import Tag
from mlxqwen.errors import GenerationError, OptionError
from mlxqwen.sampling.constraint import Mask, mask_of_bytes
from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["GrammarConstraint", "ReplyTokens"]

_LINE_BREAKS = 2
"""That Qwen3 writes behind `</think>`."""
_LAST = 64  # tokens: while more are left, no way to the end is looked for
_LONGEST_WAY = 48  # tokens; a search, which all replies wait for, takes some 2 ms at most
_GROWTH = 8  # tokens that a way may grow by with one: so seldom it is looked at while many more are left


class ReplyTokens:
    """The tokens that tell the phases of a reply, for one vocabulary.

    Args:
        tokenizer: spells the tokens.
        vocab_size: of the model.
        ends: the tokens that end a reply.

    Attributes:
        vocab_size, ends: as given.
        think, end_think, call, end_call: the tokens of the tags; None for one that text spells.
        added: the tokens of the tokenizer's own, which no text becomes.
        breaks: how many line breaks a token is, for those that are nothing else, up to what follows a thought.
        closing: those that end JSON soonest.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> None:
        self.vocab_size = vocab_size
        self.ends = frozenset(token for token in ends if token < vocab_size)
        self.think, self.end_think, self.call, self.end_call = (tokenizer.token_to_id(tag.value) for tag in Tag)
        self.added = frozenset(token for token in tokenizer.added_token_ids if token < vocab_size)
        pieces = ("\n" * count for count in range(1, _LINE_BREAKS + 1))
        encoded = ((tokenizer.encode_plain(piece), len(piece)) for piece in pieces)
        self.breaks = {ids[0]: count for ids, count in encoded if len(ids) == 1}
        self.closing = closing_tokens(tokenizer, vocab_size)

    def all_but(self, tokens: Collection[int]) -> bytearray:
        """Packed bits of the whole vocabulary without `tokens`."""
        packed = bytearray(b"\xff" * (-(-self.vocab_size // 32) * 4))
        _clear(packed, tokens)
        return packed


class _Phase(Enum):
    OPEN = auto()  # a thought may begin
    THOUGHT = auto()
    BREAKS = auto()  # behind a thought, before anything but line breaks
    TEXT = auto()  # free
    GRAMMAR = auto()
    ENDED = auto()


class _NotAllowedError(GenerationError, ValueError):
    """A token that the grammar does not have here; a guess of it is not checked."""


class GrammarConstraint:
    """A `Constraint` that keeps a reply to a grammar, behind its thought.

    Within the thought no end token and, if there are tools, no `<tool_call>` is drawn, so that the answer is not left
    out. Behind it stand up to two line breaks, as Qwen3 writes them. At the end of the grammar nothing but an end token
    is drawn. Where the last tokens that are left suffice just for a short way to the end of JSON, it is gone: texts,
    lists and objects are closed, and what must still stand there is empty, 0, or as short as it may be.

    Args:
        tokens: those of the vocabulary.
        grammar: what the reply is kept to; None for free text.
        pipeline: the reply's; says how it begins, and whether its calls could be read.
        is_free: whether the text is free, and `grammar` that of one call, with its tags. Then a thought may end the
            reply.
        calls: the most calls in free text; None without a limit.
        knows_tags: whether the grammar may have the tags of calls.
        is_json: whether the grammar is of JSON, or calls; to the end of another no way is looked for, which might cost
            more than the reply does.

    Attributes:
        was_cut_short: whether the end was forced.

    Raises:
        OptionError: the reply begins in a thought that no token ends.
    """

    def __init__(
        self,
        tokens: ReplyTokens,
        grammar: CompiledGrammar | None,
        pipeline: ReplyPipeline | None,
        *,
        is_free: bool = False,
        calls: int | None = None,
        knows_tags: bool = False,
        is_json: bool = True,
    ) -> None:
        self._tokens = tokens
        self._grammar = grammar
        self._pipeline = pipeline
        self._is_free = is_free
        self._calls = calls
        self._is_json = is_json
        self._matcher: LLMatcher | None = None
        self._mask: Mask | None = None
        self._has_mask = False
        self._breaks = 0  # line breaks behind the thought
        self.was_cut_short = False
        self._left: int | None = None  # tokens of the reply, the next one included
        self._way: tuple[int, ...] | None = ()  # to the end, of where it was looked for last
        self._next_look = 0  # at how many tokens left that is looked for again
        self._in_vain = 0  # searches, one after the other
        self._phase = _Phase.TEXT if is_free else _Phase.GRAMMAR
        if pipeline is not None and pipeline.in_reasoning:
            if tokens.end_think is None:
                raise OptionError(
                    "structured output: the reply begins in thought, but the tokenizer has no </think> to end it with",
                    hint="Ask for it with thinking=False.",
                )
            self._phase = _Phase.THOUGHT
        elif pipeline is not None and pipeline.may_reason and tokens.think is not None:
            self._phase = _Phase.OPEN
        has_calls = is_free or knows_tags
        self._not_thought = {
            *(() if is_free else tokens.ends),
            *((tokens.call,) if has_calls and tokens.call is not None else ()),
        }
        tags = {tokens.call, tokens.end_call} if has_calls else set()
        self._never = tokens.added - tags - tokens.ends
        has_tags = tokens.call is not None and tokens.end_call is not None
        if pipeline is not None and grammar is not None and has_calls and has_tags:
            pipeline.tell_arguments_early()

    def mask(self) -> Mask | None:
        """The tokens that may come next; None for all."""
        if not self._has_mask:
            packed = self._packed()
            self._mask = None if packed is None else mask_of_bytes(packed, self._tokens.vocab_size)
            self._has_mask = True
        return self._mask

    def end_within(self, tokens: int) -> None:
        """Bring JSON to its end within so many tokens of the reply, if a short way leads there."""
        if self._is_json:
            self._left, self._next_look = tokens, min(tokens, _LAST)

    def settle(self, drawn: int) -> int:
        """`drawn`, unless the tokens that are left behind it do not suffice for the end of the grammar."""
        left, phase, tokens = self._left, self._phase, self._tokens
        if left is None or left > self._next_look or drawn < 0 or drawn in tokens.ends or self._grammar is None:
            return drawn
        is_begun = phase is _Phase.GRAMMAR
        begins = phase in (_Phase.OPEN, _Phase.BREAKS) and not self._is_free and drawn != tokens.think
        if not (is_begun or begins):
            return drawn
        matcher = self._grammar.begin() if self._matcher is None else self._matcher
        way = self._way_from(matcher, left)
        self._way = way
        if way is None:
            self._next_look = left - (1 << self._in_vain)  # each search in vain is the less often made
            self._in_vain += 1
            return drawn
        self._in_vain = 0
        if len(way) > left:
            return drawn  # as far as it comes
        if (seldom := (left - len(way)) // _GROWTH) > 1:
            self._next_look = left - seldom
            return drawn
        if way[:1] == (drawn,):
            return drawn
        if phase is _Phase.BREAKS and drawn in tokens.breaks:
            after: tuple[int, ...] | None = way
        else:
            there = matcher.deep_copy()
            if drawn in self._never or not there.consume_token(drawn):
                return drawn
            after = self._way_from(there, left - 1)
        if after is not None and len(after) < left:
            return drawn
        self.was_cut_short = True
        return way[0] if way else min(tokens.ends)

    def _way_from(self, matcher: LLMatcher, most: int) -> tuple[int, ...] | None:
        """A short way to the end of the grammar; the rest of the last one, or that itself, if it still is one."""
        known = self._way or ()
        for way in (known[1:], known):
            if way and finishes(matcher, way):
                return way
        return way_to_end(matcher, min(most, _LONGEST_WAY), self._tokens.closing, self._never)

    def advance(self, token: int) -> None:
        """Continue with `token`.

        Raises:
            GenerationError: the grammar does not have it here, or a call came to nothing.
        """
        self._has_mask = False
        if self._left is not None:
            self._left -= 1
        tokens, phase = self._tokens, self._phase
        if phase is _Phase.THOUGHT:
            if token == tokens.end_think:
                self._phase = _Phase.BREAKS
            elif token in self._not_thought:
                raise self._not_allowed(token)
        elif token in tokens.ends:
            if phase is not _Phase.ENDED and not self._may_end:
                raise self._not_allowed(token)
            self._phase = _Phase.ENDED
        elif phase is _Phase.ENDED:
            raise self._not_allowed(token)
        elif phase is _Phase.OPEN and token == tokens.think:
            self._phase = _Phase.THOUGHT
        elif phase is _Phase.BREAKS and (count := tokens.breaks.get(token, 3)) + self._breaks <= _LINE_BREAKS:
            self._breaks += count
        elif not (phase is _Phase.OPEN and self._is_free and token in tokens.breaks):
            self._take(token)
        if self._pipeline is not None and self._pipeline.warnings and self._grammar is not None:
            raise GenerationError(
                f"constraint: {self._pipeline.warnings[0]}, expected a call that can be read",
                hint="Ask again, or give the tool's parameters a schema that leaves less open.",
            )

    def fork(self) -> GrammarConstraint:
        """A copy that goes on by itself."""
        other = object.__new__(GrammarConstraint)
        other.__dict__.update(self.__dict__)
        other._pipeline = None
        if self._matcher is not None:
            other._matcher = self._matcher.deep_copy()
        return other

    @property
    def _may_end(self) -> bool:
        """Whether the reply may end here."""
        if self._is_free:
            return self._phase is not _Phase.GRAMMAR
        matcher = self._matcher
        if matcher is None:
            return self._grammar is not None and self._grammar.may_be_empty
        return matcher.is_accepting()

    def _packed(self) -> bytes | bytearray | None:
        tokens, phase = self._tokens, self._phase
        if phase is _Phase.THOUGHT:
            return tokens.all_but(self._not_thought) if self._not_thought else None
        if phase is _Phase.ENDED:
            packed = bytearray(-(-tokens.vocab_size // 32) * 4)
            _set(packed, tokens.ends)
            return packed
        if self._is_free and phase is not _Phase.GRAMMAR:
            return tokens.all_but([tokens.call]) if self._calls == 0 and tokens.call is not None else None
        packed = bytearray(self._allowed_by_grammar())
        _clear(packed, self._never)
        (_set if self._may_end else _clear)(packed, tokens.ends)
        if phase is _Phase.OPEN and tokens.think is not None:
            _set(packed, [tokens.think])
        if phase is _Phase.BREAKS:
            _set(packed, [token for token, count in tokens.breaks.items() if count + self._breaks <= _LINE_BREAKS])
        return packed

    def _allowed_by_grammar(self) -> bytes:
        if self._matcher is None:
            return b"" if self._grammar is None else self._grammar.first
        allowed = self._matcher.compute_bitmask()
        if problem := problem_of(self._matcher):
            raise GenerationError(
                f"constraint: the grammar cannot be followed further: {problem}",
                hint="The schema, expression or grammar is too costly here: make it simpler.",
            )
        return allowed

    def _take(self, token: int) -> None:
        """Take a token behind the thought."""
        if self._is_free and self._phase is not _Phase.GRAMMAR:
            self._phase = _Phase.TEXT
            if token != self._tokens.call:
                return
            if self._calls is not None:
                if self._calls == 0:
                    raise self._not_allowed(token)
                self._calls -= 1
            if self._grammar is None:
                return
        self._phase = _Phase.GRAMMAR
        if self._matcher is None and self._grammar is not None:
            self._matcher = self._grammar.begin()
        matcher = self._matcher
        if matcher is None or token in self._never or not matcher.consume_token(token):
            raise self._not_allowed(token)
        if self._is_free and matcher.is_accepting():
            self._matcher, self._phase = None, _Phase.TEXT

    def _not_allowed(self, token: int) -> _NotAllowedError:
        return _NotAllowedError(f"constraint: found token {token}, expected one that the grammar has here")


def _set(packed: bytearray, tokens: Collection[int]) -> None:
    for token in tokens:
        packed[token >> 3] |= 1 << (token & 7)


def _clear(packed: bytearray, tokens: Collection[int]) -> None:
    for token in tokens:
        packed[token >> 3] &= ~(1 << (token & 7)) & 0xFF
