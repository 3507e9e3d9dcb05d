"""How fast prompts are read, so that a chunk that takes long is computed in parts: Ctrl-C is heard between two.

MLX computes what it is given to the end, and Python hears of Ctrl-C afterwards. Parts are layers of the same graph, so
they change no number.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["ReadingPace"]

_UNHEARD = 0.5  # seconds that a chunk may take as one
_PART = 0.25  # seconds that a part is to take


class ReadingPace:
    """The pace of the last chunk, by which the next one is cut into parts of whole layers.

    Args:
        layers: of the model.
        clock: seconds.
    """

    def __init__(self, layers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._layers = layers
        self._seconds: float | None = None  # a token

    def layers_at_once(self, tokens: int) -> int:
        """How many layers to compute at a time for so many tokens: all of a quick chunk, one where nothing is known."""
        if self._seconds is None:
            return 1
        expected = self._seconds * tokens
        return self._layers if expected <= _UNHEARD else max(1, int(self._layers * _PART / expected))

    def took(self, tokens: int, seconds: float) -> None:
        """Remember how long a chunk took."""
        self._seconds = seconds / tokens
