"""Compiled tokenizers in the user's cache folder, one file each.

A file is named by the SHA-256 of the `tokenizer.json` that it is made of and by everything that its content depends on
besides: the version of its format, that of the `tokenizers` library, and the machine's byte order. It is written under
another name first, so that there is never half a file; one that is damaged is found by its checksum and made anew. Only
files that belong to this user or to root, and that nobody else may write to, are read.

Before anything is made, a note says that it was begun: whatever kills a compiler, the next start does not try again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import tokenizers

from mlxqwen.errors import TokenizerError
from mlxqwen.files.user_cache import user_cache_folder
from mlxqwen.text.tokenizer_backend.tables import DamagedTablesError, Tables

__all__ = ["CachedTokenizer", "TokenizerRemoval", "cached_tokenizers", "prune_tokenizers"]

logger = logging.getLogger("mlxqwen")

FORMAT = 2
MAX_BYTES = 256 * 2**20
MAX_SECONDS = 120
"""What compiling may take; Qwen3's tokenizer takes about four."""

_RETRY_AFTER = 86_400  # seconds behind which what was begun and never ended is tried again
_MOST_SOURCES = 16

_NAME = re.compile(r"[0-9a-f]{64}-[\w.+-]+")
_UNFINISHED = re.compile(r"[0-9a-f]{64}-[\w.+-]+\.[0-9a-f]{8}\.new")
_SOON = 60  # seconds within which an unfinished file may still be at work


@dataclass(frozen=True, slots=True)
class CachedTokenizer:
    """One file of the cache.

    Args:
        path: the file.
        source: a `tokenizer.json` that has this content, of several one that is still there.
        nbytes: on disk.
        last_used: in seconds since 1970.
        state: "ready", "not compilable" (noted, lest it be tried again), "compiling", "given up" (begun and never
            ended; tried again a day later), "unfinished", "source gone", "other version" (of mlxqwen or the tokenizers
            library), or "damaged".
    """

    path: Path
    source: str
    nbytes: int
    last_used: float
    state: str

    @property
    def is_of_use(self) -> bool:
        """Whether it will be read again as long as its source stays as it is."""
        return self.state in ("ready", "not compilable")


@dataclass(frozen=True, slots=True)
class TokenizerRemoval:
    """A file that was removed, and why."""

    tokenizer: CachedTokenizer
    reason: str


def is_switched_off() -> bool:
    return _means_off(os.environ.get("MLXQWEN_TOKENIZER_CACHE", ""))


@lru_cache
def _means_off(word: str) -> bool:
    """Any other word than these means on, which is told once."""
    if word.lower() in ("0", "off", "no", "false"):
        return True
    if word.lower() not in ("", "1", "on", "yes", "true"):
        logger.warning("MLXQWEN_TOKENIZER_CACHE: found %r, expected on or off; it is taken for on", word)
    return False


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry_path(source_digest: str) -> Path | None:
    """Where the tables of a `tokenizer.json` are kept; None where nothing can be."""
    folder = _folder()
    return None if folder is None else folder / f"{source_digest}-{_version()}"


def read_tables(path: Path, source: Path) -> Tables | None:
    """None if there are none, damaged ones, or a note that another try is due.

    Args:
        path: where they are kept.
        source: the file that they are wanted for; remembered with them.
    """
    tables = _peek(path)
    if tables is None or _is_due(tables):
        return None
    with suppress(OSError):
        known, wanted = _sources(tables), os.path.abspath(source)
        if wanted in known:
            os.utime(path)
        elif "begun" not in tables.facts:  # else its compiler is about to replace the file
            kept = [*known, wanted][-_MOST_SOURCES:]
            write_tables(path, replace(tables, facts={**tables.facts, "sources": kept}))
    return tables


def write_tables(path: Path, tables: Tables) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
            file.write(tables.pack())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def claim(path: Path, source: Path) -> bool:
    """Note that tables are about to be made; False if another process has, or if nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = _peek(path)
            if found is not None and not _is_due(found):
                return False
            write_tables(path, Tables.make({"sources": [os.path.abspath(source)], "begun": time.time()}))
        finally:
            os.close(lock)
    except OSError:
        return False
    return True


def discard(path: Path) -> None:
    """Remove tables or a note, so that the next start tries again."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def cached_tokenizers() -> list[CachedTokenizer]:
    """All files, the last used first."""
    return sorted(map(_look, _paths()), key=lambda found: (-found.last_used, found.path.name))


def prune_tokenizers(
    *, everything: bool = False, unused_days: float | None = None, dry_run: bool = False
) -> list[TokenizerRemoval]:
    """Remove files that are of no use any more.

    Args:
        everything: all others as well.
        unused_days: those as well that were not used for so many days.
        dry_run: only tell what would be removed.

    Raises:
        TokenizerError: a file cannot be removed; others are.
    """
    removals, failure = [], None
    for found in cached_tokenizers():
        reason = _reason(found, everything=everything, unused_days=unused_days)
        if reason is None:
            continue
        try:
            if not dry_run:
                found.path.unlink(missing_ok=True)
        except OSError as cause:
            failure = failure or cause
            continue
        removals.append(TokenizerRemoval(found, reason))
    if failure is not None:
        raise TokenizerError(
            f"{failure.filename}: cannot be removed: {failure.strerror}",
            hint="Check its permissions, or remove it yourself.",
        )
    return removals


def _reason(found: CachedTokenizer, *, everything: bool, unused_days: float | None) -> str | None:
    age = time.time() - found.last_used
    if found.state == "compiling" or (found.state == "unfinished" and age < _SOON):
        return None
    if not found.is_of_use:
        return found.state
    if unused_days is not None and age >= unused_days * 86_400:
        return f"unused for {int(age / 86_400)} days"
    return "all" if everything else None


def _look(path: Path) -> CachedTokenizer:
    source, state, nbytes, last_used = "unknown", "damaged", 0, 0.0
    with suppress(OSError):
        status = path.lstat()
        nbytes, last_used = status.st_blocks * 512, status.st_mtime
    if path.name.endswith(".new"):
        state = "unfinished"
    elif not path.name.endswith(f"-{_version()}"):
        state = "other version"
    else:
        tables = _peek(path)
        if tables is not None:
            sources = _sources(tables)
            there = [known for known in sources if os.path.isfile(known)]
            source = next(iter(there or sources), source)
            state = _state(tables, is_source_there=bool(there))
    return CachedTokenizer(path, source, nbytes, last_used, state)


def _state(tables: Tables, *, is_source_there: bool) -> str:
    if "begun" in tables.facts:
        return "compiling" if 0 <= _seconds_since_begin(tables) < MAX_SECONDS else "given up"
    if not is_source_there:
        return "source gone"
    return "ready" if "skeleton" in tables.facts else "not compilable"


def _sources(tables: Tables) -> list[str]:
    known = tables.facts.get("sources")
    return [source for source in known if isinstance(source, str)] if isinstance(known, list) else []


def _is_due(tables: Tables) -> bool:
    """Whether it is the note of a compiler that never came to its end, long ago."""
    return "begun" in tables.facts and not 0 <= _seconds_since_begin(tables) < _RETRY_AFTER


def _seconds_since_begin(tables: Tables) -> float:
    begun = tables.facts["begun"]
    return time.time() - begun if isinstance(begun, int | float) else -1.0


def _paths() -> Iterator[Path]:
    folder = _folder()
    if folder is None:
        return
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            known = _NAME.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name)
            if known and entry.is_file(follow_symlinks=False):
                yield folder / entry.name


def _peek(path: Path) -> Tables | None:
    """The tables or the note of a file; None if there are none, damaged ones, or somebody else's."""
    try:
        return Tables.unpack(_read(path))
    except (OSError, DamagedTablesError):
        return None


def _read(path: Path) -> bytes:
    """A file of the cache; a link could lead anywhere, and somebody else's tables decide what a text becomes."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        others_may_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(status.st_mode) or others_may_write or status.st_uid not in (0, os.getuid()):
            raise PermissionError(f"{path}: not a file of this user's alone")
        return file.read(MAX_BYTES)


def _folder() -> Path | None:
    cache = user_cache_folder()
    if cache is None or os.path.islink(cache / "tokenizers"):
        return None
    return cache / "tokenizers"


def _version() -> str:
    return f"{FORMAT}-{tokenizers.__version__}-{sys.byteorder}"
