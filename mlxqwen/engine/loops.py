"""Replies that repeat themselves: a detector of long cycles, over token ids alone.

**The rule.** A reply loops as soon as its last `n` tokens are a cycle of `p` tokens, `1 <= p <= max_period`, repeated:
each of them except the first `p` equals the one `p` before it, with `n >= min_tokens` and `n >= repeats * p`. The
defaults ask for 512 tokens and four rounds of at most 1,024.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxqwen.checks import check_integer

__all__ = ["LoopDetector"]


class LoopDetector:
    """Sees a reply token by token and says at which token it has become a loop, by the rule above.

    Of every period that is about to fulfil the rule, the reply has seen two whole rounds long before. So the periods of
    the reply's end are computed only every few hundred tokens, by the prefix function of Knuth, Morris and Pratt over
    the reversed end (https://en.wikipedia.org/wiki/Knuth-Morris-Pratt_algorithm), and the few that qualify are
    followed from there, token by token. The cost is constant per token on average, and memory is bounded.

    Args:
        min_tokens: the shortest end that counts as a loop.
        repeats: the fewest rounds, at least 3.
        max_period: the longest cycle.

    Raises:
        OptionError: a value out of range.
    """

    def __init__(self, *, min_tokens: int = 512, repeats: int = 4, max_period: int = 1024) -> None:
        self._min_tokens: int = check_integer("min_tokens", min_tokens, 1)
        self._repeats: int = check_integer("repeats", repeats, 3)
        self._max_period: int = check_integer("max_period", max_period, 1)
        # So often that whatever fulfils the rule before the next look covers two rounds now:
        # max(min_tokens, repeats * p) - interval >= 2 * p for every p.
        self._interval = max(1, self._min_tokens * (self._repeats - 2) // self._repeats)
        self._memory = max(self._min_tokens, self._repeats * self._max_period)
        self._tokens: list[int] = []
        self._until_look = self._interval
        self._lengths: dict[int, int] = {}  # period → length of the end that has it
        self.period: int | None = None

    def feed(self, token: int) -> bool:
        """Take the next token → whether the reply loops; `period` is then the length of its cycle."""
        self._tokens.append(token)
        for period, length in list(self._lengths.items()):
            if token != self._tokens[-1 - period]:
                del self._lengths[period]
                continue
            self._lengths[period] = length + 1
            if length + 1 >= self._needed(period):
                self.period = period
        self._until_look -= 1
        if self._until_look == 0:
            self._until_look = self._interval
            self._look()
        return self.period is not None

    def _needed(self, period: int) -> int:
        return max(self._min_tokens, self._repeats * period)

    def _look(self) -> None:
        """Forget what no cycle reaches back to, and find the periods that may fulfil the rule before the next look."""
        del self._tokens[: -self._memory]
        self._lengths = {}
        for length, period in enumerate(_smallest_periods(self._tokens[::-1]), start=1):
            if period <= self._max_period and length >= self._needed(period) - self._interval:
                self._lengths[period] = length


def _smallest_periods(tokens: Sequence[int]) -> list[int]:
    """The smallest period of each beginning of `tokens`, by its length from 1: the prefix function, taken off it."""
    borders = [0] * len(tokens)
    border = 0
    for end in range(1, len(tokens)):
        while border and tokens[end] != tokens[border]:
            border = borders[border - 1]
        if tokens[end] == tokens[border]:
            border += 1
        borders[end] = border
    return [length - border for length, border in enumerate(borders, start=1)]
