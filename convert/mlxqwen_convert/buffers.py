"""Memory that NumPy's work on one chunk after another is done in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Buffers"]

_CACHE_LINE = 64
_PASSING_BYTES = 1 << 20


class Buffers:
    """Memory for one chunk after another, of any size: fresh memory takes as long as the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[Any]] = {}
        # The C library of Linux gives blocks larger than any freed so far back to the system, which zeroes them for
        # their next use: a twentieth of all time for the passing arrays of groups. Once it has seen this one, it keeps
        # them.
        np.empty(_PASSING_BYTES, np.uint8)

    def array(self, name: str, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        """One that begins where a line of the cache does: no vector then lies across two of them."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._kept or self._kept[name].nbytes < nbytes:
            self._kept.pop(name, None)  # the old one goes before the new one comes
            memory = np.empty(nbytes + _CACHE_LINE, np.uint8)
            self._kept[name] = memory[-memory.ctypes.data % _CACHE_LINE :]
        return self._kept[name][:nbytes].view(dtype).reshape(shape)
