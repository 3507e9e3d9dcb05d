"""Checkpoints that are converted once, when they are first loaded, and kept in the user's cache folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxqwen.errors import one_line
from mlxqwen_convert.cache_entry import OPTIONS, CacheEntry, Source, store
from mlxqwen_convert.conversion import Progress, convert
from mlxqwen_convert.errors import DiskFullError, OutputError, ResumeError, SourceChangedError
from mlxqwen_convert.formats import mlx_dtype
from mlxqwen_convert.plan import Plan, make_plan
from mlxqwen_convert.sizes import size_of
from mlxqwen_convert.target_files import unwritable

__all__ = ["Conversion", "ModelSize", "converted", "find_or_plan", "planned"]

logger = logging.getLogger("mlxqwen")

Turn = Callable[[], AbstractContextManager[object] | None]

ModelSize = tuple[mx.Dtype, int, int]
"""The dtype of a model's numbers, the bytes of its packed codes, and how many numbers there are."""

_ELSEWHERE = "Set MLXQWEN_CACHE to another folder, or choose one yourself: mlxqwen convert SOURCE OUTPUT"
_MORE_ROOM = "Free some space, for example by mlxqwen cache prune, or set MLXQWEN_CACHE to a folder on a larger disk."
_KEPT = " What is written is kept: the next start goes on from it."


def planned(folder: Path) -> tuple[ModelSize, tuple[str, ...]]:
    """The size of what `converted` would make, and a note for each thing that it would tell of the source.

    Raises:
        MlxqwenError: the checkpoint cannot be converted.
    """
    plan = make_plan(folder, OPTIONS)
    return _size(plan), plan.source_notes


def converted(folder: Path, *, progress: Progress | None = None, held: ExitStack | None = None) -> Path:
    """The MLX form of a checkpoint, made with default options unless it is in the cache.

    Another state of the source or another version of the converter has another place. An interrupted conversion goes
    on; where another process is at it, it is waited for. One line of the log tells of either, others of what was left
    aside or lost.

    Args:
        folder: the checkpoint.
        progress: see `mlxqwen_convert.convert`.
        held: to be closed when the model has been read; until then no `prune` removes it.

    Raises:
        MlxqwenError: the checkpoint cannot be converted, or the cache not be written to.
    """
    return find_or_plan(folder, held).run(progress)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint's MLX form: found in the cache, or planned, and nothing of it written yet.

    Args:
        size: of the model that `run` will make; None if it is in the cache.
        turn: gives that of `convert` when it begins.
    """

    source: Source
    model: CacheEntry
    facts: Mapping[str, Any]
    size: ModelSize | None
    held: ExitStack | None
    turn: Turn | None = None

    def run(self, progress: Progress | None = None) -> Path:
        """The folder of the MLX form, made if need be. Errors are those of `converted`."""
        entry = self.model.entry
        if self.size is not None:
            while not entry.hold(self.model.is_whole, self.held):
                with _way_out(self.model), entry.locked(self._tell_of_waiting):
                    if not self.model.is_whole():
                        self._make(progress)
        return self.model.folder

    def _tell_of_waiting(self) -> None:
        logger.warning("%s: another process is converting it, waiting for that to end", self.source.label)

    def _convert(self, progress: Progress | None) -> None:
        """An adapter is not asked for here: whoever loads has decided before."""
        turn = None if self.turn is None else self.turn()
        convert(self.source.folder, self.model.folder, resume=True, ignore_adapter=True, progress=progress, turn=turn)

    def _make(self, progress: Progress | None) -> None:
        model, entry = self.model, self.model.entry
        try:
            if model.settle():
                return
            goes_on = model.partial.is_dir()
            entry.write_record({**self.source.facts(), **self.facts, "name": model.name})
            logger.warning(
                "%s (%s) is converted once, to %s (%s), and kept in %s%s",
                self.source.label,
                self.facts["format"],
                self.facts["target"],
                size_of(self.facts["bytes"]),
                entry.folder,
                "; this goes on where it was interrupted" if goes_on else "",
            )
            try:
                self._convert(progress)
            except ResumeError:  # of another version of MLX, or damaged
                entry.clear(model.partial)
                self._convert(progress)
            if self.source.key() != entry.folder.name:
                entry.clear(model.folder)
                raise SourceChangedError(
                    f"{self.source.folder}: changed while it was converted, expected the same files throughout",
                    hint="Load it again when nothing writes to it.",
                )
            model.settle()
        finally:
            if not model.folder.is_dir() and not model.partial.is_dir():
                entry.remove()


def find_or_plan(folder: Path, held: ExitStack | None = None, turn: Turn | None = None) -> Conversion:
    """Find the MLX form of a checkpoint in the cache, or else plan it; nothing is written.

    Args:
        folder: the checkpoint.
        held: see `converted`.
        turn: see `Conversion`.

    Raises:
        MlxqwenError: the checkpoint cannot be converted.
    """
    source = Source.of(folder)
    model = CacheEntry(store().entry(source.key()), f"{source.short_name}-mlx")
    if model.entry.hold(model.is_whole, held):
        model.touch(source)
        _tell((model.entry.read_record() or {}).get("notes"))
        return Conversion(source, model, {}, None, held)
    plan = make_plan(folder, OPTIONS)
    _tell(plan.source_notes)
    target = plan.target
    facts = {
        "format": plan.source.label,
        "target": "unquantized" if target is None else f"MLX {target.bits}-bit, groups of {target.group_size}",
        "bytes": plan.target_bytes,
        "notes": plan.source_notes,
    }
    return Conversion(source, model, facts, _size(plan), held, turn)


def _tell(notes: object) -> None:
    """Log notes, which may come from the record of an earlier conversion."""
    for note in notes if isinstance(notes, list | tuple) else ():
        logger.warning("%s", one_line(str(note)))


def _size(plan: Plan) -> ModelSize:
    outputs = [tensor for planned in plan.modules for tensor in planned.outputs]
    packed = sum(tensor.nbytes for tensor in outputs if tensor.dtype == "U32")
    dtype = mlx_dtype(plan.dtype)
    return dtype, packed, (sum(tensor.nbytes for tensor in outputs) - packed) // dtype.size


@contextmanager
def _way_out(model: CacheEntry) -> Iterator[None]:
    """Errors of a target that the user did not choose say how to choose another."""
    try:
        try:
            yield
        except OSError as cause:
            raise unwritable(model.entry.folder, cause) from None
    except DiskFullError as error:
        raise DiskFullError(error.problem, hint=_MORE_ROOM + (_KEPT if model.partial.is_dir() else "")) from None
    except OutputError as error:
        raise OutputError(error.problem, hint=_ELSEWHERE) from None
