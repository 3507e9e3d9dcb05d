"""The list of converted models in the user's cache folder, and the removal of those that are of no use any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlxqwen
from mlxqwen.files.store import Entry, is_own
from mlxqwen_convert.cache_entry import CacheEntry, Source, store
from mlxqwen_convert.errors import OutputError, SourceError

__all__ = ["CachedModel", "Removal", "cache_folder", "cached_models", "prune", "remove_made_of"]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One entry of the cache.

    Args:
        folder: the entry's own.
        source: hub id and commit, or path, of what it is made of.
        source_folder: where that is, or was.
        format: the source's.
        target: what it becomes.
        model: the converted model's folder.
        nbytes: on disk.
        last_used: in seconds since 1970.
        state: "ready", "converting", "unfinished", "source gone", "source changed", "other version" (of mlxqwen),
            "damaged", "not yours alone" (others own it, or may write to it), or "half removed".
    """

    folder: Path
    source: str
    source_folder: str
    format: str
    target: str
    model: Path
    nbytes: int
    last_used: float
    state: str

    @property
    def source_exists(self) -> bool:
        """Whether the source is still there, changed or not."""
        return bool(self.source_folder) and (Path(self.source_folder) / "config.json").exists()

    @property
    def is_of_use(self) -> bool:
        """Whether it will be loaded again as long as its source stays as it is."""
        return self.state in ("ready", "converting")


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of an entry that was to be removed: its reason, and whether somebody converts or loads it."""

    model: CachedModel
    reason: str
    in_use: bool = False


def cache_folder() -> Path:
    """The folder of all caches; see `user_cache_folder`. Raises `OutputError`: the user has no home."""
    return store().folder.parent


def cached_models() -> list[CachedModel]:
    """All entries, the last used first."""
    found = [_look(entry) for entry in store().entries()]
    return sorted(found, key=lambda model: (-model.last_used, model.folder.name))


def remove_made_of(folders: Collection[Path], *, dry_run: bool = False) -> list[Removal]:
    """Remove what was converted from one of these folders; what somebody loads or converts is left, and told.

    Raises `OutputError` for an entry that cannot be removed; others are.
    """
    wanted = {str(folder) for folder in folders}

    def reason(model: CachedModel) -> str | None:
        return "source removed" if model.source_folder in wanted else None

    return _remove(reason, dry_run)


def prune(*, everything: bool = False, unused_days: float | None = None, dry_run: bool = False) -> list[Removal]:
    """Remove entries that are of no use any more: their source is gone or changed, or they were never finished.

    Args:
        everything: all others as well.
        unused_days: those as well that were not used for so many days.
        dry_run: only tell what would be removed.

    Raises:
        OutputError: an entry cannot be removed; others are.
    """
    return _remove(lambda model: _reason(model, everything=everything, unused_days=unused_days), dry_run)


def _remove(reason_of: Callable[[CachedModel], str | None], dry_run: bool) -> list[Removal]:
    removals: list[Removal] = []
    failure: OutputError | None = None
    for entry in sorted(store().entries(), key=lambda entry: (-entry.last_used, entry.folder.name)):
        with entry.tried() as is_free:
            model = _look(entry, is_converting=False if is_free else None)
            reason = reason_of(model)
            if reason is None:
                continue
            try:
                if is_free and not dry_run and not entry.remove():
                    continue  # another process has
            except OutputError as error:
                failure = failure or error
                continue
            removals.append(Removal(model, reason, in_use=not is_free))
    if failure is not None:
        raise failure
    return removals


def _reason(model: CachedModel, *, everything: bool, unused_days: float | None) -> str | None:
    if not model.is_of_use:
        return model.state
    if unused_days is not None:
        days = (time.time() - model.last_used) / 86_400
        if days >= unused_days:
            return f"unused for {int(days)} days"
    return "all" if everything else None


def _look(entry: Entry, *, is_converting: bool | None = None) -> CachedModel:
    """What is known of an entry; `is_converting` tells whether somebody is at that, where it is known."""
    record = entry.read_record() or {}
    words = {key: value for key, value in record.items() if isinstance(value, str)}
    name = words.get("name", "")
    model = CacheEntry(entry, name if Path(name).name == name and name else "unknown")
    if is_converting is None:
        with entry.tried(shared=True) as is_free:
            is_converting = not is_free
    return CachedModel(
        folder=entry.folder,
        source=words.get("source", "unknown"),
        source_folder=words.get("folder", ""),
        format=words.get("format", "unknown"),
        target=words.get("target", "unknown"),
        model=model.folder,
        nbytes=entry.nbytes,
        last_used=entry.last_used,
        state="converting" if is_converting else _state_of(model, words),
    )


def _state_of(model: CacheEntry, record: Mapping[str, str]) -> str:
    if model.entry.is_half_removed:
        return "half removed"
    if not is_own(model.entry.folder):
        return "not yours alone"
    source = Path(record.get("folder", ""))
    if not record.get("folder"):
        return "damaged"
    if not (source / "config.json").exists():
        return "source gone"
    if record.get("mlxqwen") != mlxqwen.__version__:
        return "other version"
    try:
        if Source.of(source).key() != model.entry.folder.name:
            return "source changed"
    except SourceError:
        return "source changed"
    if model.is_whole():
        return "ready"
    return "damaged" if model.folder.exists() else "unfinished"
