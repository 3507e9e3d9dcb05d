"""Memory that nothing has been written to yet: arrays that MLX does not clear, and their pages, many at a time."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["blank_arrays", "have_pages"]

_STORED_AS = {"uint16": "U16", "uint32": "U32", "float16": "F16", "float32": "F32"}

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LEAST_BLANK = 1 << 18
"""Bytes from which on clearing an array takes longer than leaving it as it is."""

_LEAST_PAGES = 1 << 16
"""Bytes from which on asking the system for pages takes less time than each page's first use."""

_POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, known from 5.14 on


def blank_arrays(forms: Mapping[str, tuple[tuple[int, ...], mx.Dtype]]) -> dict[str, mx.array]:
    """Evaluated arrays of these shapes and dtypes by name, whose numbers are whatever was there.

    Their memory is written to through `memoryview`, which MLX has for all dtypes but bfloat16. It has no function for
    blank arrays: it reads large ones from a file that gives it no bytes. Clearing them would take about half as long as
    reading them.
    """
    import mlx.core as mx

    arrays: dict[str, mx.array] = {}
    large: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}
    for name, (shape, dtype) in forms.items():
        if dtype.size * prod(shape) < _LEAST_BLANK:
            arrays[name] = mx.zeros(shape, dtype=dtype, stream=mx.cpu)
        else:
            large[name] = shape, dtype
    mx.eval(arrays)
    if large:
        read: Any = mx.load(cast(BinaryIO, _BlankFile(large)), format="safetensors", stream=mx.cpu)
        arrays |= read
    return arrays


class _BlankFile(io.RawIOBase):
    """A safetensors file whose header can be read; what stands behind it leaves memory as it is."""

    def __init__(self, forms: Mapping[str, tuple[tuple[int, ...], mx.Dtype]]) -> None:
        header, end = {}, 0
        for name, (shape, dtype) in forms.items():
            start, end = end, end + dtype.size * prod(shape)
            stored_as = _STORED_AS[str(dtype).rpartition(".")[2]]
            header[name] = {"dtype": stored_as, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        self._head = len(text).to_bytes(8, "little") + text
        self._size = len(self._head) + end
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        head = self._head[self._position : self._position + len(buffer)]
        buffer[: len(head)] = head
        self._position += len(buffer)
        return len(buffer)


def have_pages(memory: memoryview) -> None:
    """Have the system give the pages of writable memory now, in one call, where it can; else each comes when used.

    On Linux, a page takes about a quarter less time so.
    """
    populate = _populate()
    if populate is None or len(memory) < _LEAST_PAGES:
        return
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = address - address % _PAGE
    populate(start, address + len(memory) - start, _POPULATE_WRITE)  # where it fails, nothing is lost


@cache
def _populate() -> Callable[[int, int, int], int] | None:
    """Linux's `madvise`; None on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
