"""A function under another name, for libraries that are loaded later.

Libraries find functions by name. A shared object that holds one entry, a name with an absolute address (`SHN_ABS`),
is enough for the dynamic linker to find under it a function of another library. It has no code, and nothing that is
loaded is changed. Its form: System V ABI, chapters 4 and 5.
"""

from __future__ import annotations

import os
import platform
import struct
from typing import Any

__all__ = ["alias_library", "offer"]

_MACHINES = {"x86_64": 62, "aarch64": 183}  # EM_X86_64, EM_AARCH64: those that MLX has packages for
_LARGEST_PAGE = 1 << 16
_HEADER, _SEGMENT, _SYMBOL, _ENTRY = "<16sHHIQQQIHHHHHH", "<IIQQQQQQ", "<IBBHQQ", "<QQ"
_SHARED_OBJECT = 3  # ET_DYN
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551  # PT_LOAD, PT_DYNAMIC; PT_GNU_STACK, without which stacks become executable
_READ_WRITE = 6
_GLOBAL_FUNCTION, _ABSOLUTE = 1 << 4 | 2, 0xFFF1  # STB_GLOBAL and STT_FUNC; SHN_ABS
_HASH, _STRINGS, _SYMBOLS, _STRINGS_SIZE, _SYMBOL_SIZE = 4, 5, 6, 10, 11  # DT_…


def alias_library(name: str, address: int, machine: int) -> bytes:
    """A shared object in which `name` is what lies at `address`.

    Args:
        name: of the function.
        address: of the function in this process.
        machine: the processor's number in an ELF header.
    """
    strings = b"\0" + name.encode() + b"\0"
    symbols = bytes(struct.calcsize(_SYMBOL)) + struct.pack(_SYMBOL, 1, _GLOBAL_FUNCTION, 0, _ABSOLUTE, address, 0)
    buckets = struct.pack("<6I", 1, 2, 1, 0, 0, 0)  # one bucket, two symbols; the last number fills up 8 bytes
    at_symbols = struct.calcsize(_HEADER) + 3 * struct.calcsize(_SEGMENT)
    at_buckets = at_symbols + len(symbols)
    at_strings = at_buckets + len(buckets)
    at_table = -(-(at_strings + len(strings)) // 8) * 8
    entries = [
        (_HASH, at_buckets),
        (_STRINGS, at_strings),
        (_SYMBOLS, at_symbols),
        (_STRINGS_SIZE, len(strings)),
        (_SYMBOL_SIZE, struct.calcsize(_SYMBOL)),
        (0, 0),
    ]
    table = b"".join(struct.pack(_ENTRY, *entry) for entry in entries)
    identity = b"\x7fELF\2\1\1"  # 64 bits, least byte first, version 1
    sizes = struct.calcsize(_HEADER), struct.calcsize(_SEGMENT)
    header = struct.pack(_HEADER, identity, _SHARED_OBJECT, machine, 1, 0, sizes[0], 0, 0, *sizes, 3, 0, 0, 0)
    segments = [
        _segment(_LOAD, 0, at_table + len(table), _LARGEST_PAGE),
        _segment(_DYNAMIC, at_table, len(table), 8),
        _segment(_STACK, 0, 0, 16),
    ]
    return b"".join([header, *segments, symbols, buckets, strings]).ljust(at_table, b"\0") + table


def _segment(kind: int, start: int, size: int, alignment: int) -> bytes:
    return struct.pack(_SEGMENT, kind, _READ_WRITE, start, start, start, size, size, alignment)


def offer(name: str, function: Any) -> None:
    """Have libraries that are loaded from now on find `function` under `name`, before any other of that name.

    Args:
        name: to be found by.
        function: of a library that `ctypes` has loaded.

    Raises:
        OSError: this system has no way to do so.
    """
    import ctypes

    machine = _MACHINES.get(platform.machine())
    address = ctypes.cast(function, ctypes.c_void_p).value
    if machine is None or address is None:
        raise OSError(f"no shared objects for {platform.machine()} are written here")
    # It stays open: the linker knows libraries by their paths, and would take a later file of this number for this one.
    file = os.memfd_create(name)
    os.write(file, alias_library(name, address, machine))
    path = f"/proc/self/fd/{file}"
    found = ctypes.cast(getattr(ctypes.CDLL(path, mode=os.RTLD_LOCAL), name), ctypes.c_void_p).value
    if found != address:
        raise OSError(f"{name} was found at {found}, expected {address}")
    ctypes.CDLL(path, mode=os.RTLD_GLOBAL)
