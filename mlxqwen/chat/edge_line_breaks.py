"""Line breaks at the edges of a reply's content, and beside its calls."""

from __future__ import annotations

__all__ = ["EdgeLineBreaks"]


class EdgeLineBreaks:
    """`str.strip("\\n")` for text that comes in pieces, with calls between them."""

    def __init__(self) -> None:
        self._started = False
        self._pending = 0
        self._beside_cut = False

    @property
    def is_clear(self) -> bool:
        """Whether nothing has to be added before the next text."""
        return self._started and not self._pending and not self._beside_cut

    def cut(self) -> None:
        """Note that a call, or something else that is not shown, is here."""
        self._beside_cut = True

    def strip(self, text: str) -> str:
        """What is shown of the next piece, with the line breaks before it that turn out to be inside."""
        inner = text.lstrip("\n")
        self._pending += len(text) - len(inner)
        if not inner:
            return ""
        pending = min(self._pending, 1) if self._beside_cut else self._pending
        before = "\n" * pending if self._started else ""
        text, self._started, self._beside_cut = inner, True, False
        inner = text.rstrip("\n")
        self._pending = len(text) - len(inner)
        return before + inner
