"""Weight files: a folder → a validated table of tensors; tensors → a folder, atomically.

The format is safetensors (https://huggingface.co/docs/safetensors): eight little-endian bytes of header
length, a JSON header, the tensors' bytes. MLX reads it quickly but believes the header: files whose tensors
overlap, leave holes or have wrapping shapes load without a word. So everything is validated here, from the
headers alone, before a byte of weights is read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from mlxqwen.errors import CheckpointError, MlxqwenError, UnsupportedFormatError
from mlxqwen.json_file import parse_json, read_json_object

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "INDEX_NAME",
    "Checkpoint",
    "TensorInfo",
    "load_safetensors",
    "read_header",
    "save_safetensors",
    "write_checkpoint",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 1024**3

MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_DIMENSION = 2**31 - 1  # MLX keeps shapes in 32-bit integers and wraps what does not fit.
MAX_DIMENSIONS = 32
LENGTH_BYTES = 8

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

MLX_DTYPES = {
    "BOOL": "bool_", "U8": "uint8", "I8": "int8", "F8_E4M3": "uint8", "F8_E8M0": "uint8",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "C64": "complex64",
}  # fmt: skip

DOWNLOAD_AGAIN = "Download the file again, or convert the model again."
TENSOR_KEYS = {"dtype", "shape", "data_offsets"}
SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    Attributes:
        name: as written in the file.
        dtype: safetensors' name: "BF16", "F32", "F8_E4M3", "U32", …
        shape: sizes in elements; `()` for a scalar.
        path: the file that holds it.
        start, stop: its bytes, counted from the beginning of that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


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
            else:
                unlisted.append(name)
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: {counted(missing, 'tensor')} not in the files it gives for them: "
            f"{some_of([f'{name} ({weight_map[name]})' for name in missing])}",
            hint="Index and weight files come from different versions: download both again.",
        )
    notes = stray_files(folder, set(shards), "not named by the index")
    if unlisted:
        notes.append(f"ignored {counted(unlisted, 'tensor')} not named by the index: {some_of(unlisted)}")
    return Checkpoint(folder, tensors, metadata, notes)


def open_unindexed(folder: Path, files: list[Path]) -> Checkpoint:
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
    return Checkpoint(
        folder, tensors, metadata, stray_files(folder, {path.name for path in files}, "not used")
    )


def stray_files(folder: Path, used: set[str], why: str) -> list[str]:
    strays = [path.name for path in listed(folder) if path.suffix == ".safetensors" and path.name not in used]
    return [f"ignored stray file {name}: {why}" for name in strays]


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name → file name, every one plainly inside the folder."""
    found = read_json_object(index, error=CheckpointError, max_bytes=MAX_INDEX_BYTES)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: found no weight_map, expected an object of tensor names and file names",
            hint=DOWNLOAD_AGAIN,
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{index}: weight_map: {name}: found {shown(shard)}, expected a file name",
                hint=DOWNLOAD_AGAIN,
            )
    for shard in dict.fromkeys(weight_map.values()):
        check_shard_name(index, shard)
    return weight_map


def check_shard_name(index: Path, shard: str) -> None:
    """Lexically, since a folder of the hub's cache is made of links that lead out of it."""
    parts = shard.split("/")
    escapes = any(part in ("", ".", "..") for part in parts) or any(c in shard for c in "\\:\0")
    if escapes or not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: weight_map: found the file name {shard!r}, expected a .safetensors file in the folder",
            hint="The index is damaged or was tampered with: do not use this checkpoint.",
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that make up a checkpoint without an index."""
    files = [path for path in listed(folder) if path.suffix == ".safetensors"]
    if folder / SINGLE_NAME in files:
        return [folder / SINGLE_NAME]
    for prefix in ("model", "weights"):
        chosen = [path for path in files if path.name.startswith(prefix)]
        if chosen:
            check_all_shards(folder, chosen)
            return chosen
    raise no_weights(folder)


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
    try:
        return sorted(folder.iterdir())
    except OSError as cause:
        raise CheckpointError(
            f"{folder}: cannot be read: {cause.strerror}", hint="Check the folder's permissions."
        ) from None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and validates the header of one safetensors file.

    Stricter than the reference implementation (`safetensors.safe_open`) in these ways: the header starts with
    `{`; no name appears twice; a tensor is an object of exactly dtype, shape and data_offsets, its dtype a
    string of whole bytes; at most a million tensors, 32 dimensions, and 2**31 - 1
    elements along each of them.

    Returns:
        The tensors by name in the order of their bytes, and the metadata.

    Raises:
        CheckpointError: the file is missing, damaged or incomplete.
        UnsupportedFormatError: the file is in a foreign format.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        header = read_header_bytes(path, descriptor, size)
    entries = parse_header(path, header)
    metadata = parse_metadata(path, entries.pop("__metadata__", {}))
    data_start = LENGTH_BYTES + len(header)
    tensors = [parse_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    check_layout(path, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def read_header_bytes(path: Path, descriptor: int, size: int) -> bytes:
    """The header's bytes; no buffer is sized by the file's word before the file is known to be that long."""
    if size < LENGTH_BYTES:
        found = "the file is empty" if size == 0 else f"the file has only {size} bytes"
        raise CheckpointError(f"{path}: {found}, expected a safetensors file", hint=DOWNLOAD_AGAIN)
    length = int.from_bytes(read_exactly(path, descriptor, 0, LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise not_safetensors(path, read_exactly(path, descriptor, 0, min(size, 512)), length)
    if LENGTH_BYTES + length > size:
        raise CheckpointError(
            f"{path}: the file has {size:,} bytes, its header alone needs {LENGTH_BYTES + length:,}",
            hint=f"The file is truncated or damaged. {DOWNLOAD_AGAIN}",
        )
    return read_exactly(path, descriptor, LENGTH_BYTES, length)


def not_safetensors(path: Path, head: bytes, length: int) -> MlxqwenError:
    """Names what a file is when its first eight bytes are no header length."""
    for magic, format_name in (
        (b"GGUF", "a GGUF file"),
        (b"PK\x03\x04", "a NumPy archive" if b".npy" in head else "a PyTorch archive"),
        ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle (PyTorch)"),
        (b"\x93NUMPY", "a NumPy array"),
    ):
        if head.startswith(magic):
            return UnsupportedFormatError(
                f"{path}: {format_name}, expected safetensors",
                hint="Use a safetensors version of the model.",
            )
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{path}: a git-lfs pointer, not the weights themselves",
            hint="Run `git lfs pull` in the folder, or download the file again.",
        )
    if head.lstrip()[:1] == b"<":
        return CheckpointError(
            f"{path}: a web page, expected safetensors (the download failed)", hint=DOWNLOAD_AGAIN
        )
    return CheckpointError(
        f"{path}: the first 8 bytes announce a header of {length:,} bytes, expected at most "
        f"{MAX_HEADER_BYTES:,}; this is no safetensors file",
        hint=DOWNLOAD_AGAIN,
    )


def parse_header(path: Path, header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise damaged(path, f"starts with {header[:8]!r}, expected {{")
    # Brackets inside names count as well: nobody has a million of them.
    if header.count(b"[") > 2 * MAX_TENSORS or header.count(b"{") > 2 * MAX_TENSORS:
        raise damaged(path, f"describes more than {MAX_TENSORS:,} tensors")
    try:
        entries: dict[str, Any] = parse_json(header.decode("utf-8"), parse_int=parse_size)
    except UnicodeDecodeError:
        raise damaged(path, "is not UTF-8") from None
    except ValueError as cause:
        raise damaged(path, f"is not valid: {cause}") from None
    return entries


def damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: the safetensors header {problem}", hint=DOWNLOAD_AGAIN)


def parse_size(digits: str) -> int:
    if len(digits) > 20 or digits.startswith("-"):
        raise ValueError(f"the number {digits[:24]}, expected an integer from 0 to 2**64 - 1")
    return int(digits)


def parse_metadata(path: Path, found: Any) -> dict[str, str]:
    if found is None:  # MLX writes null where there is none.
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise damaged(path, f"has __metadata__ {shown(found)}, expected an object of strings")
    return found


def parse_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != TENSOR_KEYS:
        wrong_tensor(path, name, shown(entry), "an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    item_bytes = ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item_bytes is None:
        wrong_tensor(path, name, f"dtype {shown(dtype)}", f"one of {', '.join(ITEM_BYTES)}")
    if not is_shape(shape):
        wrong_tensor(
            path,
            name,
            f"shape {shown(shape)}",
            f"at most {MAX_DIMENSIONS} integers from 0 to {MAX_DIMENSION:,}",
        )
    if not (type(offsets) is list and [type(offset) for offset in offsets] == [int, int]):
        wrong_tensor(path, name, f"data_offsets {shown(offsets)}", "[begin, end]")
    begin, end = offsets
    needed = prod(shape) * item_bytes
    if end - begin != needed:
        wrong_tensor(
            path, name, f"data_offsets {offsets}, {end - begin:,} bytes", f"{needed:,} for {dtype} {shape}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def is_shape(found: Any) -> bool:
    return (
        type(found) is list
        and len(found) <= MAX_DIMENSIONS
        and all(type(size) is int and size <= MAX_DIMENSION for size in found)
    )


def wrong_tensor(path: Path, name: str, found: str, expected: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: tensor {name[:120]!r}: found {found}, expected {expected}", hint=DOWNLOAD_AGAIN
    )


def check_layout(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """Tensors in the order of their bytes fill the file: no overlap, no hole, nothing left over."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "follows a hole"
            wrong_tensor(
                path, tensor.name, f"a first byte at {tensor.start:,}, which {what}", f"{position:,}"
            )
        position = tensor.stop
    if size < position:
        raise CheckpointError(
            f"{path}: the file has {size:,} bytes, its tensors need {position:,}",
            hint=f"The file is truncated. {DOWNLOAD_AGAIN}",
        )
    if size > position:
        raise CheckpointError(
            f"{path}: {size - position:,} bytes follow the last tensor, expected none", hint=DOWNLOAD_AGAIN
        )


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file for reading; a pipe or a device could block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", hint=DOWNLOAD_AGAIN) from None
    except (OSError, ValueError) as cause:
        raise unreadable(path, cause) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: not a regular file, expected safetensors", hint=DOWNLOAD_AGAIN)
        yield descriptor
    finally:
        os.close(descriptor)


def unreadable(path: Path, cause: Exception) -> CheckpointError:
    reason = getattr(cause, "strerror", None) or cause
    return CheckpointError(f"{path}: cannot be read: {reason}", hint="Check the file and its permissions.")


def read_exactly(path: Path, descriptor: int, start: int, length: int) -> bytes:
    """`length` bytes from `start`: one system call gives less than 2 GiB, and a file can shrink."""
    parts: list[bytes] = []
    remaining = length
    while remaining:
        try:
            part = os.pread(descriptor, min(remaining, 1 << 30), start)
        except OSError as cause:
            raise unreadable(path, cause) from None
        if not part:
            raise CheckpointError(
                f"{path}: the file ends at byte {start:,}, {remaining:,} more were expected",
                hint=f"The file became shorter while it was read. {DOWNLOAD_AGAIN}",
            )
        parts.append(part)
        start += len(part)
        remaining -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def load_arrays(path: Path) -> dict[str, mx.array]:
    import mlx.core as mx

    try:
        arrays = mx.load(str(path), format="safetensors")
    except (RuntimeError, TypeError, ValueError) as cause:
        check_mlx_dtypes(path)
        raise unreadable(path, cause) from None
    if not isinstance(arrays, dict):
        raise unreadable(path, ValueError("MLX found no tensors by name"))
    return arrays


def check_mlx_dtypes(path: Path) -> None:
    for tensor in read_header(path)[0].values():
        if tensor.dtype not in MLX_DTYPES:
            raise UnsupportedFormatError(
                f"{path}: tensor {tensor.name[:120]!r}: found dtype {tensor.dtype}, which MLX does not have",
                hint=f"Expected one of {', '.join(MLX_DTYPES)}.",
            )


def checked_array(tensor: TensorInfo, arrays: dict[str, mx.array]) -> mx.array:
    import mlx.core as mx

    array = arrays.get(tensor.name)
    if array is None or array.shape != tensor.shape or array.dtype != getattr(mx, MLX_DTYPES[tensor.dtype]):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name}: found {array_kind(array)}, "
            f"expected {tensor.dtype} {list(tensor.shape)}",
            hint="The file was changed while it was open: load it again.",
        )
    return array


def array_kind(array: mx.array | None) -> str:
    return "nothing" if array is None else f"{array.dtype} {list(array.shape)}"


def load_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of one file, validated, and its metadata; read from disk when they are first used.

    Raises:
        CheckpointError: the file is missing, damaged or incomplete.
        UnsupportedFormatError: the file is in a foreign format or has a dtype that MLX has no equal of.
    """
    tensors, metadata = read_header(path)
    arrays = load_arrays(path)
    return {name: checked_array(tensor, arrays) for name, tensor in tensors.items()}, metadata


def save_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Writes one file; under its name there is the old file, the whole new one, or nothing.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with staging_folder(path.parent) as staging:
        staged = staging / "file.safetensors"  # MLX appends the suffix where it is missing
        write_file(staged, path, arrays, metadata)
        publish(staged, path)
        sync_folder(path.parent)


def write_checkpoint(
    folder: Path,
    arrays: Mapping[str, mx.array],
    *,
    metadata: Mapping[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model's weights: `model.safetensors` or numbered shards, and an index in any case.

    Everything is written beside and moved into place when it is whole, the index last.

    Args:
        folder: is made if it is not there; must hold no weights yet.
        arrays: name → array, written in this order.
        metadata: goes into every file.
        max_shard_bytes: the most that one file holds, unless a single tensor is larger.

    Raises:
        CheckpointError: nothing to write, weights are already there, or they cannot be written.
    """
    if not arrays:
        raise CheckpointError(f"{folder}: no tensors to write", hint="Give at least one array.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise unwritable(folder, cause) from None
    present = [path.name for path in listed(folder) if path.name == INDEX_NAME or is_weight_name(path.name)]
    if present:
        raise CheckpointError(
            f"{folder}: already holds weights: {some_of(present)}", hint="Write into a new folder."
        )
    shards = split_shards(arrays, max_shard_bytes)
    names = shard_names(len(shards))
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    with staging_folder(folder) as staging:
        for file, shard in zip(names, shards, strict=True):
            write_file(staging / file, folder / file, shard, metadata)
        write_text(staging / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        for file in (*names, INDEX_NAME):
            publish(staging / file, folder / file)
        sync_folder(folder)


def is_weight_name(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def split_shards(arrays: Mapping[str, mx.array], max_shard_bytes: int) -> list[dict[str, mx.array]]:
    shards: list[dict[str, mx.array]] = [{}]
    filled = 0
    for name, array in arrays.items():
        if shards[-1] and filled + array.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the target, on the same disk, so that finished files can be renamed into place."""
    try:
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except (OSError, ValueError) as cause:
        raise unwritable(parent, cause) from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_file(staged: Path, path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Writes what will be `path`, flushes it to disk and reads its header back."""
    import mlx.core as mx

    try:
        mx.save_safetensors(str(staged), dict(arrays), dict(metadata))
        sync(staged)
        written, _ = read_header(staged)
    except (OSError, RuntimeError, ValueError, TypeError, CheckpointError) as cause:
        raise unwritable(path, cause) from None
    if {name: written[name].shape for name in written} != {name: arrays[name].shape for name in arrays}:
        raise unwritable(path, ValueError("the file read back has other tensors"))


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
        sync(path)
    except OSError as cause:
        raise unwritable(path, cause) from None


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(written: Path, path: Path) -> None:
    try:
        written.replace(path)
    except (OSError, ValueError) as cause:
        raise unwritable(path, cause) from None


def sync_folder(folder: Path) -> None:
    try:
        sync(folder)
    except OSError as cause:
        raise unwritable(folder, cause) from None


def unwritable(path: Path, cause: Exception) -> CheckpointError:
    reason = getattr(cause, "strerror", None) or cause
    return CheckpointError(
        f"{path}: cannot be written: {reason}", hint="Check the folder's permissions and the free space."
    )


def shown(value: Any) -> str:
    """A JSON value for a message, however long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"


def counted(things: list[str], noun: str) -> str:
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def some_of(names: list[str], most: int = 5) -> str:
    shown = ", ".join(name[:120] for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
