"""What a word that is no name may have been meant as: the nearest names, the nearest first."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["nearest"]

_LEAST = 0.7
_BEHIND_THE_BEST = 0.05
_BEGUN, _PART, _WITH_MORE = 0.95, 0.75, 0.8


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The names that `word` is nearest to: misspelt, begun, a part of them, or with more behind it.

    Args:
        word: as it was typed; dashes at its beginning, capitals and underscores do not matter.
        known: names. Those that are farther than the nearest are left out.
    """
    plain = _plain(word)
    scores = {name: _likeness(plain, _plain(name)) for name in known}
    best = max(scores.values(), default=0.0)
    near = [name for name, score in scores.items() if score >= max(_LEAST, best - _BEHIND_THE_BEST)]
    return sorted(near, key=lambda name: (-scores[name], len(name)))


def _plain(word: str) -> str:
    return word.lstrip("-").lower().replace("_", "-")


def _likeness(word: str, name: str) -> float:
    """From 0 to 1."""
    ratio = SequenceMatcher(None, word, name, autojunk=False).ratio()
    if len(word) < 2:
        return ratio
    if name.startswith(word):
        return max(ratio, _BEGUN)
    if word.startswith(f"{name}-"):
        return max(ratio, _WITH_MORE)
    return max(ratio, _PART) if word in name.split("-") else ratio
