"""A cache that knows which tokens it holds, so that a prompt is read only from where it differs from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxqwen.cache.kv_cache import KVCache
from mlxqwen.cache.snapshot import Snapshot

__all__ = ["PrefixCache", "common_prefix"]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest beginning that both have."""
    shorter = min(len(first), len(second))
    return next((n for n in range(shorter) if first[n] != second[n]), shorter)


class PrefixCache:
    """The cache of one conversation: prompts come one after the other, each sharing its front with the one before.

    A generation stands between `begin` and either `commit`, or `roll_back`, which puts all back as it was. A ring
    cannot go back once its window is full: it is marked while a prompt is read, at the last place from which the next
    prompt may go on, and goes back there. Without such a mark it starts anew. What is set aside:

    - while a generation runs, of a cache that keeps everything the tokens that the prompt does not go on with; of a
      ring at most two windows, one for `roll_back` and one for the mark;
    - between generations at most one window, of a ring that has gone on beyond its mark.

    Args:
        cache: of one row. Used by others it is read anew.
        tokens: what it holds.
    """

    def __init__(self, cache: KVCache, tokens: Sequence[int] = ()) -> None:
        self.cache = cache
        self._tokens = list(tokens)  # not known while a generation runs
        self._mark: Snapshot | None = None  # stands within `_tokens`
        self._before: _State | None = None
        self.turn = 0  # which generation it is that runs, or ran last

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the cache holds; nothing is known of it while a generation runs."""
        return tuple(self._tokens)

    def begin(self, prompt: Sequence[int]) -> int:
        """Make ready for a prompt → how many of its first tokens need not be read; its last one always must be."""
        self.roll_back()
        self.turn += 1
        if self.cache.offset != len(self._tokens):
            self.clear()
        shared = common_prefix(self._tokens, prompt)
        self._before = _State(Snapshot(self.cache, shared), self._tokens, self._mark)
        self._tokens = []
        usable = min(shared, len(prompt) - 1)
        if self._mark is not None and self._mark.offset > usable:
            self._mark = None
        if self._mark is None:
            return usable if self.cache.can_trim(usable) else 0
        if self.cache.can_trim(usable):
            return usable
        self._mark.restore()
        return self._mark.offset

    def mark(self, latest: int) -> None:
        """Remember this place in a prompt, unless it is behind `latest` or the cache can go back to any place."""
        if self.cache.max_kv_size is not None and 0 < self.cache.offset <= latest:
            self._mark = Snapshot(self.cache)

    def commit(self, tokens: Sequence[int], keep: int) -> None:
        """The generation is over; of all that was read and generated, the next prompt shares the first `keep` tokens.

        What it does not share is forgotten.
        """
        held = tokens[: self.cache.offset]
        keep = min(keep, len(held))
        if self.cache.can_trim(keep):
            self.cache.trim(keep)
        elif self._mark is not None and self._mark.offset <= keep:
            self._mark.restore()
        else:
            self.cache.trim(0)
        if self._mark is not None and (self._mark.offset > keep or self.cache.can_trim(self._mark.offset)):
            self._mark = None
        self._before = None
        self._tokens = list(held[: self.cache.offset])

    def roll_back(self) -> None:
        """The generation never was; nothing happens if none runs."""
        if self._before is not None:
            before = self._before
            before.kept.restore()
            self._mark, self._before, self._tokens = before.mark, None, before.tokens

    def clear(self) -> None:
        """Forget all."""
        self.cache.trim(0)
        self._mark, self._before, self._tokens = None, None, []


@dataclass(frozen=True, slots=True)
class _State:
    kept: Snapshot
    tokens: list[int]
    mark: Snapshot | None
