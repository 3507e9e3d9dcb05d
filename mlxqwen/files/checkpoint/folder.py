"""A model's folder → a table of its tensors: which files make it up, and whether they are complete.

One file, as index, files and names are held to each other.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from mlxqwen.errors import CheckpointError, MlxqwenError, UnsupportedFormatError
from mlxqwen.files.adapters import adapter_alone
from mlxqwen.files.checkpoint.safetensors_file import (
    MAX_NAME_LENGTH,
    TensorInfo,
    opened,
    read_exactly,
    read_header,
)
from mlxqwen.files.json_file import read_json_object, shown
from mlxqwen.files.tensor_names import foreign_prefix, without_wrappers

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
WEIGHT_PREFIXES = ("model", "weights")
WITHOUT_INDEX = "Take the index that was written with these weights, or none: files named model*.safetensors are found."
SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


class Checkpoint:
    """The tensors of a model's folder, validated, none of them read yet.

    Attributes:
        folder: where it was opened.
        tensors: name → `TensorInfo`, shard by shard in the order of their bytes; names are without the prefixes that
            wrappers add.
        metadata: the files' own key → value strings; the first shard wins.
        notes: one line for each thing that was left aside or is otherwise than the index says.
        absent: the files that the index names and the folder lacks.
        unnamed: the tensors that the index does not name.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorInfo],
        metadata: dict[str, str],
        notes: list[str],
        *,
        absent: Collection[str] = (),
        unnamed: Collection[str] = (),
    ) -> None:
        tensors, note = unwrapped(folder, tensors)
        self.folder = folder
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self.notes = (*notes, *note)
        self.absent = tuple(absent)
        self.unnamed = frozenset(map(without_wrappers, unnamed))

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Finds the weight files of a folder and validates their headers.

        The files are `model.safetensors`, else all of `model*.safetensors` (or `weights*.safetensors`), unless
        `model.safetensors.index.json` names others that are there. What the files hold counts: an index decides which
        files, and where a tensor is in two of them; one that cannot be read is left aside where the files are whole.

        Raises:
            CheckpointError: files missing, damaged, incomplete, or outside the folder.
            UnsupportedFormatError: weights in a foreign format.
        """
        opened_before = _OPENED.by_folder
        if opened_before is not None and folder in opened_before:
            return opened_before[folder]
        if not os.path.isdir(folder):
            raise CheckpointError(f"{folder}: no such folder", hint="Give the folder that holds the model.")
        index = folder / INDEX_NAME
        if os.path.lexists(index):
            checkpoint = open_beside_index(folder, index)
        else:
            checkpoint = open_unindexed(folder, weight_files(folder))
        if not checkpoint.tensors:
            raise CheckpointError(f"{folder}: the weight files hold no tensors, expected those of a model")
        if opened_before is not None:
            opened_before[folder] = checkpoint
        return checkpoint

    def lacks(self, names: Collection[str]) -> CheckpointError:
        """The error for tensors that a model needs and no file holds: it says where they should have been."""
        if self.absent:
            return absent_files(self.folder, self.absent)
        shown = some_of(list(names))
        prefix = foreign_prefix(self.tensors, names)
        if prefix is None:
            return CheckpointError(
                f"{self.folder}: tensors are missing: {shown}",
                hint="Check that config.json belongs to these weights, and that all files of the model are here.",
            )
        found = f"under the prefix {prefix!r}" if prefix else "without 'model.' before them, as an embedding model's"
        return CheckpointError(
            f"{self.folder}: tensors are missing: {shown}; found {found}",
            hint="Save the language model itself, or rename its tensors.",
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: no tensor named {name}, expected one of {len(self.tensors)} tensors",
                hint="The weights may belong to another model or be incomplete.",
            ) from None

    def read(self, name: str) -> bytes:
        """All bytes of one tensor, little-endian and row-major."""
        return self.read_range(name, 0, self[name].nbytes)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start:stop` of one tensor, counted from its first byte.

        Raises:
            CheckpointError: the range does not lie in the tensor, or the file has become shorter.
        """
        tensor = self[name]
        if not 0 <= start <= stop <= tensor.nbytes:
            raise CheckpointError(
                f"{tensor.path}: {name}: bytes {start}:{stop} asked for, it has {tensor.nbytes}",
                hint="Ask for a range inside the tensor.",
            )
        with opened(tensor.path) as descriptor:
            return read_exactly(tensor.path, descriptor, tensor.start + start, stop - start)


class _Opened(threading.local):
    """What a thread has opened within `headers_read_once`; None without."""

    by_folder: dict[Path, Checkpoint] | None = None


_OPENED = _Opened()


@contextmanager
def headers_read_once() -> Iterator[None]:
    """Within it `Checkpoint.open` reads the headers of a folder once; afterwards nothing is kept of them."""
    if _OPENED.by_folder is not None:
        yield
        return
    _OPENED.by_folder = {}
    try:
        yield
    finally:
        _OPENED.by_folder = None


def unwrapped(folder: Path, tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors under the names that they have without wrappers, and a note if these are others.

    Raises:
        CheckpointError: a tensor is there with a prefix and without.
    """
    if all(name == without_wrappers(name) for name in tensors):
        return tensors, []
    bare: dict[str, TensorInfo] = {}
    prefixed: list[str] = []
    for name, info in tensors.items():
        short = without_wrappers(name)
        if short in bare:
            raise CheckpointError(
                f"{folder}: found {bare[short].stored_as or short} and {name}, which are one tensor of the model",
                hint="Keep only the tensors of one model in the folder.",
            )
        if short != name:
            prefixed.append(name)
            info = info._replace(name=short, stored_as=name)
        bare[short] = info
    of_all = f"{len(prefixed):,} of {len(bare):,} tensors" if len(prefixed) < len(bare) else "all tensors"
    first = prefixed[0]
    return bare, [f"{of_all} have a wrapper's prefix, which is taken off: {first} is {without_wrappers(first)}"]


def open_beside_index(folder: Path, index: Path) -> Checkpoint:
    """The checkpoint of the files that an index names, or of those beside it if it cannot be read.

    Raises:
        CheckpointError: see `open_indexed`; the index's own error where no whole set of files is found without it.
    """
    found = read_weight_map(index)
    if not isinstance(found, CheckpointError):
        return open_indexed(folder, found)
    try:
        files = weight_files(folder)
    except MlxqwenError:
        raise found from None
    note = f"left aside {INDEX_NAME}, which cannot be used: {found.problem.removeprefix(f'{index}: ')}"
    return open_unindexed(folder, files, note)


def open_indexed(folder: Path, weight_map: dict[str, str]) -> Checkpoint:
    """The checkpoint of the files that `weight_map` names or, if they are not all there, of others that are whole.

    Raises:
        CheckpointError: none of the files is there, or a tensor is in two and the index does not say in which.
    """
    named = list(dict.fromkeys(weight_map.values()))
    absent = [shard for shard in named if not os.path.isfile(folder / shard)]
    present = [shard for shard in named if shard not in set(absent)]
    files = whole_set(folder, present) if absent else with_siblings(folder, present)
    if not files:
        raise absent_files(folder, absent)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    unnamed: dict[str, None] = {}
    for file in files:
        table, file_metadata = read_header(folder / file)
        metadata = {**file_metadata, **metadata}
        for name, tensor in table.items():
            place = weight_map.get(name)
            if place == file:
                tensors[name] = tensor
                del weight_map[name]  # a name is in memory once, be there a hundred thousand
            elif name not in tensors:
                tensors[name] = tensor
                unnamed |= {} if place else {name: None}
            elif name in unnamed or (place is not None and place not in files):
                raise in_two_files(folder, tensors[name], tensor)
    moved = [name for name in weight_map if name in tensors]
    lost = [name for name in weight_map if name not in tensors]
    others = [file for file in files if file not in named]
    notes = stray_files(folder, set(files), "not named by the index")
    if absent:
        notes.append(f"{INDEX_NAME} names {counted(absent, 'file')} not in the folder: {some_of(absent)}")
    if others:
        notes.append(f"{INDEX_NAME} does not name {some_of(others)}: read all the same")
    if moved and not (absent and others):
        notes.append(f"{INDEX_NAME} gives another file for {counted(moved, 'tensor')}: {some_of(moved)}")
    if unnamed:
        notes.append(f"{INDEX_NAME} does not name {counted(unnamed, 'tensor')}: {some_of(list(unnamed))}")
    if lost:
        notes.append(f"{INDEX_NAME} names {counted(lost, 'tensor')} that no file holds: {some_of(lost)}")
    return Checkpoint(folder, tensors, metadata, notes, absent=absent, unnamed=unnamed)


def whole_set(folder: Path, present: list[str]) -> list[str]:
    """The weight files to read where an index names some that are absent.

    These are `model.safetensors`, else shards that are all there by their own numbers, else those files of the index
    that are `present`.
    """
    if not present:
        try:
            return [path.name for path in weight_files(folder)]
        except MlxqwenError:
            return []
    names = [path.name for path in listed(folder)]
    if SINGLE_NAME in names and SINGLE_NAME not in present:
        return [SINGLE_NAME] if holds_all_of(folder, [SINGLE_NAME], present) else present
    sets: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if is_weight_name(name) and (match := SHARD_OF.search(name)):
            sets.setdefault((name[: match.start()], match[2]), []).append(name)
    whole = [shards for (_, count), shards in sets.items() if len(shards) == int(count)]
    if len(whole) == 1 and holds_all_of(folder, whole[0], present):
        return whole[0]
    return present


def holds_all_of(folder: Path, files: list[str], others: list[str]) -> bool:
    """Whether `files` together hold every tensor of the `others`."""
    held = {name for file in files for name in read_header(folder / file)[0]}
    return all(held.issuperset(read_header(folder / file)[0]) for file in others if file not in files)


def with_siblings(folder: Path, files: list[str]) -> list[str]:
    """The files, and those shards beside them that are of the same set by their numbers."""
    sets = {file[: match.start()] + match[0][6:] for file in files if (match := SHARD_OF.search(file))}
    if not sets:
        return files
    names = [path.name for path in listed(folder)]
    siblings = [n for n in names if (m := SHARD_OF.search(n)) and n[: m.start()] + m[0][6:] in sets and n not in files]
    return files + siblings


def absent_files(folder: Path, absent: Sequence[str]) -> CheckpointError:
    """The error for files that the index names and the folder lacks."""
    return CheckpointError(
        f"{folder / INDEX_NAME}: names {counted(absent, 'file')} not in the folder: {some_of(absent)}",
        hint="Download the missing files; an interrupted download can be resumed.",
    )


def in_two_files(folder: Path, first: TensorInfo, second: TensorInfo) -> CheckpointError:
    """The error for a tensor that two files hold."""
    return CheckpointError(
        f"{folder}: {first.name} is both in {first.path.name} and in {second.path.name}",
        hint=f"Remove the files of the other checkpoint, or have {INDEX_NAME} name one of them.",
    )


def open_unindexed(folder: Path, files: list[Path], *notes: str) -> Checkpoint:
    """The checkpoint of all tensors in `files`. Raises `CheckpointError` for one that is in two of them."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in files:
        table, file_metadata = read_header(path)
        metadata = {**file_metadata, **metadata}
        for name, tensor in table.items():
            if name in tensors:
                raise in_two_files(folder, tensors[name], tensor)
            tensors[name] = tensor
    strays = stray_files(folder, {path.name for path in files}, "not used")
    return Checkpoint(folder, tensors, metadata, [*notes, *strays])


def stray_files(folder: Path, used: set[str], why: str) -> list[str]:
    """A note on safetensors files of the folder that are not `used`; no note where there are none."""
    strays = [path.name for path in listed(folder) if path.suffix == ".safetensors" and path.name not in used]
    return [f"ignored {counted(strays, 'stray file')} {why}: {some_of(strays)}"] if strays else []


def read_weight_map(index: Path) -> dict[str, str] | CheckpointError:
    """The `weight_map` of an index: tensor name → file name, every one plainly inside the folder.

    An index that holds none comes as its error, as the files beside it may be whole.

    Raises:
        CheckpointError: a file name that leads out of the folder, or a name that no tensor has.
    """
    try:
        weight_map = read_json_object(index, error=CheckpointError).get("weight_map")
    except CheckpointError as error:
        return error
    if not isinstance(weight_map, dict) or not weight_map:
        return CheckpointError(
            f"{index}: found no weight_map, expected an object of tensor names and file names",
            hint=WITHOUT_INDEX,
        )
    broken = None
    files: dict[str, str] = {}
    for name, shard in weight_map.items():
        if len(name) > MAX_NAME_LENGTH:
            raise CheckpointError(
                f"{index}: weight_map: found a name of {len(name):,} characters ({name[:40]}…), expected at most "
                f"{MAX_NAME_LENGTH:,}",
                hint=WITHOUT_INDEX,
            )
        if isinstance(shard, str):
            if shard not in files:
                files[shard] = checked_shard_name(index, shard)
        elif broken is None:
            broken = CheckpointError(
                f"{index}: weight_map: {name}: found {shown(shard)}, expected a file name",
                hint=WITHOUT_INDEX,
            )
    return broken or {name: files[shard] for name, shard in weight_map.items()}


def checked_shard_name(index: Path, shard: str) -> str:
    """The name without `./`. It is checked as text, since a folder of the hub's cache is made of links that lead out.

    Raises:
        CheckpointError: it leads out of the folder, or is no name of a safetensors file.
    """
    parts = shard.split("/")
    escapes = any(part in ("", "..") for part in parts) or any(c in shard for c in "\\:\0")
    plain = "/".join(part for part in parts if part != ".")
    if escapes or not plain.endswith(".safetensors") or len(shard) > MAX_NAME_LENGTH:
        raise CheckpointError(
            f"{index}: weight_map: found the file name {shard[:120]!r}, expected a .safetensors file in the folder",
            hint="An index names files beside it: do not use one that leads elsewhere.",
        )
    return sys.intern(plain)


def weight_files(folder: Path) -> list[Path]:
    """The files that make up a checkpoint without an index."""
    files = listed(folder)
    if folder / SINGLE_NAME in files:
        return [folder / SINGLE_NAME]
    for prefix in WEIGHT_PREFIXES:
        chosen = [path for path in files if is_weight_name(path.name, prefix)]
        if chosen:
            check_all_shards(folder, chosen)
            return chosen
    raise no_weights(folder)


def is_weight_name(name: str, prefix: str | tuple[str, ...] = WEIGHT_PREFIXES) -> bool:
    """Whether a file of this name is taken for weights where no index says which files are."""
    return name.startswith(prefix) and name.endswith(".safetensors")


def check_all_shards(folder: Path, files: list[Path]) -> None:
    """Without an index the files' names tell how many there must be."""
    shards = [match for path in files if (match := SHARD_OF.search(path.name))]
    counts = {match[2] for match in shards}
    if len(counts) > 1 or (counts and len(shards) != int(shards[0][2])):
        raise CheckpointError(
            f"{folder}: found {some_of([path.name for path in files])} and no {INDEX_NAME}: shards missing",
            hint="Download the missing files; an interrupted download can be resumed.",
        )


def no_weights(folder: Path) -> MlxqwenError:
    """The error for a folder without safetensors files: it names the format that is there instead."""
    if adapter := adapter_alone(folder):
        return adapter
    names = [path.name for path in listed(folder)]
    for suffixes, format_name in (
        ((".gguf", ".ggml"), "GGUF"),
        ((".bin", ".pt", ".pth", ".ckpt"), "PyTorch"),
        ((".npz", ".npy"), "NumPy"),
    ):
        foreign = [name for name in names if name.endswith(suffixes)]
        if foreign:
            return UnsupportedFormatError(
                f"{folder}: found {format_name} weights ({some_of(foreign)}), expected {SINGLE_NAME}",
                hint="Use a safetensors version of the model.",
            )
    others = [name for name in names if name.endswith(".safetensors")]
    found = some_of(others) if others else "no weight files"
    return CheckpointError(
        f"{folder}: found {found}, expected {SINGLE_NAME} or {INDEX_NAME}",
        hint="Give the folder that holds the model's weights.",
    )


def listed(folder: Path) -> list[Path]:
    """The folder's files, sorted. Raises `CheckpointError` if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as cause:
        raise CheckpointError(
            f"{folder}: cannot be read: {cause.strerror}", hint="Check the folder's permissions."
        ) from None


def counted(things: Collection[str], noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def some_of(names: Sequence[str], most: int = 5, spell: Callable[[str], str] = str) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(spell(name)[:120] for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"
