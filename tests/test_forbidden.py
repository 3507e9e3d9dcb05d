"""Tokens that may not be drawn, throughout or until a reply is long enough."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxqwen.sampling.constraint import apply_masks
from mlxqwen.sampling.forbidden import ForbiddenTokens

VOCAB = 70


def allowed(constraint: ForbiddenTokens) -> set[int]:
    (logits,) = np.array(apply_masks(mx.zeros((1, VOCAB)), [constraint.mask()]))
    return {int(token) for token in np.flatnonzero(logits == 0.0)}


def test_some_tokens_are_never_drawn() -> None:
    constraint = ForbiddenTokens([3, 69, 500], VOCAB)
    for token in (1, 2, 1):
        assert allowed(constraint) == set(range(VOCAB)) - {3, 69}
        assert constraint.settle(token) == token
        constraint.advance(token)


def test_they_are_allowed_once_the_reply_is_long_enough() -> None:
    constraint = ForbiddenTokens([3], VOCAB, until=2)
    constraint.advance(0)
    copy = constraint.fork()
    copy.advance(0)
    assert 3 not in allowed(constraint)
    assert allowed(copy) == set(range(VOCAB))
    assert ForbiddenTokens([], VOCAB).mask() is None
