"""A constraint that forbids a few tokens: for the whole reply, or until it is long enough."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx

from mlxqwen.sampling.constraint import pack_mask

__all__ = ["ForbiddenTokens"]


class ForbiddenTokens:
    """A `Constraint` under which some tokens are not drawn.

    Args:
        tokens: ids; those outside the vocabulary are none that could be drawn.
        vocab_size: length of a row of logits.
        until: how many tokens the reply has to have before they are allowed; None forbids them throughout.
    """

    def __init__(self, tokens: Collection[int], vocab_size: int, *, until: int | None = None) -> None:
        self._tokens = frozenset(tokens)
        self._vocab_size = vocab_size
        self._until = until
        self._count = 0
        self._packed: mx.array | None = None

    def mask(self) -> mx.array | None:
        """All tokens but these; None once they are allowed."""
        if not self._tokens or (self._until is not None and self._count >= self._until):
            return None
        if self._packed is None:  # made by the thread that evaluates
            allowed = [token for token in range(self._vocab_size) if token not in self._tokens]
            self._packed = pack_mask(allowed, self._vocab_size)
        return self._packed

    def settle(self, drawn: int) -> int:
        """`drawn` itself."""
        return drawn

    def advance(self, token: int) -> None:
        """Count a token."""
        self._count += 1

    def fork(self) -> ForbiddenTokens:
        """A copy with a count of its own."""
        copy = ForbiddenTokens(self._tokens, self._vocab_size, until=self._until)
        copy._count, copy._packed = self._count, self._packed
        return copy
