"""AWQ's words → MLX's, in NumPy, which takes a tenth of the time of MLX's CPU backend; and whether they agree.

The two go different ways: one exchanges halves of 8 × 8 matrices of nibbles, the other looks each nibble up by the
definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxqwen_convert.awq import NIBBLES
from mlxqwen_convert.buffers import Buffers

__all__ = ["hold_the_same", "mlx_words"]

_SHIFTS = 4 * np.array(NIBBLES, np.uint32)
_NIBBLE = np.uint32(15)

Words = NDArray[Any]


def mlx_words(qweight: Words) -> Words:
    """uint32 `[out, in / 8]` from `[in, out / 8]`: eight words are an 8 × 8 matrix of nibbles to transpose."""
    words, columns = len(qweight) // 8, qweight.shape[1]
    by_input = qweight.reshape(words, 8, columns).swapaxes(0, 1).copy()
    for half, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = by_input.reshape(-1, 2, half * words * columns)
        upper, lower = pairs[:, 0], pairs[:, 1]
        exchanged = upper >> np.uint32(4 * half)
        exchanged ^= lower
        exchanged &= np.uint32(mask)
        lower ^= exchanged
        exchanged <<= np.uint32(4 * half)
        upper ^= exchanged
    found = np.empty((columns, 8, words), np.uint32)
    for column, nibble in enumerate(NIBBLES):
        found[:, column] = by_input[nibble].T
    return found.reshape(8 * columns, words)


def hold_the_same(weight: Words, qweight: Words, buffers: Buffers) -> bool:
    """Whether MLX's words `[out, in / 8]` hold AWQ's `[in, out / 8]`, nibble by nibble."""
    columns, words = len(weight) // 8, weight.shape[1]
    by_output, by_input, shifted, differing = (
        buffers.array(name, np.uint32, 8, words, columns) for name in ("written", "source", "shifted", "differing")
    )
    by_word = differing.reshape(words, columns, 8)  # a plain transpose on the way, as words far apart are slow to fetch
    np.copyto(by_word.reshape(words, 8 * columns), weight.T)
    np.copyto(by_output, by_word.transpose(2, 0, 1))
    np.copyto(by_input, qweight.reshape(words, 8, columns).swapaxes(0, 1))
    written, source, shifted, differing = (part.reshape(8, -1) for part in (by_output, by_input, shifted, differing))
    differing.fill(0)
    for number in range(8):
        np.right_shift(source[number], _SHIFTS[:, None], out=shifted)
        np.bitwise_xor(shifted, written, out=shifted)
        np.bitwise_or(differing, shifted, out=differing)
        np.right_shift(written, np.uint32(4), out=written)
    np.bitwise_and(differing, _NIBBLE, out=differing)
    return not differing.any()
