"""Downloads that are under way, in this process or another: the locks that are held for a model of a hub.

The client of the Hugging Face hub locks each file while it comes, in `.locks/MODEL` of its cache, whichever program
asks for it. A download of ours holds a shared lock beside those from its beginning to its end, as does one of
ModelScope's, whose client names its locks so that no model can be told from them.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlxqwen.errors import HubError
from mlxqwen.files.locks import is_at, open_lock, try_lock, wait_for_lock

__all__ = [
    "alone_in_process",
    "begun_bytes",
    "is_under_way",
    "locks_of",
    "marked",
    "none_under_way",
    "remove_leftovers",
]

_MARK = ".mlxqwen.lock"
_OWN_FILE = re.compile(r"(?P<file>.+)\.[0-9a-f]{8}\.incomplete")  # of one process, which no other goes on with
_turns: dict[Path, threading.Lock] = {}  # by the folder of a model's locks
_turns_lock = threading.Lock()
_STALE = 60.0  # seconds without a byte; where a file system knows no locks, another process may be writing still


def locks_of(cache: Path, repo_id: str) -> Path:
    """The folder in which the client of the Hugging Face hub locks the files of a model."""
    return cache / ".locks" / f"models--{repo_id.replace('/', '--')}"


@contextmanager
def alone_in_process(folder: Path, on_wait: Callable[[], object]) -> Iterator[bool]:
    """Lets one thread of this process download a model at a time → whether another one had to be waited for.

    Args:
        folder: where the locks of the model lie.
        on_wait: called before that.
    """
    with _turns_lock:
        turn = _turns.setdefault(folder, threading.Lock())
    has_waited = not turn.acquire(blocking=False)
    if has_waited:
        on_wait()
        turn.acquire()
    try:
        yield has_waited
    finally:
        turn.release()


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Lets other processes see a download, as long as the context lasts; nothing where no lock can be made.

    It waits for a process that removes the model, or that looks whether it is marked, which takes a moment.

    Args:
        folder: where the locks of the model lie.
    """
    with ExitStack() as held:
        with suppress(OSError):
            is_held = False
            while not is_held:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = open_lock(folder / _MARK)
                held.callback(os.close, descriptor)
                wait_for_lock(descriptor, shared=True)
                is_held = is_at(descriptor, folder / _MARK)  # else it was removed meanwhile
        yield


def is_under_way(folder: Path) -> bool:
    """Whether any process holds a lock of the model."""
    return any(_is_held(path) for path in _locks(folder))


@contextmanager
def none_under_way(folder: Path, name: str) -> Iterator[None]:
    """Holds all locks of the model, so that what comes meanwhile waits. Raises `HubError` if one is held elsewhere."""
    with ExitStack() as held:
        for path in _locks(folder):
            with suppress(OSError):  # it has gone, or may not be locked
                descriptor = open_lock(path)
                held.callback(os.close, descriptor)
                if not try_lock(descriptor):
                    raise HubError(
                        f"{name}: another process is downloading it",
                        hint="Wait until it has ended, or end it, then run the same command again.",
                    )
        yield


def begun_bytes(blobs: Path, locks: Path) -> int:
    """Bytes of files that have come in part, and that a download goes on with or is writing now."""
    found = 0
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):  # under another name meanwhile
            own = _OWN_FILE.fullmatch(path.name)
            if own is None or _is_held(locks / f"{own['file']}.lock"):
                found += path.stat().st_size
    return found


def remove_leftovers(blobs: Path, locks: Path) -> None:
    """Remove the parts of files that no download goes on with: those of processes that were ended."""
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):
            own = _OWN_FILE.fullmatch(path.name)
            is_stale = own is not None and time.time() - path.stat().st_mtime >= _STALE
            if own is not None and is_stale and not _is_held(locks / f"{own['file']}.lock"):
                path.unlink()


def _locks(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.lock") if path.is_file()]


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)
