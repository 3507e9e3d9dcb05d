"""Log-probabilities of tokens: those of the model itself, for the replies that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx

if TYPE_CHECKING:
    from mlxqwen.engine.generation import Generation

__all__ = ["MAX_ALTERNATIVES", "BegunLogprobs", "TokenLogprobs", "begin_logprobs", "logprobs_of"]

MAX_ALTERNATIVES = 20
"""The most likeliest tokens that are told beside one."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was: the log-softmax of the raw logits, before bias, penalties, temperature and constraints.

    Args:
        token: its id.
        logprob: of this token.
        likeliest: ids and values of the likeliest tokens there, the likeliest first.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


class BegunLogprobs:
    """The distribution that a token is being drawn from, until it is known which one.

    Args:
        logits: `[V]`, raw.
        count: how many of the likeliest are told.
    """

    def __init__(self, logits: mx.array, count: int) -> None:
        scores = logits.astype(mx.float32)
        self._values = scores - mx.logsumexp(scores)
        ids = mx.argpartition(-scores, count - 1)[:count] if count else mx.array([], dtype=mx.uint32)
        self._ids = ids
        self._best = self._values[ids]

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated."""
        return [self._values, self._ids, self._best]

    def of(self, token: int) -> TokenLogprobs:
        """Those of the token that is used. Called by the thread that evaluates."""
        best = zip(cast(list[int], self._ids.tolist()), cast(list[float], self._best.tolist()), strict=True)
        likeliest = sorted(best, key=lambda one: (-one[1], one[0]))
        return TokenLogprobs(token, cast(float, self._values[token].item()), tuple(likeliest))


def begin_logprobs(generations: Sequence[Generation | None], logits: mx.array) -> list[mx.array]:
    """Begin the log-probabilities of the next tokens of those rows that ask for them → arrays to evaluate.

    Args:
        generations: one a row.
        logits: `[B, V]`, raw.
    """
    arrays: list[mx.array] = []
    for row, one in enumerate(generations):
        if one is not None and one.request.logprobs is not None:
            one.begun_logprobs = BegunLogprobs(logits[row], one.request.logprobs)
            arrays += one.begun_logprobs.arrays
    return arrays


def logprobs_of(logits: mx.array, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """How likely tokens that are given were. Called by the thread that evaluates.

    Args:
        logits: `[len(tokens), V]`, raw, each of the place where its token stands.
        tokens: their ids.
        count: how many of the likeliest are told with each.
    """
    begun = [BegunLogprobs(row, count) for row in logits]
    mx.eval([one.arrays for one in begun])
    return [one.of(token) for one, token in zip(begun, tokens, strict=True)]
