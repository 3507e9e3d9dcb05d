"""A folder of entries in the user's cache: each is made once by whoever comes first, and used until it is pruned.

    NAME/KEY/entry.json   what the entry is; its time of change is that of its last use
             lock         held alone while somebody makes or removes the entry, shared while somebody reads it
             …            what it holds

Folders are the user's alone (mode 0700). An entry that belongs to another user, or that others may write to, counts for
nothing: it is told of and made anew. An entry is removed under another name, so that there is never half of one under
its key, and what is already gone when it is to be removed is no failure. Links are never followed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mlxqwen.errors import MlxqwenError
from mlxqwen.files.atomic import write_file
from mlxqwen.files.json_file import read_json_object, unreadable
from mlxqwen.files.locks import is_at, open_lock, try_lock, wait_for_lock

__all__ = ["Entry", "Store", "is_own", "tell_of_others", "user_cache_folder"]

logger = logging.getLogger("mlxqwen")

RECORD, LOCK = "entry.json", "lock"
_KEY = re.compile(r"[0-9a-f]{16}")
_REMOVED = re.compile(r"removed-[0-9a-f]{16}-[0-9a-f]{8}")
_MAX_RECORD_BYTES = 1 << 20
_ELSEWHERE = "Set MLXQWEN_CACHE to another folder."


def user_cache_folder() -> Path | None:
    """`$MLXQWEN_CACHE`, or `mlxqwen` in the folder for a user's caches: `$XDG_CACHE_HOME`, or the system's.

    None if the user has no home.
    """
    chosen, shared = os.environ.get("MLXQWEN_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        if os.path.isabs(shared):
            return Path(shared) / "mlxqwen"
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlxqwen"
    except RuntimeError:
        return None


class Store:
    """The entries of one kind. Nothing is made before an entry is locked.

    Attributes:
        folder: `NAME` in the user's cache folder.
    """

    def __init__(self, name: str, *, error: type[MlxqwenError]) -> None:
        """Find the folder of the store.

        Args:
            name: of its folder.
            error: what the store and its entries raise.

        Raises:
            MlxqwenError: of the type `error`: the user has no home, or the folder is a link, which could lead anywhere.
        """
        cache = user_cache_folder()
        if cache is None:
            raise error(f"no home folder found to keep {name} models in", hint=_ELSEWHERE)
        self._error = error
        self.folder = cache / name
        if os.path.islink(self.folder):  # other than Path's, it takes what cannot be looked at for none
            raise error(f"{self.folder}: a link, expected a folder", hint="Set MLXQWEN_CACHE to where it leads.")

    def entry(self, key: str) -> Entry:
        """The entry of a key of 16 hexadecimal digits, there or not."""
        return Entry(self.folder / key, self._error)

    def entries(self) -> list[Entry]:
        """All entries, and what is left of those whose removal was cut short. Raises the store's error."""
        try:
            with os.scandir(self.folder) as found:
                names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as cause:
            raise self._error(
                f"{self.folder}: cannot be read: {cause.strerror}",
                hint=f"{unreadable(cause)} Or set MLXQWEN_CACHE to another folder.",
            ) from None
        return [self.entry(name) for name in names if _KEY.fullmatch(name) or _REMOVED.fullmatch(name)]


class Entry:
    """One entry; its folder is named by its key."""

    def __init__(self, folder: Path, error: type[MlxqwenError]) -> None:
        self.folder = folder
        self._error = error

    @property
    def is_half_removed(self) -> bool:
        """Whether it is what is left of an entry whose removal was cut short."""
        return _REMOVED.fullmatch(self.folder.name) is not None

    @property
    def nbytes(self) -> int:
        """Bytes that its files take on disk."""
        total = 0
        for path, _, files in os.walk(self.folder):
            for name in files:
                with suppress(OSError):
                    total += os.lstat(os.path.join(path, name)).st_blocks * 512
        return total

    @property
    def last_used(self) -> float:
        """Seconds since 1970; 0 if unknown."""
        try:
            return (self.folder / RECORD).lstat().st_mtime
        except OSError:
            return 0.0

    def read_record(self) -> dict[str, Any] | None:
        """What `write_record` wrote; None if there is none, a damaged one, or one that others may have written."""
        path = self.folder / RECORD
        if not (is_own(self.folder.parent) and is_own(self.folder) and is_own(path)):
            return None
        try:
            return read_json_object(path, error=self._error, max_bytes=_MAX_RECORD_BYTES)
        except self._error:
            return None

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write what the entry is. Raises `OSError`."""
        write_file(self.folder / RECORD, (json.dumps(record, indent=1) + "\n").encode(), private=True)

    def touch(self) -> None:
        """Note that it is used now; a cache may be read-only."""
        with suppress(OSError):
            os.utime(self.folder / RECORD)

    def files(self, folder: Path) -> dict[str, int] | None:
        """Sizes of the files below a folder of the entry, by relative path; None if anything is not the user's own."""
        if not is_own(folder):
            return None
        sizes = {}
        for path, folders, names in os.walk(folder):
            for name in (*folders, *names):
                found = Path(path, name)
                if not is_own(found):
                    return None
                if name in names:
                    sizes[str(found.relative_to(folder))] = found.lstat().st_size
        return sizes

    def make_own(self, folder: Path) -> None:
        """Let nobody else read or write a folder of the entry, whatever the umask was. Raises `OSError`."""
        folder.chmod(0o700)
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() else 0o600)

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the entry alone, in a folder that is made if it is missing.

        Args:
            waiting: called if somebody else holds it, who is then waited for.

        Raises:
            OSError: it cannot be made or locked.
            MlxqwenError: the store belongs to another user.
        """
        while True:
            self._make_folder()
            try:
                descriptor = open_lock(self.folder / LOCK)
            except FileNotFoundError:  # removed since it was made
                continue
            try:
                if not try_lock(descriptor):
                    waiting()
                    wait_for_lock(descriptor)
                if is_at(descriptor, self.folder / LOCK):  # else whoever held it has removed the entry
                    yield
                    return
            finally:
                os.close(descriptor)

    def hold(self, is_whole: Callable[[], bool], held: ExitStack | None = None) -> bool:
        """Whether the entry is whole; if so, it is not removed until `held` closes.

        A file system without locks, or a lock that cannot be opened, holds nothing back.
        """
        if not is_whole():
            return False
        with ExitStack() as shared:
            try:
                descriptor = open_lock(self.folder / LOCK, shared=True)
                shared.callback(os.close, descriptor)
                wait_for_lock(descriptor, shared=True)
                is_held = is_at(descriptor, self.folder / LOCK)
            except OSError:
                is_held = True
            if not is_held or not is_whole():  # removed while the lock was waited for
                return False
            if held is not None:
                held.push(shared.pop_all())
        return True

    @contextmanager
    def tried(self, *, shared: bool = False) -> Iterator[bool]:
        """Whether nobody else holds the entry in a way that excludes this one; if so, nobody will until the end."""
        try:
            descriptor = os.open(self.folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # no lock, so nobody holds it
            yield True
            return
        try:
            try:
                is_free = try_lock(descriptor, shared=shared)
            except OSError:
                is_free = False
            yield is_free
        finally:
            os.close(descriptor)

    def remove(self) -> bool:
        """Remove the entry; False if somebody else has. Raises the store's error."""
        return self._remove(self.folder, self.folder.parent)

    def clear(self, path: Path) -> None:
        """Remove a folder or file inside the entry. Raises the store's error."""
        self._remove(path, self.folder)

    def _remove(self, path: Path, parent: Path) -> bool:
        """Remove a folder so that it never looks like a model on the way; False if it is gone already."""
        try:
            if not path.is_dir() or path.is_symlink():
                path.unlink()
                return True
            if not _REMOVED.fullmatch(path.name):
                path = path.rename(parent / f"removed-{secrets.token_hex(8)}-{secrets.token_hex(4)}")
            inner = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
            for place in (path, *inner):
                (place / "config.json").unlink(missing_ok=True)
            while os.path.lexists(path):
                with suppress(FileNotFoundError):  # another process removes it as well
                    shutil.rmtree(path)
        except FileNotFoundError:
            return False
        except OSError as cause:
            raise self._error(
                f"{path}: cannot be removed: {cause.strerror}", hint="Remove it yourself, as a user who may."
            ) from None
        return True

    def _make_folder(self) -> None:
        store = self.folder.parent
        _make_own(store)
        status = store.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise self._error(f"{store}: belongs to another user, expected a folder of your own", hint=_ELSEWHERE)
        if status.st_mode & 0o022:
            store.chmod(0o700)
            logger.warning("%s: others could write to it; it is yours alone now", store)
        _make_own(self.folder)
        if not is_own(self.folder):
            tell_of_others(self.folder)
            with suppress(self._error):  # moved away, at least
                self.remove()
            self.folder.mkdir(mode=0o700)


def _make_own(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for the user alone. Raises `OSError`."""
    if not folder.parent.exists():
        _make_own(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def is_own(path: Path) -> bool:
    """Whether a file or folder is this user's (or root's), and nobody else may write to it; a link is not."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def tell_of_others(path: Path) -> None:
    """Log that what is not the user's own is not used."""
    logger.warning("%s: not yours alone to write to, expected of a cache; it is made anew", path)
