"""A short way from where a grammar stands to its end, for replies whose tokens are nearly used up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["closing_tokens", "finishes", "way_to_end"]

# What ends JSON soonest, the first that may come: several ends in one token, then one, then the shortest values. A
# quotation mark before all that may stand in a text, too.
_CLOSING = (
    *('"}]}', '"}}', '"]}', '"}]', '"}', '"]', '"', "}]}", "}}", "]}", "}]", "}", "]", ", ", ","),
    *("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "null", "true", "false"),
    *("n", "t", "f", "[]", "[", "{}", "{"),  # last what may lead into itself again
)


def closing_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end JSON, in the order in which they are to be tried."""
    encoded = [tokenizer.encode_plain(text) for text in _CLOSING]
    return tuple(ids[0] for ids in encoded if len(ids) == 1)


def way_to_end(matcher: LLMatcher, most: int, closing: Sequence[int], never: frozenset[int]) -> tuple[int, ...] | None:
    """Tokens from a matcher's state to the end of its grammar; None where no more than `most` of them lead there.

    They are looked for one after the other, none is taken back: for JSON they are few, if not always the fewest.

    Args:
        matcher: is not changed.
        most: tokens.
        closing: those that are tried first.
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


def _next(matcher: LLMatcher, closing: Sequence[int], never: frozenset[int]) -> list[int]:
    """The first of `closing` that may come, else the first of all tokens; none if nothing may."""
    allowed = int.from_bytes(matcher.compute_bitmask(), "little")
    for token in closing:
        if allowed >> token & 1:
            return [token]
    for token in never:
        allowed &= ~(1 << token)
    return [(allowed & -allowed).bit_length() - 1] if allowed else []
