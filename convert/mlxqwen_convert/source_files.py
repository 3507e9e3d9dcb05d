"""Rows and columns of tensors, read from their files where they are wanted and nowhere else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxqwen.files.checkpoint import ITEM_BYTES, TensorInfo
from mlxqwen_convert.errors import SourceChangedError, SourceUnreadableError
from mlxqwen_convert.open_files import OpenFiles

__all__ = ["SMALL_STRIP", "STRIP_BYTES", "FileState", "SourceFiles", "as_array", "file_state"]

# What a thread reads at once of a matrix that is wanted by columns.
STRIP_BYTES = 1 << 21
# Zeros and scales are so few beside the codes that a strip of this part of it has those of as many columns.
SMALL_STRIP = 8
# Between two pieces of a strip that are read as one: a call of the system takes as long as so many bytes.
_LONGEST_GAP = 1 << 13
_SPAN_BYTES = 1 << 18

FileState = tuple[int, int, int]
"""Size, time of change in nanoseconds, and the file's number."""

# FP8 comes as its bytes.
_MLX_DTYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
    "F8_E4M3": mx.uint8, "F8_E8M0": mx.uint8, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16,
    "U32": mx.uint32, "I32": mx.int32, "U64": mx.uint64, "I64": mx.int64,
}  # fmt: skip


def as_array(data: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """An MLX array of bytes as they lie in a safetensors file; FP8 comes as uint8, exponents too."""
    buffer: Any = data
    return mx.array(buffer).view(_MLX_DTYPES[dtype]).reshape(shape)


class _Strip(NamedTuple):
    """Columns `start:stop` of a matrix."""

    info: TensorInfo
    start: int
    stop: int
    array: mx.array


class SourceFiles:
    """The files of a source, read at any place by any thread.

    Files are remembered by size and time of change, so that `check_unchanged` can tell whether they are still the same.
    A thread holds about `strip_bytes` of codes that are wanted by columns, and less of their zeros and scales.
    """

    def __init__(self, paths: Iterable[Path], *, strip_bytes: int = STRIP_BYTES) -> None:
        self._local = threading.local()
        self._files = OpenFiles(os.O_RDONLY)
        self._strip_bytes = strip_bytes
        self.states = {path: file_state(path) for path in paths}

    def keep(self, paths: Iterable[Path]) -> None:
        """Watch only these from now on."""
        self.states = {path: self.states.get(path) or file_state(path) for path in paths}

    def rows(self, info: TensorInfo, start: int, stop: int) -> mx.array:
        """Elements `start:stop` along the first axis."""
        row_bytes = info.nbytes // info.shape[0]
        data = self.read(info, start * row_bytes, stop * row_bytes)
        return as_array(data, info.dtype, (stop - start, *info.shape[1:]))

    def columns(self, info: TensorInfo, start: int, stop: int) -> mx.array:
        """Columns `start:stop` of a matrix.

        A file has them in one short piece for each row. So each thread reads a strip some columns wider, and keeps it
        for the columns that it will want next.
        """
        strips: dict[str, _Strip] = self._local.__dict__.setdefault("strips", {})
        word = info.name.rpartition(".")[2]
        strip = strips.get(word)
        if strip is None or strip.info != info or not strip.start <= start <= stop <= strip.stop:
            rows, width = info.shape
            size = self._strip_bytes if word == "qweight" else self._strip_bytes // SMALL_STRIP
            wide = min(width, max(stop, start + size // (rows * ITEM_BYTES[info.dtype])))
            strip = None
            strips.pop(word, None)  # the old one goes before the new one comes
            strip = strips[word] = _Strip(info, start, wide, self._strip(info, start, wide))
        return strip.array[:, start - strip.start : stop - strip.start]

    def _strip(self, info: TensorInfo, start: int, stop: int) -> mx.array:
        rows, width = info.shape
        if stop - start == width:
            return self.rows(info, 0, rows)
        item = ITEM_BYTES[info.dtype]
        data = bytearray(rows * (stop - start) * item)
        try:
            with self._files.opened(info.path) as descriptor:
                _read_columns(descriptor, info, (start * item, (stop - start) * item, width * item), data)
        except OSError as cause:
            raise unreadable(info.path, cause) from None
        return as_array(data, info.dtype, (rows, stop - start))

    def whole(self, info: TensorInfo) -> mx.array:
        """All of a tensor."""
        return as_array(self.read(info, 0, info.nbytes), info.dtype, info.shape)

    def read(self, info: TensorInfo, start: int, stop: int) -> bytes:
        """The bytes `start:stop` of a tensor."""
        try:
            with self._files.opened(info.path) as descriptor:
                return _read(descriptor, info, start, stop - start)
        except OSError as cause:
            raise unreadable(info.path, cause) from None

    def read_into(self, buffer: memoryview, info: TensorInfo, start: int) -> None:
        """Fill a buffer with the bytes of a tensor from `start` on."""
        try:
            with self._files.opened(info.path) as descriptor:
                _read_into(descriptor, info, start, buffer)
        except OSError as cause:
            raise unreadable(info.path, cause) from None

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if a file is not what it was at first."""
        for path, state in self.states.items():
            if file_state(path) != state:
                raise SourceChangedError(
                    f"{path}: changed while it was converted, expected the same file throughout",
                    hint="Convert again when nothing writes to the source.",
                )

    def close(self) -> None:
        """Close all files."""
        self._files.close()


def _read_columns(descriptor: int, info: TensorInfo, place: tuple[int, int, int], data: bytearray) -> None:
    """Fill `data` with a piece of each row of a matrix.

    Args:
        place: where the piece begins in a row, its size and the row's, in bytes.
    """
    first, size, pitch = place
    rows = len(data) // size
    if pitch - size > _LONGEST_GAP:
        view = memoryview(data)
        for row in range(rows):
            _read_into(descriptor, info, first + row * pitch, view[row * size : (row + 1) * size])
        return
    import numpy as np  # not all conversions need it

    pieces = np.frombuffer(data, np.uint8).reshape(rows, size)
    most = min(rows, max(1, _SPAN_BYTES // pitch))
    span = bytearray(most * pitch)
    by_row = np.frombuffer(span, np.uint8).reshape(most, pitch)
    for row in range(0, rows, most):
        count = min(most, rows - row)
        last = (count - 1) * pitch + size  # what follows the last piece may lie beyond the tensor
        _read_into(descriptor, info, first + row * pitch, memoryview(span)[:last])
        pieces[row : row + count] = by_row[:count, :size]


def _read_into(descriptor: int, info: TensorInfo, start: int, buffer: memoryview) -> None:
    count = os.preadv(descriptor, [buffer], info.start + start)
    if count < len(buffer):
        buffer[count:] = _read(descriptor, info, start + count, len(buffer) - count)


def _read(descriptor: int, info: TensorInfo, start: int, size: int) -> bytes:
    """`size` bytes of a tensor; the system may give them piece by piece."""
    position = info.start + start
    data = os.pread(descriptor, size, position)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), position + len(data))
        if not more:
            raise SourceChangedError(
                f"{info.path}: ends at byte {position + len(data):,}, in the midst of {info.name}",
                hint="The file became shorter. Download it again and convert from the start.",
            )
        data += more
    return data


def file_state(path: Path) -> FileState:
    """What changes when a file does."""
    try:
        found = path.stat()
    except OSError as cause:
        raise unreadable(path, cause) from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def unreadable(path: Path, cause: OSError) -> SourceUnreadableError:
    """What an error of the system means for the source."""
    return SourceUnreadableError(f"{path}: cannot be read: {cause.strerror}", hint="Check the file and its disk.")
