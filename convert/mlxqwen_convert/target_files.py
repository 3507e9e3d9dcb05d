"""The files of weights while they are written: rows at known offsets, by any thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mlxqwen.files.atomic import sync_descriptor
from mlxqwen_convert.errors import DiskFullError, OutputError
from mlxqwen_convert.layout import OutputTensor, Shard
from mlxqwen_convert.open_files import OpenFiles

__all__ = ["PARTIAL_SUFFIX", "TargetFiles", "unwritable"]

PARTIAL_SUFFIX = ".part"
# What is read back at once.
_PIECE_BYTES = 1 << 18


class TargetFiles:
    """The files of weights while they are written: read and written at any place by any thread."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.paths = [folder / (shard.name + PARTIAL_SUFFIX) for shard in shards]
        self._files = OpenFiles(os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            for number, (path, shard) in enumerate(zip(self.paths, shards, strict=True)):
                with self._files.opened(path) as descriptor:
                    os.ftruncate(descriptor, shard.size)
                self._write(number, shard.head, 0)
        except OSError as cause:
            self.close()
            raise unwritable(folder, cause) from None
        except OutputError:
            self.close()
            raise

    def write(self, tensor: OutputTensor, row: int, data: memoryview) -> None:
        """Write rows of `tensor` from row `row` on, its outer axes counted as one."""
        self._write(tensor.shard, data, tensor.start + row * tensor.row_bytes)

    def pieces(self, tensor: OutputTensor, row: int, rows: int) -> Iterator[memoryview]:
        """The bytes of some rows, piece by piece in one buffer."""
        path, position, left = self.paths[tensor.shard], tensor.start + row * tensor.row_bytes, rows * tensor.row_bytes
        buffer = memoryview(bytearray(min(left, _PIECE_BYTES)))
        try:
            with self._files.opened(path) as descriptor:
                while left:
                    count = os.preadv(descriptor, [buffer[:left]], position)
                    if not count:
                        raise OutputError(
                            f"{path}: ends in the midst of {tensor.name}",
                            hint="Something else writes to the output's folder. Remove it and convert again.",
                        )
                    yield buffer[:count]
                    position, left = position + count, left - count
        except OSError as cause:
            raise OutputError(
                f"{path}: cannot be read back: {cause.strerror}", hint="Check the disk, then go on with --resume."
            ) from None

    def begin_flush(self, tensor: OutputTensor, row: int, rows: int) -> None:
        """Have the system begin to write these rows to the disk, if it can be told, so that less is left to `flush`."""
        if hasattr(os, "posix_fadvise"):
            start, size = tensor.start + row * tensor.row_bytes, rows * tensor.row_bytes
            with suppress(OSError), self._files.opened(self.paths[tensor.shard]) as descriptor:
                os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Have everything on the disk."""
        for path in self.paths:
            try:
                with self._files.opened(path) as descriptor:
                    sync_descriptor(descriptor)
            except OSError as cause:
                raise unwritable(path, cause) from None

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def _write(self, shard: int, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data).cast("B")
        try:
            with self._files.opened(self.paths[shard]) as descriptor:
                while view:
                    count = os.pwrite(descriptor, view, position)
                    view, position = view[count:], position + count
        except OSError as cause:
            raise unwritable(self.paths[shard], cause) from None


def unwritable(path: Path, cause: OSError) -> OutputError:
    """What an error of the system means for the target."""
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(
            f"{path}: the disk is full ({cause.strerror})",
            hint="Free some space, then run the same command with --resume: what is written is kept.",
        )
    return OutputError(f"{path}: cannot be written: {cause.strerror}", hint="Check the folder and its permissions.")
