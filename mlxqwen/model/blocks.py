"""Products by a matrix that is made a block at a time: dequantized, or turned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx

from mlxqwen.model.cores import on_core, ranges

__all__ = ["by_blocks"]

_BLOCK = 1 << 20
"""Numbers of a block at most: 4 MiB. Larger ones do not stay in a core's caches."""

_TILES = 64
"""Blocks begin at multiples of so many rows, where there are as many: see `openblas_product` and `turned_product`."""


def by_blocks(
    product: Callable[[slice], mx.array], rows: int, columns: int, count: int, cores: int, multiple: int = 1
) -> mx.array:
    """`product` of each block of a matrix's rows → their outputs side by side, evaluated unless MLX traces a function.

    Each core's block is there before the next ones are begun: MLX's CPU backend runs ahead, and would hold what was
    made of many matrices at once.

    Args:
        product: some rows of the matrix → `[count, rows of the block]`.
        rows, columns: of the matrix.
        count: rows that are multiplied by it.
        cores: that may compute, each another block.
        multiple: blocks have so many rows, or a multiple of it; it divides `rows`.
    """
    at_once = len(ranges(rows // multiple, cores, count * columns * rows))
    cuts = _cuts(rows, columns, at_once, multiple)
    outputs: list[mx.array] = []
    for first in range(0, len(cuts), at_once):
        for core, cut in enumerate(cuts[first : first + at_once]):
            with on_core(core):
                outputs.append(product(cut))
        _evaluate(outputs[first:])
    return outputs[0] if len(cuts) == 1 else mx.concatenate(outputs, axis=-1)


def _evaluate(arrays: Sequence[mx.array]) -> None:
    """Nothing is done of arrays without numbers, as in a function that `mx.compile` traces."""
    try:
        mx.eval(arrays)
    except ValueError as error:
        if "function transformations" not in str(error):
            raise


def _cuts(rows: int, columns: int, at_once: int, multiple: int = 1) -> list[slice]:
    """Blocks of a matrix, `at_once` times a power of two of them: matrices of which one is twice as large as the other
    then have blocks of one size, for which MLX uses the same memory again.
    """
    count = at_once << (-(-rows * columns // (_BLOCK * at_once)) - 1).bit_length()
    count = min(count, rows // multiple)
    step = _TILES if rows >= _TILES * count else multiple
    starts = [rows // step * number // count * step for number in range(count)]
    return [slice(start, stop) for start, stop in pairwise([*starts, rows])]
