"""Text on its way to a terminal, a pipe or a file."""

from __future__ import annotations

import os
from typing import TextIO

__all__ = ["Output", "counted", "spell_out_controls"]

# A model's words must not steer the terminal: every control character but line breaks and tabs is spelled out. So are
# soft hyphens, which nobody sees but who copies them, and the embeddings, overrides and isolates of
# https://www.unicode.org/reports/tr9/, which show a line in another order than it has. Marks (U+200E, U+200F, U+061C)
# and joiners stay: Arabic, Hebrew and emoji need them, and they reorder no letters.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {
    code: f"\\u{code:04x}" for code in (0xAD, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"


def spell_out_controls(text: str) -> str:
    """`text` whose control characters, but line breaks and tabs, are spelled out: a terminal only shows it."""
    return text.translate(_CONTROLS)


def counted(number: int, noun: str) -> str:
    """For example `1 token` and `2,000 tokens`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


class Output:
    """A stream that text is written to as it comes; on a terminal control characters are spelled out.

    To a pipe or file goes what the model wrote, as programs and JSON need it.

    Args:
        stream: standard output or standard error.
        dim: write dimly on a terminal, unless NO_COLOR is set or the terminal is dumb.
    """

    def __init__(self, stream: TextIO, *, dim: bool = False) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.line_is_open = False
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._styled = dim and self.is_terminal and not plain

    @property
    def is_unicode(self) -> bool:
        """Whether any character can be written."""
        return (self.stream.encoding or "utf-8").lower().replace("-", "") == "utf8"

    def write(self, text: str) -> None:
        """Write `text` now."""
        if not text:
            return
        self.line_is_open = not text.endswith("\n")
        encoding = self.stream.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self.is_terminal:
            text = spell_out_controls(text)
        self.stream.write(f"{_DIM}{text}{_NORMAL}" if self._styled else text)
        self.stream.flush()

    def end_line(self) -> None:
        """Finish the line if one was begun."""
        if self.line_is_open:
            self.line_is_open = False
            self.stream.write("\n")
            self.stream.flush()
