"""Locks between processes: `flock` on a file that may be removed while somebody waits for it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["is_at", "open_lock", "try_lock", "wait_for_lock"]


def open_lock(path: Path, *, shared: bool = False) -> int:
    """A descriptor of a lock's file, made if it is missing; a shared lock needs no right to write. Raises `OSError`."""
    access = os.O_RDONLY if shared else os.O_RDWR
    return os.open(path, access | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False if somebody else holds it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(descriptor: int, *, shared: bool = False) -> None:
    """Lock an open file, once nobody else holds it. Raises `OSError`: the file system has no locks."""
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has the name `path`: who held its lock may have removed it, or moved its folder."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (held.st_ino, held.st_dev) == (found.st_ino, found.st_dev)
