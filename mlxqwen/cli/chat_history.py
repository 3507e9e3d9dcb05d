"""Lines typed into `mlxqwen chat`, kept from one run to the next in a file that is its owner's alone."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import History, InMemoryHistory

from mlxqwen.files.atomic import reason_of, write_file

__all__ = ["FileHistory", "history_path", "open_history"]

logger = logging.getLogger("mlxqwen")

_MOST_LINES = 2_000  # kept
_MOST_BYTES = 4 * 2**20


def history_path() -> Path:
    """`mlxqwen/chat_history` in the folder for a user's state: `$XDG_STATE_HOME`, or `~/.local/state`."""
    chosen = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(chosen) if os.path.isabs(chosen) else Path("~/.local/state").expanduser()
    return folder / "mlxqwen" / "chat_history"


def open_history(path: Path | None) -> History:
    """The history in a file; without one it lasts for this run only, as it does where a note says what is wrong."""
    if path is None:
        return InMemoryHistory()
    try:
        return FileHistory(path)
    except OSError as error:
        logger.warning("%s: the history is not kept: %s", path, reason_of(error))
        return InMemoryHistory()


class FileHistory(History):
    """Each line that was typed, as a JSON string on a line of its own, the oldest first.

    Args:
        path: the file, made with its folder if it is not there. Of a long one the last lines are kept.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._open(os.O_RDWR), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _MOST_BYTES))
            lines = file.read(_MOST_BYTES).splitlines(keepends=True)
        if size > _MOST_BYTES:
            del lines[0]  # its beginning was not read
        if size > _MOST_BYTES or len(lines) > 2 * _MOST_LINES:
            write_file(path, b"".join(lines[-_MOST_LINES:]), private=True)
        self._typed = [text for line in lines[-_MOST_LINES:] if (text := _text(line))]

    def load_history_strings(self) -> Iterable[str]:
        """What was typed in earlier runs, the latest first."""
        return reversed(self._typed)

    def store_string(self, string: str) -> None:
        """Append a line; one that cannot be written, as on a full disk, is kept for this run only."""
        with suppress(OSError), open(self._open(os.O_WRONLY | os.O_APPEND), "ab") as file:
            file.write(json.dumps(string).encode() + b"\n")

    def _open(self, flags: int) -> int:
        descriptor = os.open(self._path, flags | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)
        return descriptor


def _text(line: bytes) -> str:
    """The text in a line of the file, "" if it is damaged."""
    try:
        text = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return text if isinstance(text, str) else ""
