"""A drafter that copies from the text: what followed the last occurrence of its latest tokens.

Prompt lookup decoding (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding). No model runs, so a guess
costs next to nothing. It is right where a reply repeats its prompt or itself: quotes, code, tables, corrections.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxqwen.sampling.sampler import Sampler

__all__ = ["PromptLookup"]

_MOST_CANDIDATES = 32  # places that are looked at for one guess
_LONGEST_MATCH = 16  # tokens; more of them tell no more
_MOST_INDEXED = 1 << 17  # tokens


class PromptLookup:
    """Continues as the text did after the longest match of its latest tokens; among equal matches the latest.

    Each new token adds one entry to an index of all runs of `shortest` tokens, so that neither the time per token nor
    the number of places compared grows with the text. Of a very long text only the latest part is indexed.

    Args:
        shortest: tokens that have to match.
    """

    def __init__(self, shortest: int = 2) -> None:
        self._shortest = shortest
        self._text: Sequence[int] = ()
        self._forget(0)

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> list[int]:
        """See `Drafter`."""
        if text is not self._text or len(text) < self._added:
            self._text = text
            self._forget(0)
        if len(text) - self._start > _MOST_INDEXED:
            self._forget(len(text) - _MOST_INDEXED // 2)
        self._add(text)
        best, longest = 0, 0
        place = self._earlier[-1]
        for _ in range(_MOST_CANDIDATES):
            if not place or longest == _LONGEST_MATCH:
                break
            length = self._match(text, place)
            if length > longest:
                best, longest = place, length
            place = self._earlier[place - self._start]
        return _copied(text, best, count) if best else []

    def _forget(self, start: int) -> None:
        """Begin an empty index at position `start`."""
        self._start = start
        self._latest: dict[tuple[int, ...], int] = {}  # a run of tokens → the latest place behind it
        self._earlier: list[int] = []  # of each place from `start` on the place before it behind the same run, or 0

    @property
    def _added(self) -> int:
        return self._start + len(self._earlier) - 1

    def _add(self, text: Sequence[int]) -> None:
        """Add the tokens up to the end of the text to the index."""
        for place in range(self._start + len(self._earlier), len(text) + 1):
            if place - self._start < self._shortest:
                self._earlier.append(0)
                continue
            run = tuple(text[place - self._shortest : place])
            self._earlier.append(self._latest.get(run, 0))
            self._latest[run] = place

    def _match(self, text: Sequence[int], place: int) -> int:
        """How many tokens before `place` equal those at the end of the text."""
        most = min(_LONGEST_MATCH, place)
        return next((n for n in range(most) if text[place - 1 - n] != text[-1 - n]), most)


def _copied(text: Sequence[int], place: int, count: int) -> list[int]:
    """`count` tokens from `place` on; at the end of the text the copy continues with itself."""
    period = len(text) - place
    return [text[place + n % period] for n in range(count)]
