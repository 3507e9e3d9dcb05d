"""Compiling in a process of its own, so that nobody waits for it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

from mlxqwen.errors import MlxqwenError, TokenizerError
from mlxqwen.files.json_file import read_bounded
from mlxqwen.text.tokenizer_backend import store
from mlxqwen.text.tokenizer_backend.library import LibraryBackend
from mlxqwen.text.tokenizer_backend.tables import Tables

__all__ = ["compile_file", "start"]

# What `ps` shows. First of all it bounds its own time, leaves the terminal, and closes whatever its caller had open.
_PROGRAM = f"""# mlxqwen: compiles a tokenizer once, for quicker starts
import os, signal, sys
signal.alarm({store.MAX_SECONDS})
os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 65536) if os.sysconf("SC_OPEN_MAX") > 0 else 65536)
os.getsid(0) == os.getpid() or os.setsid()
os.chdir("/")
sys.path[:] = sys.argv[4:]
from mlxqwen.text.tokenizer_backend.background import run
run(*sys.argv[1:4])
"""
_SIGNALS = (signal.SIGALRM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU)  # a caller may ignore them


def start(path: Path, digest: str, entry: Path) -> None:
    """Begin to compile a `tokenizer.json`, unless another process has; whatever keeps it from that is of no account.

    Args:
        path: the file.
        digest: what its content is expected to be.
        entry: where its tables are to be kept.
    """
    if not os.path.basename(sys.executable or "").lower().startswith("python") or getattr(sys, "frozen", False):
        return  # an application that holds an interpreter: to start it again is not to start Python
    if not store.claim(entry, path):
        return
    try:
        process = _spawn(path, digest, entry)
    except (OSError, ValueError):
        store.discard(entry)
        return
    with suppress(RuntimeError):  # no thread to be had: the process is taken note of when this one ends
        Thread(target=_forget, args=(process,), daemon=True).start()


def _spawn(path: Path, digest: str, entry: Path) -> int:
    """Start the process; it takes its modules from where they come from here, and nothing from the environment."""
    modules = [os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)]
    flags = ["-I", "-B", *(["-S"] if sys.flags.no_site else [])]
    arguments = [sys.executable, *flags, "-c", _PROGRAM, os.path.abspath(path), digest, str(entry), *modules]
    nowhere = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)]

    def spawn(*, setsid: bool) -> int:
        return os.posix_spawn(
            sys.executable,
            arguments,
            os.environ,
            file_actions=nowhere,
            setsid=setsid,
            setsigmask=(),
            setsigdef=_SIGNALS,
        )

    try:
        return spawn(setsid=True)
    except NotImplementedError:  # the process does it itself
        return spawn(setsid=False)


def _forget(process: int) -> None:
    """Take note of the end of a process, so that it leaves nothing behind."""
    with suppress(OSError):
        os.waitpid(process, 0)


def run(path: str, digest: str, entry: str) -> None:
    """What the process does: in no hurry, and for a bounded time of the processor, too."""
    from resource import RLIM_INFINITY, RLIMIT_CPU, getrlimit, setrlimit

    with suppress(OSError):
        os.nice(10)
    with suppress(OSError, ValueError):
        _, hard = getrlimit(RLIMIT_CPU)
        most = store.MAX_SECONDS if hard == RLIM_INFINITY else min(hard, store.MAX_SECONDS)
        setrlimit(RLIMIT_CPU, (most, most))
    compile_file(Path(path), digest, Path(entry))


def compile_file(path: Path, digest: str, entry: Path) -> None:
    """Put the tables of a `tokenizer.json` into the cache, or a note that it has none; arguments as of `start`."""
    from mlxqwen.text.tokenizer_backend.compiler import compile_tokenizer

    try:
        data = read_bounded(path, error=TokenizerError, max_bytes=store.MAX_BYTES)
    except MlxqwenError:
        return
    if store.digest(data) != digest:
        return
    facts = {"sources": [os.path.abspath(path)]}
    try:
        tables = compile_tokenizer(LibraryBackend.parse(data, str(path)), facts)
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise  # passing: the note that it was begun stays, and is good for a day
    except BaseException as error:  # the library's panics, too; whatever it is, it would be the same at each start
        tables = Tables.make({**facts, "unsuitable": f"{type(error).__name__}: {error}"})
    store.write_tables(entry, tables)
