"""A short way from where a grammar stands to its end, for replies whose tokens are nearly used up."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["Closing", "closing_tokens", "finishes", "way_to_end"]

_LETTER = "x"
_IN_TEXT = ('"', "0", _LETTER)
_ELSEWHERE = (
    *("}]}", "}}", "]}", "}]", "}", "]", ", ", ",", '""', '"'),
    *("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "null", "true", "false"),
    *("n", "t", "f", "[]", "[", "{}", "{"),  # last what may lead into itself again
)


class Closing(NamedTuple):
    """The tokens that end JSON, in the order in which they are to be tried.

    Args:
        letter: which may come in free text alone; None if the tokenizer has no such token.
        in_text: there: a quotation mark, and what fills a text that must be longer.
        elsewhere: first what closes lists and objects, then the shortest values. None begins a text and goes on in it.
    """

    letter: int | None
    in_text: tuple[int, ...]
    elsewhere: tuple[int, ...]


_closing: weakref.WeakKeyDictionary[Tokenizer, dict[int, Closing]] = weakref.WeakKeyDictionary()


def closing_tokens(tokenizer: Tokenizer, vocab_size: int) -> Closing:
    """Those of a vocabulary; made at the first call, kept while the tokenizer lives."""
    made = _closing.setdefault(tokenizer, {})
    if vocab_size not in made:
        made[vocab_size] = _closing_tokens(tokenizer, vocab_size)
    return made[vocab_size]


def _closing_tokens(tokenizer: Tokenizer, vocab_size: int) -> Closing:
    def single(texts: Sequence[str]) -> tuple[int, ...]:
        encoded = [tokenizer.encode_plain(text) for text in texts]
        return tuple(ids[0] for ids in encoded if len(ids) == 1 and ids[0] < vocab_size)

    return Closing(next(iter(single([_LETTER])), None), single(_IN_TEXT), single(_ELSEWHERE))


def way_to_end(matcher: LLMatcher, most: int, closing: Closing, never: frozenset[int]) -> tuple[int, ...] | None:
    """Tokens from a matcher's state to the end of its grammar; None where no more than `most` of them lead there.

    They are looked for one after the other, none is taken back: for JSON they are few, if not always the fewest.

    Args:
        matcher: is not changed.
        most: tokens.
        closing: the tokens that are tried first.
        never: those that may not come.
    """
    here = matcher.deep_copy()
    way: list[int] = []
    while not here.is_accepting():
        forced = here.compute_ff_tokens() or _next(here, closing, never)
        if not forced or len(way) + len(forced) > most or not here.consume_tokens(forced):
            return None
        way += forced
    return tuple(way)


def finishes(matcher: LLMatcher, way: Sequence[int]) -> bool:
    """Whether these tokens lead to the end of the grammar. The matcher is not changed."""
    if not way:
        return bool(matcher.is_accepting())
    if matcher.validate_tokens(list(way)) < len(way):
        return False
    here = matcher.deep_copy()
    return bool(here.consume_tokens(list(way)) and here.is_accepting())


def _next(matcher: LLMatcher, closing: Closing, never: frozenset[int]) -> list[int]:
    """The first of `closing` that may come, else the first of all tokens; none if nothing may."""
    allowed = matcher.compute_bitmask()

    def may_come(token: int) -> bool:
        return bool(allowed[token >> 3] >> (token & 7) & 1)

    in_text = closing.letter is not None and may_come(closing.letter)
    for token in closing.in_text if in_text else closing.elsewhere:
        if may_come(token):
            return [token]
    for place, byte in enumerate(allowed):
        if byte:
            for token in range(8 * place, 8 * place + 8):
                if may_come(token) and token not in never:
                    return [token]
    return []
