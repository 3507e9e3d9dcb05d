"""Many files, a few of them open at a time: a system may allow a process no more than some dozens."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["OpenFiles"]

# As many as there may be workers, so that none waits for a file that another one uses.
_MOST_OPEN = 8


@dataclass(slots=True)
class _Open:
    descriptor: int
    users: int = 0


class OpenFiles:
    """Descriptors by path, opened with the same flags and used by any thread."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._lock = threading.Lock()
        self._open: dict[Path, _Open] = {}

    @contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        """A descriptor that stays open meanwhile. Raises `OSError`."""
        with self._lock:
            entry = self._open.pop(path, None)
            if entry is None:
                self._close_idle()
                entry = _Open(os.open(path, self._flags, 0o644))
            self._open[path] = entry  # last in the order of use
            entry.users += 1
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.users -= 1

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].descriptor)

    def _close_idle(self) -> None:
        """Close what was not used for longest, if there are many."""
        for path in [path for path, entry in self._open.items() if not entry.users]:
            if len(self._open) < _MOST_OPEN:
                return
            os.close(self._open.pop(path).descriptor)
