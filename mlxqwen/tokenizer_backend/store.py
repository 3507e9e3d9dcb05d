"""Compiled tokenizers in the user's cache folder, one file each.

A file is named by the SHA-256 of the `tokenizer.json` that it is made of and by everything that its content depends on
besides: the version of its format, that of the `tokenizers` library, and the machine's byte order. It is written under
another name first, so that there is never half a file; one that is damaged is found by its checksum and made anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from mlxqwen.errors import TokenizerError
from mlxqwen.tokenizer_backend.tables import DamagedTablesError, Tables
from mlxqwen.user_cache import user_cache_folder

__all__ = ["CachedTokenizer", "TokenizerRemoval", "cached_tokenizers", "prune_tokenizers"]

FORMAT = 1
MAX_BYTES = 256 * 2**20

_NAME = re.compile(r"[0-9a-f]{64}-[\w.+-]+")
_UNFINISHED = re.compile(r"[0-9a-f]{64}-[\w.+-]+\.[0-9a-f]{8}\.new")
_SOON = 60  # seconds within which an unfinished file may still be at work


@dataclass(frozen=True, slots=True)
class CachedTokenizer:
    """One file of the cache.

    Args:
        path: the file.
        source: the `tokenizer.json` that it was made of.
        nbytes: on disk.
        last_used: in seconds since 1970.
        state: "ready", "not compilable" (noted, lest it be tried again), "unfinished", "source gone", "other version"
            (of mlxqwen or the tokenizers library), or "damaged".
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
    return os.environ.get("MLXQWEN_TOKENIZER_CACHE", "").lower() in ("0", "off", "no", "false")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry_path(source_digest: str) -> Path | None:
    """Where the tables of a `tokenizer.json` are kept; None where nothing can be."""
    folder = _folder()
    return None if folder is None else folder / f"{source_digest}-{_version()}"


def read_tables(path: Path) -> Tables | None:
    """None if there are none, or damaged ones."""
    try:
        tables = Tables.unpack(_read(path))
    except (OSError, DamagedTablesError):
        return None
    with suppress(OSError):
        os.utime(path)
    return tables


def write_tables(path: Path, tables: Tables) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with new.open("xb") as file:
            file.write(tables.pack())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def is_writable(path: Path) -> bool:
    """Whether `write_tables` could write to it; its folder is made."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.access(path.parent, os.W_OK | os.X_OK)
    return False


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
    if found.state == "unfinished" and age < _SOON:
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
        with suppress(OSError, DamagedTablesError):
            facts = Tables.unpack(_read(path)).facts
            source = str(facts.get("source", source))
            state = (
                "source gone" if not os.path.isfile(source) else "ready" if "skeleton" in facts else "not compilable"
            )
    return CachedTokenizer(path, source, nbytes, last_used, state)


def _paths() -> Iterator[Path]:
    folder = _folder()
    if folder is None:
        return
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            known = _NAME.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name)
            if known and entry.is_file(follow_symlinks=False):
                yield folder / entry.name


def _read(path: Path) -> bytes:
    """A file of the cache; a link could lead anywhere."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        return file.read(MAX_BYTES)


def _folder() -> Path | None:
    cache = user_cache_folder()
    if cache is None or os.path.islink(cache / "tokenizers"):
        return None
    return cache / "tokenizers"


def _version() -> str:
    return f"{FORMAT}-{tokenizers.__version__}-{sys.byteorder}"
