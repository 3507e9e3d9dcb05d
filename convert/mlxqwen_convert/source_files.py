"""Rows and columns of tensors, read from their files where they are wanted and nowhere else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxqwen.checkpoint import ITEM_BYTES, TensorInfo
from mlxqwen_convert.errors import SourceChangedError, SourceError

__all__ = ["SourceFiles", "as_array"]

# What a thread reads at once of a matrix that is wanted by columns.
_STRIP_BYTES = 1 << 20

# FP8 comes as its bytes.
_MLX_DTYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
    "F8_E4M3": mx.uint8, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16,
    "U32": mx.uint32, "I32": mx.int32, "U64": mx.uint64, "I64": mx.int64,
}  # fmt: skip


def as_array(data: bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """An MLX array of bytes as they lie in a safetensors file; FP8 comes as uint8."""
    buffer: Any = data
    return mx.array(buffer).view(_MLX_DTYPES[dtype]).reshape(shape)


class _Strip(NamedTuple):
    """Columns `start:stop` of a matrix."""

    info: TensorInfo
    start: int
    stop: int
    array: mx.array


class SourceFiles:
    """The weight files of a source, opened once and read at any place by any thread.

    Files are remembered by size and time of change, so that `check_unchanged` can tell whether they are still the same.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self._open: dict[Path, int] = {}
        self.states = {path: file_state(path) for path in paths}

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
            wide = min(width, max(stop, start + _STRIP_BYTES // (rows * ITEM_BYTES[info.dtype])))
            strip = strips[word] = _Strip(info, start, wide, self._strip(info, start, wide))
        return strip.array[:, start - strip.start : stop - strip.start]

    def _strip(self, info: TensorInfo, start: int, stop: int) -> mx.array:
        rows, width = info.shape
        if stop - start == width:
            return self.rows(info, 0, rows)
        item = ITEM_BYTES[info.dtype]
        first, size, pitch = start * item, (stop - start) * item, width * item
        data = b"".join(self.read(info, first + row * pitch, first + row * pitch + size) for row in range(rows))
        return as_array(data, info.dtype, (rows, stop - start))

    def whole(self, info: TensorInfo) -> mx.array:
        """All of a tensor."""
        return as_array(self.read(info, 0, info.nbytes), info.dtype, info.shape)

    def read(self, info: TensorInfo, start: int, stop: int) -> bytes:
        """The bytes `start:stop` of a tensor."""
        descriptor = self._descriptor(info.path)
        try:
            data = os.pread(descriptor, stop - start, info.start + start)
        except OSError as cause:
            raise _unreadable(info.path, cause) from None
        if len(data) != stop - start:
            raise SourceChangedError(
                f"{info.path}: ends at byte {info.start + start + len(data):,}, in the midst of {info.name}",
                hint="The file became shorter. Download it again and convert from the start.",
            )
        return data

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
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as cause:
                    raise _unreadable(path, cause) from None
            return self._open[path]


def file_state(path: Path) -> tuple[int, int, int]:
    """Size, time of change in nanoseconds, and the file's number."""
    try:
        found = path.stat()
    except OSError as cause:
        raise _unreadable(path, cause) from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _unreadable(path: Path, cause: OSError) -> SourceError:
    return SourceError(f"{path}: cannot be read: {cause.strerror}", hint="Check the file and its permissions.")
