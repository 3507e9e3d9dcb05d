"""Memory that nothing has been written to yet: arrays that MLX does not clear, and their pages, many at a time."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["blank_arrays", "have_pages"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LEAST_BLANK = 1 << 18
"""Bytes from which on clearing an array takes longer than leaving it as it is."""

_LARGE = 1 << 24
"""Bytes of an array from which on it is no part of another."""

_WHOLE = "parts"

_ALIGNMENT = 256
"""Bytes at whose multiples the parts begin, as MLX's own arrays do on any device."""

_LEAST_PAGES = 1 << 16
"""Bytes from which on asking the system for pages takes less time than each page's first use."""

_POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, known from 5.14 on


def blank_arrays(
    forms: Mapping[str, tuple[tuple[int, ...], mx.Dtype]], together: Collection[str] = ()
) -> dict[str, mx.array]:
    """Evaluated arrays of these shapes and dtypes by name, whose numbers are whatever was there.

    Their memory is written to through `memoryview`, which MLX has for all dtypes but bfloat16. It has no function for
    blank arrays: it reads large ones from a file that gives it no bytes. Clearing them would take about half as long as
    reading them.

    Args:
        forms: shapes and dtypes.
        together: arrays that are parts of one, as making each takes a turn of two threads: 40 µs. Its memory is given
            back with the last of them; large ones are not among them.
    """
    import mlx.core as mx

    sizes = {name: dtype.size * prod(shape) for name, (shape, dtype) in forms.items()}
    starts, end = dict[str, int](), 0
    for name in together:
        if sizes[name] < _LARGE:
            starts[name], end = end, end + -(-sizes[name] // _ALIGNMENT) * _ALIGNMENT
    alone = {f"alone {name}": sizes[name] for name in forms if name not in starts} | ({_WHOLE: end} if end else {})
    blank = {name: mx.zeros(size, mx.uint8, stream=mx.cpu) for name, size in alone.items() if size < _LEAST_BLANK}
    mx.eval(blank)
    large = {name: size for name, size in alone.items() if size >= _LEAST_BLANK}
    if large:
        read: Any = mx.load(cast(BinaryIO, _BlankFile(large)), format="safetensors", stream=mx.cpu)
        blank |= read
    arrays = {}
    for name, (shape, dtype) in forms.items():
        if name in starts:
            array = mx.as_strided(blank[_WHOLE], (sizes[name],), (1,), starts[name], stream=mx.cpu)
        else:
            array = blank[f"alone {name}"]
        arrays[name] = mx.reshape(mx.view(array, dtype, stream=mx.cpu), shape, stream=mx.cpu)
    mx.eval(arrays)
    return arrays


class _BlankFile(io.RawIOBase):
    """A safetensors file whose header can be read; what stands behind it leaves memory as it is."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        header, end = {}, 0
        for name, size in sizes.items():
            start, end = end, end + size
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, end]}
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
