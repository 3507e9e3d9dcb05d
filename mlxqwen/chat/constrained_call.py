"""A call that a constraint keeps to Qwen3's form: its name and its arguments are certain as they come."""

from __future__ import annotations

import json
import re

from mlxqwen.chat.tool_call_text import parse_tool_calls

__all__ = ["ConstrainedCall"]

_FRONT = re.compile(r'\n\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
_END = "}\n"


class ConstrainedCall:
    """What stands behind a `<tool_call>` whose text is `\\n{"name": "…", "arguments": {…}}\\n`.

    Attributes:
        name: of the function; None until it has come.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._texts: list[str] = []
        self._held = ""

    def add(self, text: str) -> str:
        """Take the next text → the piece of the arguments that is now certain."""
        self._texts.append(text)
        self._held += text
        if self.name is None:
            found = _FRONT.match(self._held)
            if found is None:
                return ""
            self.name = json.loads(found[1])
            self._held = self._held[found.end() :]
        certain = max(0, len(self._held) - len(_END))
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    def end(self) -> str:
        """The closing tag has come → the rest of the arguments. Raises `ValueError` for what no reader takes."""
        parse_tool_calls("".join(self._texts))
        return self._held.removesuffix(_END)

    def cut(self) -> str:
        """The reply ends within the call → the rest of the arguments, as far as they have come."""
        try:
            parse_tool_calls("".join(self._texts))
        except ValueError:
            return "" if self.name is None else self._held
        return self._held.rstrip("\n").removesuffix("}")
