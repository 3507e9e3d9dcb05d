"""OpenBLAS on Linux: products of several rows by the system's library, in place of the one in MLX's wheel.

The wheel for Linux carries the reference BLAS, which knows no vector instructions. MLX looks its functions up by name
when it is loaded, and takes those that the process offers to all libraries by then. So the library is loaded, and its
products are checked, before `mlx.core` is first imported (`mlxqwen/__init__.py`). Results differ within float32's
rounding. `MLXQWEN_BLAS=off` leaves everything as it is; so does a process that has imported MLX before mlxqwen.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

__all__ = ["VARIABLE", "blas_in_use", "computes_right", "load_openblas", "uses_openblas"]

VARIABLE = "MLXQWEN_BLAS"
_LIBRARY = "libopenblas.so.0"  # of Debian, Ubuntu, Fedora and Arch
_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112
_CHECKED = ((3, 33, 64), (17, 20, 40), (64, 48, 96))  # rows, columns, inner: small, odd and in whole blocks
_SAMPLED = 40  # numbers of each product that are computed again

_openblas = ""


def uses_openblas() -> bool:
    """Whether OpenBLAS computes MLX's float32 products on the CPU."""
    return bool(_openblas)


def blas_in_use() -> str:
    """The library that computes float32 products on the CPU, for people to read."""
    return _openblas or "MLX's own"


def load_openblas() -> bool:
    """Load OpenBLAS for MLX, which must not be imported yet → whether MLX will use it. Never raises."""
    global _openblas
    if sys.platform != "linux" or os.environ.get(VARIABLE, "").strip().lower() in ("off", "0", "false", "no"):
        return False
    import ctypes

    try:
        library = ctypes.CDLL(_LIBRARY, mode=os.RTLD_LOCAL)
        if not computes_right(library):
            return False
        ctypes.CDLL(_LIBRARY, mode=os.RTLD_GLOBAL)
        describe = library.openblas_get_config
    except (OSError, AttributeError):  # not installed, or without what it should have
        return False
    describe.restype = ctypes.c_char_p
    _openblas = " ".join((describe() or b"OpenBLAS").decode(errors="replace").split()[:2])
    return True


def computes_right(library: ctypes.CDLL) -> bool:
    """Whether three products of `cblas_sgemm` hold within float32's bound; old builds are wrong on some processors."""
    return all(_computes_right(library, *shape) for shape in _CHECKED)


def _computes_right(library: ctypes.CDLL, rows: int, columns: int, inner: int) -> bool:
    """Whether `x @ w.T` has the right numbers, at places spread over it."""
    import ctypes

    x = [((7 * n) % 31 - 15) / 16 for n in range(rows * inner)]
    w = [((11 * n) % 29 - 14) / 16 for n in range(columns * inner)]
    floats, zeros = ctypes.c_float, [0.0] * (rows * columns)
    left, right, out = (floats * len(x))(*x), (floats * len(w))(*w), (floats * len(zeros))(*zeros)
    one, none = ctypes.c_float(1.0), ctypes.c_float(0.0)
    library.cblas_sgemm(
        *(
            _ROW_MAJOR,
            _NO_TRANSPOSE,
            _TRANSPOSE,
            rows,
            columns,
            inner,
            one,
            left,
            inner,
            right,
            inner,
            none,
            out,
            columns,
        )
    )
    for place in range(0, rows * columns, max(1, rows * columns // _SAMPLED)):
        row, column = divmod(place, columns)
        terms = [x[row * inner + n] * w[column * inner + n] for n in range(inner)]
        if abs(out[place] - sum(terms)) > inner * 2.0**-23 * sum(map(abs, terms)):
            return False
    return True
