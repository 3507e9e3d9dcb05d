"""A model's folder → a table of its tensors: which files make it up, and whether they are complete."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mlxqwen.errors import CheckpointError, MlxqwenError, UnsupportedFormatError
from mlxqwen.files.checkpoint.safetensors_file import (
    DOWNLOAD_AGAIN,
    MAX_NAME_LENGTH,
    TensorInfo,
    checked_array,
    load_arrays,
    opened,
    read_exactly,
    read_header,
)
from mlxqwen.files.json_file import read_json_object, shown

if TYPE_CHECKING:
    import mlx.core as mx

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
WEIGHT_PREFIXES = ("model", "weights")
SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


class Checkpoint:
    """The tensors of a model's folder, validated, none of them read yet.

    Attributes:
        folder: where it was opened.
        tensors: name → `TensorInfo`, shard by shard in the order of their bytes.
        metadata: the files' own key → value strings; the first shard wins.
        notes: one line for each thing that was left aside, such as a stray file.
    """

    def __init__(
        self, folder: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str], notes: list[str]
    ) -> None:
        self.folder = folder
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self.notes = tuple(notes)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Finds the weight files of a folder and validates their headers.

        The files are those that `model.safetensors.index.json` names; without an index
        `model.safetensors`, else all of `model*.safetensors` (or `weights*.safetensors`).

        Raises:
            CheckpointError: files missing, damaged, incomplete, or outside the folder.
            UnsupportedFormatError: weights in a foreign format.
        """
        if not os.path.isdir(folder):
            raise CheckpointError(f"{folder}: no such folder", hint="Give the folder that holds the model.")
        index = folder / INDEX_NAME
        if os.path.lexists(index):
            checkpoint = open_indexed(folder, read_weight_map(index))
        else:
            checkpoint = open_unindexed(folder, weight_files(folder))
        if not checkpoint.tensors:
            raise CheckpointError(f"{folder}: the weight files hold no tensors", hint=DOWNLOAD_AGAIN)
        return checkpoint

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

    def arrays(self, names: Iterable[str] | None = None) -> dict[str, mx.array]:
        """MLX arrays by name, read from disk when they are first used.

        Args:
            names: which tensors, in which order; all of them if None.

        Returns:
            Arrays of the tensors' shapes and dtypes; F8_E4M3 and F8_E8M0 come as uint8 bit patterns.

        Raises:
            CheckpointError: a name is not there, or a dtype that MLX has no equal of.
        """
        wanted = [self[name] for name in (self.tensors if names is None else names)]
        shards = {path: load_arrays(path) for path in dict.fromkeys(tensor.path for tensor in wanted)}
        return {tensor.name: checked_array(tensor, shards[tensor.path]) for tensor in wanted}

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


def open_indexed(folder: Path, weight_map: dict[str, str]) -> Checkpoint:
    """The checkpoint of the shards that `weight_map` names. Raises `CheckpointError` where they disagree with it."""
    shards = list(dict.fromkeys(weight_map.values()))
    absent = [shard for shard in shards if not os.path.isfile(folder / shard)]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: names {counted(absent, 'file')} not in the folder: {some_of(absent)}",
            hint="Download the missing files; an interrupted download can be resumed.",
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    unlisted: list[str] = []
    for shard in shards:
        table, shard_metadata = read_header(folder / shard)
        metadata = {**shard_metadata, **metadata}
        for name, tensor in table.items():
            if weight_map.get(name) == shard:
                tensors[name] = tensor
                del weight_map[name]  # a name is in memory once, be there a hundred thousand
            else:
                unlisted.append(name)
    if missing := list(weight_map):
        raise CheckpointError(
            f"{folder / INDEX_NAME}: {counted(missing, 'tensor')} not in the files it gives for them: "
            f"{some_of(missing, spell=lambda name: f'{name} ({weight_map[name]})')}",
            hint="Index and weight files come from different versions: download both again.",
        )
    notes = stray_files(folder, set(shards), "not named by the index")
    if unlisted:
        notes.append(f"ignored {counted(unlisted, 'tensor')} not named by the index: {some_of(unlisted)}")
    return Checkpoint(folder, tensors, metadata, notes)


def open_unindexed(folder: Path, files: list[Path]) -> Checkpoint:
    """The checkpoint of all tensors in `files`. Raises `CheckpointError` for one that is in two of them."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in files:
        table, file_metadata = read_header(path)
        metadata = {**file_metadata, **metadata}
        for name, tensor in table.items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: {name} is both in {tensors[name].path.name} and in {path.name}",
                    hint=f"Remove the files of the other checkpoint, or add {INDEX_NAME}.",
                )
            tensors[name] = tensor
    return Checkpoint(folder, tensors, metadata, stray_files(folder, {path.name for path in files}, "not used"))


def stray_files(folder: Path, used: set[str], why: str) -> list[str]:
    """A note on safetensors files of the folder that are not `used`; no note where there are none."""
    strays = [path.name for path in listed(folder) if path.suffix == ".safetensors" and path.name not in used]
    return [f"ignored {counted(strays, 'stray file')} {why}: {some_of(strays)}"] if strays else []


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name → file name, every one plainly inside the folder."""
    found = read_json_object(index, error=CheckpointError)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: found no weight_map, expected an object of tensor names and file names",
            hint=DOWNLOAD_AGAIN,
        )
    for name, shard in weight_map.items():
        if len(name) > MAX_NAME_LENGTH:
            raise CheckpointError(
                f"{index}: weight_map: found a name of {len(name):,} characters ({name[:40]}…), expected at most "
                f"{MAX_NAME_LENGTH:,}",
                hint=DOWNLOAD_AGAIN,
            )
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{index}: weight_map: {name}: found {shown(shard)}, expected a file name",
                hint=DOWNLOAD_AGAIN,
            )
    for shard in dict.fromkeys(weight_map.values()):
        check_shard_name(index, shard)
    return {name: sys.intern(shard) for name, shard in weight_map.items()}


def check_shard_name(index: Path, shard: str) -> None:
    """Lexically, since a folder of the hub's cache is made of links that lead out of it."""
    parts = shard.split("/")
    escapes = any(part in ("", ".", "..") for part in parts) or any(c in shard for c in "\\:\0")
    if escapes or not shard.endswith(".safetensors") or len(shard) > MAX_NAME_LENGTH:
        raise CheckpointError(
            f"{index}: weight_map: found the file name {shard[:120]!r}, expected a .safetensors file in the folder",
            hint="The index is damaged or was tampered with: do not use this checkpoint.",
        )


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
        hint="Give the folder that holds the model, and download it completely.",
    )


def listed(folder: Path) -> list[Path]:
    """The folder's files, sorted. Raises `CheckpointError` if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as cause:
        raise CheckpointError(
            f"{folder}: cannot be read: {cause.strerror}", hint="Check the folder's permissions."
        ) from None


def counted(things: list[str], noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def some_of(names: list[str], most: int = 5, spell: Callable[[str], str] = str) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(spell(name)[:120] for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"
