"""Files that are written whole or not at all, and are on the disk itself when the call returns."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["STAGED_PREFIX", "reason_of", "staging_folder", "sync", "sync_descriptor", "write_file"]

STAGED_PREFIX = ".partial-"
_FULL_FSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def write_file(path: Path, data: bytes | Iterable[bytes], *, private: bool = False, keeps_mode: bool = False) -> None:
    """Write a file: under its name there is the old one or the whole new one at any moment.

    Args:
        path: the file; a link is replaced, not followed.
        data: its bytes, perhaps in pieces.
        private: make it readable and writable by its owner alone (mode 0600), whatever the umask.
        keeps_mode: give it the mode of the user's own file that it replaces, if there is one.

    Raises:
        OSError: it cannot be written; nothing is left of the new one.
        ValueError: no file system has such a name.
    """
    staged = path.with_name(f"{STAGED_PREFIX}{os.urandom(8).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(staged, flags, 0o600 if private else 0o666)
    try:
        with open(descriptor, "wb") as file:
            if keeps_mode and (mode := _own_mode(path)) is not None:
                os.fchmod(descriptor, mode)
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            sync_descriptor(file.fileno())
        staged.replace(path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    try:
        sync(path.parent)
    except OSError as cause:  # a folder that may be written to, not read, or a file system that has no names to sync
        if cause.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def _own_mode(path: Path) -> int | None:
    """The permissions of a file of the user's own; None for no such file, a link, or somebody else's file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    return stat.S_IMODE(found.st_mode) & 0o777 if is_own else None


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A folder of the owner's alone inside `parent`, on its disk, to write files in before they are moved into place.

    It is removed at the end, with what is left in it.

    Raises:
        OSError, ValueError: it cannot be made.
    """
    import shutil
    import tempfile

    staging = Path(tempfile.mkdtemp(prefix=STAGED_PREFIX, dir=parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Have an open file on the disk itself: macOS's `fsync` stops at the disk's own cache. Raises `OSError`."""
    if _FULL_FSYNC is not None:
        try:
            fcntl.fcntl(descriptor, _FULL_FSYNC)
            return
        except OSError as cause:
            if cause.errno not in (errno.ENOTSUP, errno.ENOTTY, errno.EINVAL):  # a file system of another kind
                raise
    os.fsync(descriptor)


def reason_of(cause: Exception) -> str:
    """What an error of the system says, without its number and path."""
    return str(getattr(cause, "strerror", None) or cause)
