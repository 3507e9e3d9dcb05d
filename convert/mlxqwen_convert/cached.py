"""Checkpoints that are converted once, when they are first loaded, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxqwen_convert.conversion import Progress, convert, versions
from mlxqwen_convert.errors import OutputError
from mlxqwen_convert.source_files import file_state

__all__ = ["CachedModel", "cache_folder", "cached_models", "converted", "prune"]

logger = logging.getLogger("mlxqwen")

_SOURCE_SUFFIX = ".source"
_PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One entry of the cache.

    Args:
        folder: what was converted; may be unfinished.
        source: the folder that it was made of.
        size: bytes on disk.
        finished: whether it is whole.
    """

    folder: Path
    source: Path
    size: int
    finished: bool

    @property
    def is_stale(self) -> bool:
        """Whether it is unfinished or its source is gone."""
        return not self.finished or not self.source.is_dir()


def cache_folder() -> Path:
    """`$MLXQWEN_CACHE`, or `mlxqwen` in the system's folder for a user's caches."""
    chosen = os.environ.get("MLXQWEN_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxqwen"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxqwen"


def converted(folder: Path, progress: Progress | None = None) -> Path:
    """The MLX form of a checkpoint, made with default options if it is not in the cache yet.

    Another version of the weights or of the converter has another place. An interrupted conversion is taken up again.

    Raises:
        MlxqwenError: the checkpoint cannot be converted, or the cache not be written to.
    """
    target = cache_folder() / _name(folder)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(target.name + _SOURCE_SUFFIX).write_text(str(folder.resolve()), encoding="utf-8")
    except OSError as cause:
        raise OutputError(
            f"{target.parent}: cannot be written: {cause.strerror}", hint="Set MLXQWEN_CACHE to another folder."
        ) from None
    logger.warning("%s is converted once into %s", folder, target)
    convert(folder, target, resume=True, progress=progress)
    return target


def cached_models() -> Iterator[CachedModel]:
    """All entries, by name."""
    for path in sorted(cache_folder().glob(f"*{_SOURCE_SUFFIX}")):
        whole = path.with_name(path.name.removesuffix(_SOURCE_SUFFIX))
        folder = whole if whole.is_dir() else whole.with_name(whole.name + _PARTIAL_SUFFIX)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield CachedModel(folder, Path(path.read_text(encoding="utf-8")), size, whole.is_dir())


def prune(*, everything: bool = False) -> list[CachedModel]:
    """Remove what is unfinished or has lost its source, or all; what was removed."""
    removed = [model for model in cached_models() if everything or model.is_stale]
    for model in removed:
        name = model.folder.name.removesuffix(_PARTIAL_SUFFIX)
        shutil.rmtree(model.folder, ignore_errors=True)
        model.folder.with_name(name + _SOURCE_SUFFIX).unlink(missing_ok=True)
    return removed


def _name(folder: Path) -> str:
    """Of the source's place, the state of its files and the versions that its form depends on."""
    real = folder.resolve()
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    states = [[path.name, *file_state(path)] for path in weights]
    digest = hashlib.sha256(json.dumps([str(real), states, versions()]).encode()).hexdigest()[:12]
    hub = next((part for part in real.parts if part.startswith("models--")), "")
    name = hub.rpartition("--")[2] or real.name
    return f"{name}-{digest}"
