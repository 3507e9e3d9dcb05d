"""The disk tier of the prefix store: blocks in a folder, kept from one run to the next.

A file holds a run of consecutive blocks of a chain, and its name is the key of the first one. So blocks are found
without an index, and two processes may share the folder without locks. A file appears under its name when it is whole.
It is not forced onto the disk: what a power cut leaves is found to be damaged, removed, and read anew.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import IO

from mlxqwen.cache.block_file import BlockRun, DamagedRunError, encode_header, open_run, payloads
from mlxqwen.cache.chain import TokenChain
from mlxqwen.cache.storage import Stored
from mlxqwen.checks import is_integer
from mlxqwen.errors import CacheError, MlxqwenError, OptionError
from mlxqwen.files.checkpoint import read_header

__all__ = ["DiskTier"]

logger = logging.getLogger("mlxqwen")

_SUFFIX = ".kv1"  # of this format; other versions have other numbers
_OWN_NAME = re.compile(r"[0-9a-f]{32}\.kv\d+|\.partial-\w+")
_PARTIAL = ".partial-"
_LEFT_BEHIND = 600 * 10**9  # ns, after which a temporary file belongs to no writer
_RUN_BYTES = 1 << 26  # bytes of a file at most; a single block may be larger
_HEADER_BYTES = 512  # what a block adds to a header, and a share of the rest
_OTHER_NAME = "Give the name of a folder of your own; it is made where there is none."


class DiskTier:
    """Blocks in a folder that is this user's alone.

    Opening reads nothing. Files that were not used for longest are removed first, and those of a chain from its end.
    Files of other models and versions are never read, but count, and are removed in their turn. A damaged file is
    removed and logged; a disk that is full or fails is logged once, and nothing else happens.

    Args:
        folder: made if its parent exists.
        capacity: bytes that files in the folder may take; two processes that write at once may exceed it by a file.
            It may be more than the disk has.

    Raises:
        CacheError: the folder is a file, a link, somebody else's, writable by others, or cannot be written to.
        OptionError: a capacity below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], capacity: int) -> None:
        if not is_integer(capacity) or capacity < 1:
            raise OptionError(
                f"prompt cache: found a capacity of {capacity!r}, expected a number of bytes above 0",
                hint="Leave the folder out to keep nothing on disk.",
            )
        self.folder = _own_folder(folder)
        self.capacity = capacity
        self._noted: set[str] = set()
        try:
            self._make_room(self._listing(), 0, ())
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def read(self, chain: TokenChain, start: int, stop: int) -> list[Stored]:
        """The blocks of a chain from `start` on, checked and evaluated, up to the first one that is missing."""
        blocks: list[Stored] = []
        used = []
        place = 0
        while place < stop:
            opened = self._open(chain, place)
            if opened is not None:
                run, count = opened
                path = self._path(chain, place)
                used.append(path)
                try:
                    with closing(run):
                        blocks += run.read(max(start - place, 0), min(count, stop - place))
                except DamagedRunError as damage:
                    self._drop(path, damage)
                    break
                except OSError as error:
                    self._note_failure("read", error)
                    break
                place += count
            elif place < start:  # the run that holds `start` may begin anywhere before
                place += 1
            else:
                break
        _touch(used)
        return blocks

    def write(self, chain: TokenChain, blocks: Sequence[Stored]) -> None:
        """Write the first blocks of a chain that are not there yet, and mark all as used."""
        used = []
        missing: list[int] = []
        place = 0
        while place < len(blocks):
            opened = self._open(chain, place)
            if opened is None:
                missing.append(place)
                place += 1
            else:
                run, count = opened
                run.close()
                used.append(place)
                place += count
        try:
            used += self._write_runs(chain, blocks, missing, used) if missing else []
        except OSError as error:
            self._note_failure("written", error)
        _touch([self._path(chain, place) for place in sorted(used)])

    def _write_runs(
        self, chain: TokenChain, blocks: Sequence[Stored], missing: Sequence[int], used: Sequence[int]
    ) -> list[int]:
        """Write blocks as runs → the first block of each run. Stops where the capacity has no room for more."""
        listing = self._listing()
        spared = {self._path(chain, place).name for place in used}
        written: list[int] = []
        block_bytes = _HEADER_BYTES + sum(part.nbytes for part in blocks[0])
        for start, stop in _runs(missing, max(1, min(_RUN_BYTES, self.capacity) // block_bytes)):
            path, some = self._path(chain, start), blocks[start:stop]
            header = encode_header(chain, start, some)
            size = len(header) + sum(part.nbytes for block in some for part in block)
            if size > self.capacity:
                self._note("capacity", f"its capacity of {self.capacity:,} bytes holds no block, which takes {size:,}")
            if not self._make_room(listing, size, spared):
                break
            self._write_file(path, header, some)
            listing[path.name] = time.time_ns(), size
            spared.add(path.name)
            written.append(start)
        return written

    def _write_file(self, path: Path, header: bytes, blocks: Sequence[Stored]) -> None:
        """Write a file beside its place, and move it there. Raises `OSError`."""
        descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self.folder)  # mode 0600
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for view in (memoryview(header), *(view for block in blocks for view in payloads(block))):
                    _write_all(file, view)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise

    def _make_room(self, listing: dict[str, tuple[int, int]], size: int, spared: Collection[str]) -> bool:
        """Remove the files used least recently until `size` more bytes fit → whether they do. Raises `OSError`."""
        excess = sum(nbytes for _, nbytes in listing.values()) + size - self.capacity
        may_go = [
            (used, name, nbytes)
            for name, (used, nbytes) in listing.items()
            if name not in spared and not name.startswith(_PARTIAL)
        ]
        if excess > sum(nbytes for _, _, nbytes in may_go):
            return False
        for _, name, nbytes in sorted(may_go):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):  # another process was quicker
                os.unlink(self.folder / name)
            del listing[name]
            excess -= nbytes
        return True

    def _listing(self) -> dict[str, tuple[int, int]]:
        """The files of any model and version: name → time of last use in ns, bytes. Raises `OSError`.

        Temporary files of writers that were killed are removed.
        """
        listing = {}
        left_behind = time.time_ns() - _LEFT_BEHIND
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _OWN_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if entry.name.startswith(_PARTIAL) and status.st_mtime_ns < left_behind:
                            os.unlink(entry.path)
                        else:
                            listing[entry.name] = status.st_mtime_ns, status.st_size
        return listing

    def _open(self, chain: TokenChain, place: int) -> tuple[BlockRun, int] | None:
        """The open run that has a block of a chain, and how many of its blocks are the chain's: 1 or more."""
        path = self._path(chain, place)
        try:
            run = open_run(path)
            if run is None:
                return None
            count = run.common(chain, place)
            if count:
                return run, count
            run.close()
            self._drop(path, DamagedRunError("it holds other blocks than its name says"))
        except DamagedRunError as damage:
            self._drop(path, damage)
        except OSError as error:
            self._note_failure("read", error)
        return None

    def _path(self, chain: TokenChain, place: int) -> Path:
        return self.folder / f"{chain.keys[place].hex()}{_SUFFIX}"

    def _drop(self, path: Path, damage: DamagedRunError) -> None:
        self._note(path.name, f"{path.name} is damaged: {damage}; it is removed, and its prompts are read anew")
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._note_failure("removed", error)

    def _note_failure(self, what: str, error: OSError) -> None:
        reason = error.strerror or str(error)
        self._note(f"{what} {error.errno}", f"a file cannot be {what}: {reason}; going on without it")

    def _note(self, key: str, message: str) -> None:
        """Log a message once."""
        if key not in self._noted:
            self._noted.add(key)
            logger.warning("prompt cache %s: %s", self.folder, message)


def _runs(numbers: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges of at most `most` consecutive ones."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1 or end - start == most:
            yield numbers[start], numbers[end - 1] + 1
            start = end


def _touch(paths: Sequence[Path]) -> None:
    """Mark the files of a chain as used, each later than those that follow it."""
    now = time.time_ns()
    for number, path in enumerate(paths):
        with suppress(OSError):  # removed meanwhile, or a folder that is read only by now
            os.utime(path, ns=(now - number * 1000, now - number * 1000))


def _write_all(file: IO[bytes], view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _own_folder(folder: str | os.PathLike[str]) -> Path:
    """Make the folder, or check the one that is there. Raises `CacheError`."""
    if not os.fspath(folder):
        raise CacheError("prompt cache: found an empty name, expected that of a folder", hint=_OTHER_NAME)
    path = Path(os.path.abspath(folder))
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except FileNotFoundError:
        raise CacheError(
            f"{path}: there is no folder {path.parent}", hint="Make it first, or give another name."
        ) from None
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None
    if stat.S_ISLNK(status.st_mode):
        raise CacheError(f"{path}: a link, expected a folder", hint="Give the name of the folder that it leads to.")
    if stat.S_ISREG(status.st_mode):
        raise _file_instead(path)
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"{path}: neither a folder nor a file, expected a folder", hint=_OTHER_NAME)
    if status.st_uid != os.geteuid():
        raise CacheError(f"{path}: belongs to another user: {status.st_uid}", hint=_OTHER_NAME)
    if status.st_mode & 0o022:
        raise CacheError(
            f"{path}: others may write to it, so that what is in it cannot be trusted",
            hint="Make it yours alone (chmod 700), or give another name.",
        )
    try:
        descriptor, probe = tempfile.mkstemp(prefix=_PARTIAL, dir=path)
        os.close(descriptor)
        os.unlink(probe)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _file_instead(path: Path) -> CacheError:
    try:
        _, metadata = read_header(path)
    except (MlxqwenError, OSError, ValueError):
        metadata = {}
    if "user.prompt_cache" in metadata:
        return CacheError(
            f"{path}: a prompt cache of an earlier version, which was a file; expected a folder",
            hint="Remove the file, or give another name: what it holds is read anew.",
        )
    return CacheError(f"{path}: a file, expected a folder", hint=_OTHER_NAME)


def _unwritable(path: Path, error: Exception) -> CacheError:
    reason = getattr(error, "strerror", None) or str(error)
    is_forbidden = isinstance(error, PermissionError)
    hint = "Check its permissions, or give another name." if is_forbidden else "To go on, give another name."
    return CacheError(f"{path}: cannot be written to: {reason}", hint=hint)
