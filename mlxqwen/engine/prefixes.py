"""Fronts that two lists of tokens share."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["common_prefix"]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest beginning that both have."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(n for n in range(shorter) if first[n] != second[n])
