"""Checkpoints that are converted once, when they are first loaded, and kept in the user's cache folder.

An entry is a folder named by a key: of the source, the state of its files, the converter's version and its options.

    converted/KEY/entry.json          what it is made of; changed when the entry is used
                  lock                held alone while somebody converts or removes, shared while somebody loads
                  NAME-mlx/           the model, absent or whole
                  NAME-mlx.partial/   the model while it is made

What is to be removed first gets a name under which nothing is looked for, then loses its `config.json`, then the rest:
at no moment is there half a model that could be taken for a whole one. Links are never followed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlxqwen
from mlxqwen.files.checkpoint import INDEX_NAME
from mlxqwen.files.checkpoint.writing import sync_descriptor
from mlxqwen.files.json_file import read_json_object
from mlxqwen.files.user_cache import user_cache_folder
from mlxqwen_convert.companions import companion_files
from mlxqwen_convert.conversion import Progress, convert
from mlxqwen_convert.errors import DiskFullError, OutputError, ResumeError, SourceChangedError, SourceError
from mlxqwen_convert.formats import mlx_dtype
from mlxqwen_convert.pipeline import unwritable
from mlxqwen_convert.plan import Options, Plan, make_plan
from mlxqwen_convert.sizes import size_of
from mlxqwen_convert.source_files import file_state

__all__ = ["CachedModel", "Removal", "cache_folder", "cached_models", "converted", "planned_size", "prune"]

logger = logging.getLogger("mlxqwen")

CheckSize = Callable[[mx.Dtype, int, int], None]
"""Called with the dtype of the numbers of a model, the bytes of its packed codes, and how many numbers there are."""

_OPTIONS = Options()
_KEY = re.compile(r"[0-9a-f]{16}")
_REMOVED = re.compile(r"removed-[0-9a-f]{16}-[0-9a-f]{8}")
_RECORD, _LOCK = "entry.json", "lock"
_ELSEWHERE = "Set MLXQWEN_CACHE to another folder, or choose one yourself: mlxqwen convert SOURCE OUTPUT"
_MORE_ROOM = "Free some space, for example by mlxqwen cache prune, or set MLXQWEN_CACHE to a folder on a larger disk."
_KEPT = " What is written is kept: the next start goes on from it."


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
            "damaged", or "half removed".
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
    """`$MLXQWEN_CACHE`, or `mlxqwen` in the folder for a user's caches: `$XDG_CACHE_HOME`, or the system's.

    Raises:
        OutputError: the user has no home.
    """
    folder = user_cache_folder()
    if folder is None:
        raise OutputError("no home folder found to keep converted models in", hint=_ELSEWHERE)
    return folder


def planned_size(folder: Path) -> tuple[mx.Dtype, int, int]:
    """What `converted` would make: dtype of the numbers, bytes of packed codes, and how many numbers there are.

    Raises:
        MlxqwenError: the checkpoint cannot be converted.
    """
    return _size(make_plan(folder, _OPTIONS))


def _size(plan: Plan) -> tuple[mx.Dtype, int, int]:
    outputs = [tensor for planned in plan.modules for tensor in planned.outputs]
    packed = sum(tensor.nbytes for tensor in outputs if tensor.dtype == "U32")
    dtype = mlx_dtype(plan.dtype)
    return dtype, packed, (sum(tensor.nbytes for tensor in outputs) - packed) // dtype.size


def converted(
    folder: Path, *, check: CheckSize | None = None, progress: Progress | None = None, held: ExitStack | None = None
) -> Path:
    """The MLX form of a checkpoint, made with default options unless it is in the cache.

    Another state of the source or another version of the converter has another place. An interrupted conversion goes
    on; where another process is at it, it is waited for. One line of the log tells of either.

    Args:
        folder: the checkpoint.
        check: called before anything is written, if there is something to convert.
        progress: see `mlxqwen_convert.convert`.
        held: to be closed when the model has been read; until then no `prune` removes it.

    Raises:
        MlxqwenError: the checkpoint cannot be converted, or the cache not be written to.
    """
    source = _Source.of(folder)
    entry = _Entry(_converted_folder() / source.key(), f"{source.short_name}-mlx")
    if _hold(entry, held):
        entry.touch(source)
        return entry.model
    plan = make_plan(folder, _OPTIONS)
    if check is not None:
        check(*_size(plan))
    facts = {
        "format": plan.source.label,
        "target": "unquantized"
        if plan.target is None
        else f"MLX {plan.target.bits}-bit, groups of {plan.target.group_size}",
        "bytes": plan.target_bytes,
    }
    del plan  # for tens of thousands of tensors it is not small, and there will be another
    while not _hold(entry, held):
        with _way_out(entry), _locked(entry, source):
            if not entry.is_whole():
                _convert(folder, source, entry, facts, progress)
    return entry.model


def _convert(folder: Path, source: _Source, entry: _Entry, facts: Mapping[str, Any], progress: Progress | None) -> None:
    try:
        if entry.settle():
            return
        goes_on = entry.partial.is_dir()
        entry.write_record({**source.facts(), **facts, "name": entry.name})
        logger.warning(
            "%s (%s) is converted once, to %s (%s), and kept in %s%s",
            source.label,
            facts["format"],
            facts["target"],
            size_of(facts["bytes"]),
            entry.folder,
            "; this goes on where it was interrupted" if goes_on else "",
        )
        try:
            convert(folder, entry.model, resume=True, progress=progress)
        except ResumeError:  # of another version of MLX, or damaged
            _remove(entry.partial, entry.folder)
            convert(folder, entry.model, resume=True, progress=progress)
        if source.key() != entry.folder.name:
            _remove(entry.model, entry.folder)
            raise SourceChangedError(
                f"{folder}: changed while it was converted, expected the same files throughout",
                hint="Load it again when nothing writes to it.",
            )
        entry.settle()
    finally:
        if not entry.model.is_dir() and not entry.partial.is_dir():
            _remove(entry.folder, entry.folder.parent)


def cached_models() -> list[CachedModel]:
    """All entries, the last used first."""
    found = [_look(folder) for folder in _entry_folders()]
    return sorted(found, key=lambda model: (-model.last_used, model.folder.name))


def prune(*, everything: bool = False, unused_days: float | None = None, dry_run: bool = False) -> list[Removal]:
    """Remove entries that are of no use any more: their source is gone or changed, or they were never finished.

    Args:
        everything: all others as well.
        unused_days: those as well that were not used for so many days.
        dry_run: only tell what would be removed.

    Raises:
        OutputError: an entry cannot be removed; others are.
    """
    removals: list[Removal] = []
    failure: OutputError | None = None
    for model in cached_models():
        with _trial_lock(model.folder) as is_free:
            current = _look(model.folder, is_converting=False if is_free else None)
            reason = _reason(current, everything=everything, unused_days=unused_days)
            if reason is None:
                continue
            try:
                if is_free and not dry_run:
                    _remove(current.folder, current.folder.parent)
            except OutputError as error:
                failure = failure or error
                continue
            removals.append(Removal(current, reason, in_use=not is_free))
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


@dataclass(frozen=True, slots=True)
class _Source:
    """What is converted.

    Args:
        folder: without links.
        name: hub id or path.
        commit: of a hub id.
    """

    folder: Path
    name: str
    commit: str

    @classmethod
    def of(cls, folder: Path) -> _Source:
        real = folder.resolve()
        repository, snapshots, commit = ("", *real.parts)[-3:] if len(real.parts) > 2 else ("", "", "")
        if repository.startswith("models--") and snapshots == "snapshots":
            return cls(real, repository.removeprefix("models--").replace("--", "/", 1), commit)
        return cls(real, str(real), "")

    @property
    def label(self) -> str:
        return f"{self.name}@{self.commit[:7]}" if self.commit else self.name

    @property
    def short_name(self) -> str:
        """Fit for a folder's name."""
        return re.sub(r"[^\w.-]+", "_", self.name.rpartition("/")[2], flags=re.ASCII).lstrip(".")[:80] or "model"

    def facts(self) -> dict[str, str]:
        """For the entry's record; a name that is no UTF-8 is spelled out."""
        facts = {"source": self.label, "folder": str(self.folder), "mlxqwen": mlxqwen.__version__}
        return {key: os.fsencode(value).decode("utf-8", "backslashreplace") for key, value in facts.items()}

    def key(self) -> str:
        """Raises `SourceError` where a file cannot be read."""
        names = {path.name for path in self.folder.glob("*.safetensors")} | {"config.json"}
        names |= {str(path) for path in companion_files(self.folder)}
        names |= {INDEX_NAME} if (self.folder / INDEX_NAME).exists() else set()
        states = [[name, *_state(self.folder / name)] for name in sorted(names)]
        parts = [self.name, self.commit, states, mlxqwen.__version__, asdict(_OPTIONS)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _state(path: Path) -> tuple[int, int | str]:
    """Size, and time of change in nanoseconds; of a file in the hub's cache the name, which is that of its content."""
    size, changed, _ = file_state(path)
    real = path.resolve()
    return size, real.name if real.parent.name == "blobs" else changed


@dataclass(frozen=True, slots=True)
class _Entry:
    folder: Path
    name: str

    @property
    def model(self) -> Path:
        return self.folder / self.name

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.name}.partial"

    def is_whole(self) -> bool:
        """Whether the model is there, with all its files in the sizes that they were written in."""
        sizes = (_read_record(self.folder) or {}).get("files")
        return isinstance(sizes, dict) and "config.json" in sizes and sizes == self._sizes()

    def settle(self) -> bool:
        """Note the files of a finished model; remove a damaged one. Whether there is a whole one now."""
        record = _read_record(self.folder)
        if not self.model.is_dir():
            return False
        if record is None or "files" in record or not (self.model / "config.json").is_file():
            _remove(self.model, self.folder)
            return False
        self.write_record({**record, "files": self._sizes()})
        return True

    def touch(self, source: _Source) -> None:
        """Note that it is used, and where the same model of the hub was found now; a cache may be read-only."""
        with suppress(OSError, OutputError):
            record, facts = _read_record(self.folder), source.facts()
            if record is not None and record.get("folder") != facts["folder"]:
                self.write_record({**record, **facts})
            os.utime(self.folder / _RECORD)

    def write_record(self, record: Mapping[str, Any]) -> None:
        path = self.folder / _RECORD
        new = path.with_name(f"{_RECORD}.{secrets.token_hex(4)}")
        try:
            with new.open("x", encoding="utf-8") as file:
                file.write(json.dumps(record, indent=1) + "\n")
                file.flush()
                sync_descriptor(file.fileno())
            new.replace(path)
        except OSError as cause:
            new.unlink(missing_ok=True)
            raise unwritable(path, cause) from None

    def _sizes(self) -> dict[str, int]:
        try:
            files = [path for path in self.model.rglob("*") if path.is_file()]
            return {str(path.relative_to(self.model)): path.stat().st_size for path in files}
        except OSError:  # removed meanwhile
            return {}


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(folder / _RECORD, error=SourceError, max_bytes=1 << 20)
    except SourceError:
        return None


def _converted_folder() -> Path:
    """Where the entries are; raises `OutputError` for a link, which could lead anywhere."""
    folder = cache_folder() / "converted"
    if os.path.islink(folder):  # other than Path's, it takes what cannot be looked at for none
        raise OutputError(f"{folder}: a link, expected a folder", hint="Set MLXQWEN_CACHE to where it leads.")
    return folder


def _entry_folders() -> Iterator[Path]:
    folder = _converted_folder()
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    except OSError as cause:
        raise OutputError(
            f"{folder}: cannot be read: {cause.strerror}",
            hint="Check its permissions, or set MLXQWEN_CACHE to another folder.",
        ) from None
    for entry in entries:
        if _KEY.fullmatch(entry.name) or _REMOVED.fullmatch(entry.name):
            yield folder / entry.name


def _look(folder: Path, *, is_converting: bool | None = None) -> CachedModel:
    """What is known of an entry; `is_converting` tells whether somebody is at that, where it is known."""
    record = _read_record(folder) or {}
    words = {key: value for key, value in record.items() if isinstance(value, str)}
    name = words.get("name", "")
    entry = _Entry(folder, name if Path(name).name == name and name else "unknown")
    if is_converting is None:
        with _trial_lock(folder, fcntl.LOCK_SH) as is_free:
            is_converting = not is_free
    try:
        last_used = (folder / _RECORD).lstat().st_mtime
    except OSError:
        last_used = 0.0
    return CachedModel(
        folder=folder,
        source=words.get("source", "unknown"),
        source_folder=words.get("folder", ""),
        format=words.get("format", "unknown"),
        target=words.get("target", "unknown"),
        model=entry.model,
        nbytes=_disk_bytes(folder),
        last_used=last_used,
        state="converting" if is_converting else _state_of(entry, words),
    )


def _state_of(entry: _Entry, record: Mapping[str, str]) -> str:
    if not _KEY.fullmatch(entry.folder.name):
        return "half removed"
    source = Path(record.get("folder", ""))
    if not record.get("folder"):
        return "damaged"
    if not (source / "config.json").exists():
        return "source gone"
    if record.get("mlxqwen") != mlxqwen.__version__:
        return "other version"
    try:
        if _Source.of(source).key() != entry.folder.name:
            return "source changed"
    except SourceError:
        return "source changed"
    if entry.is_whole():
        return "ready"
    return "damaged" if entry.model.exists() else "unfinished"


def _disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder take, links not followed."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


@contextmanager
def _locked(entry: _Entry, source: _Source) -> Iterator[None]:
    """Hold the entry alone; whoever else converts is waited for, with a line in the log."""
    while True:
        try:
            entry.folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open_lock(entry.folder)
        except OSError as cause:
            raise unwritable(entry.folder, cause) from None
        if descriptor is None:
            continue
        try:
            _take(descriptor, source)
            # Whoever held the lock may have removed the entry since the file was opened.
            if _is_at(descriptor, entry.folder / _LOCK):
                yield
                return
        finally:
            os.close(descriptor)


def _open_lock(folder: Path) -> int | None:
    """None if the entry was removed since it was made."""
    try:
        return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:
        return None


def _take(descriptor: int, source: _Source) -> None:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: another process is converting it, waiting for that to end", source.label)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as cause:  # a file system that has no locks
        raise OutputError(f"{cache_folder()}: cannot be locked: {cause.strerror}") from None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (held.st_ino, held.st_dev) == (found.st_ino, found.st_dev)


def _hold(entry: _Entry, held: ExitStack | None) -> bool:
    """Whether the model is there, whole; if so, whoever removes what nobody uses leaves it alone until `held` closes.

    A file system without locks, or a lock that cannot be opened, holds nothing back.
    """
    if not entry.is_whole():
        return False
    with ExitStack() as shared:
        try:
            # Created where it is missing, yet opened to be read: a cache may be read-only.
            flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(entry.folder / _LOCK, flags, 0o644)
            shared.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            is_held = _is_at(descriptor, entry.folder / _LOCK)
        except OSError:
            is_held = True
        if not is_held or not entry.is_whole():  # removed while the lock was waited for
            return False
        if held is not None:
            held.push(shared.pop_all())
    return True


@contextmanager
def _trial_lock(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Whether nobody else holds an entry in a way that excludes this one; if so, nobody will until the end."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # no lock, so nobody holds it
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            is_free = True
        except OSError:
            is_free = False
        yield is_free
    finally:
        os.close(descriptor)


def _remove(folder: Path, parent: Path) -> None:
    """Remove a folder, links unfollowed, so that it never looks like a model on the way."""
    hidden = parent / f"removed-{secrets.token_hex(8)}-{secrets.token_hex(4)}"
    try:
        if not folder.is_dir() or folder.is_symlink():
            folder.unlink(missing_ok=True)
            return
        if not _REMOVED.fullmatch(folder.name):
            folder = folder.rename(hidden)
        inner = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        for place in (folder, *inner):
            (place / "config.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as cause:
        raise OutputError(
            f"{folder}: cannot be removed: {cause.strerror}", hint="Check its permissions, or remove it yourself."
        ) from None


@contextmanager
def _way_out(entry: _Entry) -> Iterator[None]:
    """Errors of a target that the user did not choose say how to choose another."""
    try:
        yield
    except DiskFullError as error:
        raise DiskFullError(error.problem, hint=_MORE_ROOM + (_KEPT if entry.partial.is_dir() else "")) from None
    except OutputError as error:
        raise OutputError(error.problem, hint=_ELSEWHERE) from None
