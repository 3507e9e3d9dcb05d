"""A product shared among a processor's cores: each computes some of the outputs.

MLX computes what is asked of one CPU stream on one thread. So a matrix's outputs are dealt out to as many streams as
there are cores. Each output is the sum that it would be on one stream, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise

import mlx.core as mx

from mlxqwen.device import Device

__all__ = ["Shares", "on_core", "ranges", "shares_of"]

_LEAST = 1 << 19
"""Multiplications of a share: about 0.5 ms. Waiting for one another takes the threads about a tenth of that."""


@cache
def _stream(core: int) -> mx.ThreadLocalStream | None:
    """Where a core computes: the first on the default stream (None), the others on a stream of each thread's own."""
    return mx.new_thread_local_stream(mx.cpu) if core else None


def on_core(core: int) -> AbstractContextManager[object]:
    """While it is open, what is asked of MLX is asked of this core."""
    stream = _stream(core)
    return nullcontext() if stream is None else mx.stream(stream)


def ranges(size: int, cores: int, multiplications: int) -> list[slice]:
    """`size` outputs dealt out evenly to at most so many cores; to fewer where each would have too little to do."""
    count = max(1, min(cores, size, multiplications // _LEAST))
    return [slice(start, stop) for start, stop in pairwise(size * core // count for core in range(count + 1))]


class Shares:
    """What each core multiplies, of a matrix whose arrays have its outputs in the first axis. No bytes are copied.

    Args:
        cores: among how many.
        rows_at_once: rows that a matrix which is not packed is multiplied by in the time that reading it takes.
    """

    def __init__(self, cores: int, rows_at_once: int = 1) -> None:
        self.cores, self.rows_at_once = cores, rows_at_once

    def product(self, product: Callable[..., mx.array], x: mx.array, *arrays: mx.array) -> mx.array:
        """`product(x, *arrays)`, `[..., in]` → `[..., out]`; by parts of the arrays where that is a gain.

        The arrays are cut in every call: parts that were kept would not see what is changed in place.
        """
        size, width = len(arrays[0]), x.shape[-1]
        rows = x.size // width
        at_once = self.rows_at_once if len(arrays) == 1 else 1  # packed ones are multiplied row by row
        cuts = ranges(size, self.cores, width * size * max(1, rows // at_once))
        if len(cuts) == 1:
            return product(x, *arrays)
        outputs = []
        for core, cut in enumerate(cuts):
            with on_core(core):
                outputs.append(product(x, *[array[cut] for array in arrays]))
        return mx.concatenate(outputs, axis=-1)

    def product_of_rows(self, x: mx.array, weight: mx.array) -> mx.array:
        """`[..., in]` through `[in, out]`, a small matrix: each core reads it all, for some of the rows `[N, in]`."""
        multiplications = weight.size * (len(x) // self.rows_at_once)
        if x.ndim != 2 or multiplications < 2 * _LEAST:
            return x @ weight
        outputs = []
        for core, cut in enumerate(ranges(len(x), self.cores, multiplications)):
            with on_core(core):
                outputs.append(x[cut] @ weight)
        return mx.concatenate(outputs)


def shares_of(device: Device) -> Shares | None:
    """The shares of a matrix; None where one core, or a GPU, computes all."""
    return None if device.cores == 1 else Shares(device.cores, 64 if device.multiplies_by_openblas else 1)
