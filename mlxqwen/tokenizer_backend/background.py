"""Compiling in a process of its own, so that nobody waits for it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

from mlxqwen.tokenizer_backend import store
from mlxqwen.tokenizer_backend.library import LibraryBackend
from mlxqwen.tokenizer_backend.tables import Tables

__all__ = ["compile_file", "start"]

# Modules come from where the caller's come from, and nothing is imported before that is known.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; from mlxqwen.tokenizer_backend.background import run; "
    "run(sys.argv[1], sys.argv[2])"
)
_MAX_SECONDS = 120  # Qwen3's tokenizer takes two


def start(path: Path, digest: str) -> None:
    """Begin to compile a `tokenizer.json`; whatever keeps it from that is of no account.

    Args:
        path: the file.
        digest: what its content is expected to be.
    """
    if not os.path.basename(sys.executable or "").lower().startswith("python") or getattr(sys, "frozen", False):
        return  # an application that holds an interpreter: to start it again is not to start Python
    nowhere = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)]
    arguments = [sys.executable, "-c", _PROGRAM, os.path.abspath(path), digest, *sys.path]
    with suppress(OSError, ValueError):
        process = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=nowhere)
        Thread(target=_forget, args=(process,), daemon=True).start()


def _forget(process: int) -> None:
    """Take note of the end of a process, so that it leaves nothing behind."""
    with suppress(OSError):
        os.waitpid(process, 0)


def run(path: str, digest: str) -> None:
    """What the process does: in no hurry, for a bounded time, and whatever becomes of the terminal."""
    with suppress(OSError):
        os.setsid()
    os.nice(10)
    signal.alarm(_MAX_SECONDS)
    compile_file(Path(path), digest)


def compile_file(path: Path, digest: str) -> None:
    """Put the tables of a `tokenizer.json` into the cache, or a note that it has none."""
    from mlxqwen.tokenizer_backend.compiler import compile_tokenizer

    entry, data = store.entry_path(digest), path.read_bytes()
    if entry is None or store.digest(data) != digest:
        return
    facts = {"source": str(path)}
    try:
        tables = compile_tokenizer(LibraryBackend.parse(data, str(path)), facts)
    except Exception as error:  # whatever it is: it would be the same at each start
        tables = Tables.make({**facts, "unsuitable": f"{type(error).__name__}: {error}"})
    store.write_tables(entry, tables)
