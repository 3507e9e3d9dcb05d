"""Bytes of tensors → memory that the caller gives: no copy between the file and its place."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from mlxqwen.files.checkpoint.safetensors_file import TensorInfo, ended, opened, unreadable

__all__ = ["TensorReader"]

_MOST_OPEN_FILES = 8
_BYTES_A_CALL = 1 << 30  # macOS refuses to read more than 2 GiB at once


class TensorReader:
    """Keeps a few files open for tensors that are read one after another; a context that closes them."""

    def __init__(self) -> None:
        self._files = ExitStack()
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_into(self, buffer: memoryview, tensor: TensorInfo, start: int = 0) -> None:
        """Fill `buffer`, of bytes, with those of a tensor from `start` on.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        descriptor, position, filled = self._descriptor(tensor.path), tensor.start + start, 0
        while filled < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[filled : filled + _BYTES_A_CALL]], position + filled)
            except OSError as cause:
                raise unreadable(tensor.path, cause) from None
            if not count:
                end = min(os.fstat(descriptor).st_size, position + filled)
                raise ended(tensor.path, end, tensor.start + tensor.nbytes - end)
            filled += count

    def close(self) -> None:
        """Close all files; those that are wanted again are opened again."""
        self._descriptors.clear()
        self._files.close()

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            if len(self._descriptors) >= _MOST_OPEN_FILES:
                self.close()
            self._descriptors[path] = self._files.enter_context(opened(path))
        return self._descriptors[path]
