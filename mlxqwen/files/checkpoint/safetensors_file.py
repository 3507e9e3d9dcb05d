"""One safetensors file: header validated, bytes and MLX arrays read.

The format (https://huggingface.co/docs/safetensors): eight little-endian bytes of header length, a JSON
header, the tensors' bytes. MLX reads it quickly but believes the header: files whose tensors overlap, leave
holes or have wrapping shapes load without a word. So everything is validated here, from the header alone,
before a byte of weights is read. The checks stand in one file, as all read the one header.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from mlxqwen.errors import CheckpointError, MlxqwenError, UnsupportedFormatError
from mlxqwen.files.json_file import parse_json, shown

if TYPE_CHECKING:
    import mlx.core as mx

MAX_HEADER_BYTES = 100_000_000
MAX_HEADER_ITEMS = 1_000_000
MAX_NAME_LENGTH = 8_192
MAX_METADATA = 10_000
MAX_METADATA_LENGTH = 4 * 1024 * 1024
MAX_DIMENSION = 2**31 - 1  # MLX keeps shapes in 32-bit integers and wraps what does not fit.
MAX_DIMENSIONS = 32
LENGTH_BYTES = 8
TENSOR_KEYS = {"dtype", "shape", "data_offsets"}
DOWNLOAD_AGAIN = "Download the file again, or convert the model again."
NOT_THE_FORMAT = "Whatever wrote this file does not keep to the safetensors format: write it with its library."

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


class TensorInfo(NamedTuple):
    """Where one tensor lies and what it is.

    Attributes:
        name: as written in the file, or as `Checkpoint` found it under a wrapper's prefix: without that.
        dtype: safetensors' name: "BF16", "F32", "F8_E4M3", "U32", …
        shape: sizes in elements; `()` for a scalar.
        path: the file that holds it.
        start, stop: its bytes, counted from the beginning of that file.
        stored_as: the name in the file where `name` is another; None where it is the same.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int
    stored_as: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and validates the header of one safetensors file.

    Stricter than the reference implementation (`safetensors.safe_open`) in these ways: the header starts with
    `{`; no name appears twice; a tensor is an object of exactly dtype, shape and data_offsets, its dtype a
    string of whole bytes; at most a million values (which some 120,000 tensors have), names of 8,192
    characters, 10,000 entries and 4 MiB of metadata, 32 dimensions, and 2**31 - 1 elements along each of them.

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
            hint=f"The file is truncated. {DOWNLOAD_AGAIN}",
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
        return CheckpointError(f"{path}: a web page, expected safetensors (the download failed)", hint=DOWNLOAD_AGAIN)
    return CheckpointError(
        f"{path}: the first 8 bytes announce a header of {length:,} bytes, expected at most "
        f"{MAX_HEADER_BYTES:,}; this is no safetensors file",
        hint=NOT_THE_FORMAT,
    )


def parse_header(path: Path, header: bytes) -> dict[str, Any]:
    """The header's entries by name, each still to be checked. Raises `CheckpointError`."""
    if not header.startswith(b"{"):
        raise wrong_header(path, f"starts with {header[:8]!r}, expected {{")
    try:
        entries: dict[str, Any] = parse_json(header.decode("utf-8"), parse_int=parse_size, max_items=MAX_HEADER_ITEMS)
    except UnicodeDecodeError:
        raise wrong_header(path, "is not UTF-8") from None
    except ValueError as cause:
        raise wrong_header(path, f"is not valid: {cause}") from None
    return entries


def wrong_header(path: Path, problem: str) -> CheckpointError:
    """The error for a header that is wrong as a whole."""
    return CheckpointError(f"{path}: the safetensors header {problem}", hint=NOT_THE_FORMAT)


def parse_size(digits: str) -> int:
    """A number of the header. Raises `ValueError` for one below 0 or of more than 20 digits."""
    if len(digits) > 20 or digits.startswith("-"):
        raise ValueError(f"the number {digits[:24]}, expected an integer from 0 to 2**64 - 1")
    return int(digits)


def parse_metadata(path: Path, found: Any) -> dict[str, str]:
    """The header's `__metadata__`, text by name. Raises `CheckpointError` for anything else, or too much of it."""
    if found is None:  # MLX writes null where there is none.
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise wrong_header(path, f"has __metadata__ {shown(found)}, expected an object of strings")
    length = sum(len(key) + len(value) for key, value in found.items())
    if len(found) > MAX_METADATA or length > MAX_METADATA_LENGTH:
        raise wrong_header(
            path,
            f"has __metadata__ of {len(found):,} entries and {length:,} characters, expected at most "
            f"{MAX_METADATA:,} and {MAX_METADATA_LENGTH:,}",
        )
    return found


def parse_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, with its offsets counted from the start of the file. Raises `CheckpointError`."""
    if len(name) > MAX_NAME_LENGTH:
        wrong_tensor(path, name, f"a name of {len(name):,} characters", f"at most {MAX_NAME_LENGTH:,}")
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
        wrong_tensor(path, name, f"data_offsets {offsets}, {end - begin:,} bytes", f"{needed:,} for {dtype} {shape}")
    return TensorInfo(name, sys.intern(dtype), shared(tuple(shape)), path, data_start + begin, data_start + end)


@lru_cache(maxsize=256)
def shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One object for equal shapes: a mixture of experts has a hundred thousand tensors of a few shapes."""
    return shape


def is_shape(found: Any) -> bool:
    """Whether a value of the header is a shape: a short list of integers in bounds."""
    return (
        type(found) is list
        and len(found) <= MAX_DIMENSIONS
        and all(type(size) is int and size <= MAX_DIMENSION for size in found)
    )


def wrong_tensor(path: Path, name: str, found: str, expected: str) -> NoReturn:
    """Raise `CheckpointError` for one entry of the header."""
    raise CheckpointError(f"{path}: tensor {name[:120]!r}: found {found}, expected {expected}", hint=NOT_THE_FORMAT)


def check_layout(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """Tensors in the order of their bytes fill the file: no overlap, no hole, nothing left over."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "follows a hole"
            wrong_tensor(path, tensor.name, f"a first byte at {tensor.start:,}, which {what}", f"{position:,}")
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


def load_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of one file, validated, and its metadata; read from disk when they are first used.

    Raises:
        CheckpointError: the file is missing, damaged or incomplete.
        UnsupportedFormatError: the file is in a foreign format or has a dtype that MLX has no equal of.
    """
    tensors, metadata = read_header(path)
    arrays = load_arrays(path)
    return {name: checked_array(tensor, arrays) for name, tensor in tensors.items()}, metadata


def load_arrays(path: Path) -> dict[str, mx.array]:
    """All arrays of a file by name, lazy. Raises `CheckpointError`, `UnsupportedFormatError`."""
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
    """Raise `UnsupportedFormatError` if a tensor has a dtype that MLX does not have."""
    for tensor in read_header(path)[0].values():
        if tensor.dtype not in MLX_DTYPES:
            raise UnsupportedFormatError(
                f"{path}: tensor {tensor.name[:120]!r}: found dtype {tensor.dtype}, which MLX does not have",
                hint=f"Expected one of {', '.join(MLX_DTYPES)}.",
            )


def checked_array(tensor: TensorInfo, arrays: dict[str, mx.array]) -> mx.array:
    """The array of `tensor`. Raises `CheckpointError` if it is not as the header said."""
    import mlx.core as mx

    array = arrays.get(tensor.stored_as or tensor.name)
    if array is None or array.shape != tensor.shape or array.dtype != getattr(mx, MLX_DTYPES[tensor.dtype]):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name}: found {array_kind(array)}, expected {tensor.dtype} {list(tensor.shape)}",
            hint="The file was changed while it was open: load it again.",
        )
    return array


def array_kind(array: mx.array | None) -> str:
    """The dtype and shape of an array, for errors."""
    return "nothing" if array is None else f"{array.dtype} {list(array.shape)}"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file for reading; a pipe or a device could block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file", hint="Check the name, and that a link to it leads anywhere."
        ) from None
    except (OSError, ValueError) as cause:
        raise unreadable(path, cause) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(
                f"{path}: not a regular file, expected safetensors", hint="Put the file in its place."
            )
        yield descriptor
    finally:
        os.close(descriptor)


def unreadable(path: Path, cause: Exception) -> CheckpointError:
    """The error for a file that the system or MLX does not read."""
    reason = getattr(cause, "strerror", None) or cause
    return CheckpointError(f"{path}: cannot be read: {reason}", hint="Check the file and its permissions.")


def ended(path: Path, position: int, missing: int) -> CheckpointError:
    """The error for a file that ends before the bytes that its header announced."""
    return CheckpointError(
        f"{path}: the file ends at byte {position:,}, {missing:,} more were expected",
        hint=f"The file became shorter while it was read. {DOWNLOAD_AGAIN}",
    )


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
            raise ended(path, start, remaining)
        parts.append(part)
        start += len(part)
        remaining -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
