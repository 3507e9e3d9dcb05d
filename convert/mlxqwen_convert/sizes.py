"""Sizes for people."""

from __future__ import annotations

__all__ = ["size_of"]


def size_of(nbytes: int) -> str:
    """Bytes in a unit that fits them, such as "1.19 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"
