"""OpenBLAS on Linux: products of several rows by it, in place of the library in MLX's wheel.

The wheel for Linux carries the reference BLAS, which knows no vector instructions. MLX looks its functions up by name
when it is loaded, and takes those that the process offers to all libraries by then. So the system's OpenBLAS, or else
that of the package `scipy-openblas32`, is loaded, its products are checked, and MLX is offered them, before `mlx.core`
is first imported (`mlxqwen/__init__.py`). Results differ within float32's rounding. `MLXQWEN_BLAS=off` leaves
everything as it is; so does a process that has imported MLX before mlxqwen.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["VARIABLE", "blas_in_use", "computes_right", "has_small_kernels", "load_openblas", "uses_openblas"]

VARIABLE = "MLXQWEN_BLAS"
_PRODUCT = "cblas_sgemm"
_WITH_SMALL_KERNELS = ("cooperlake", "sapphirerapids", "skylakex")  # its names for processors with AVX-512
_SYSTEMS = "libopenblas.so.0"  # of Debian, Ubuntu, Fedora and Arch
_PACKAGE = "scipy_openblas32"  # OpenBLAS for x86-64 and aarch64, kept by the makers of NumPy's wheels
_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112
_CHECKED = ((3, 33, 64), (17, 20, 40), (64, 48, 96))  # rows, columns, inner: small, odd and in whole blocks
_ON, _OFF = ("", "on", "1", "true", "yes"), ("off", "0", "false", "no")
_SAMPLED = 40  # numbers of each product that are computed again

_openblas: _OpenBLAS | None = None


class _OpenBLAS:
    """A library that is loaded, whose functions may have a prefix."""

    def __init__(self, path: str, prefix: str) -> None:
        """Raises OSError and AttributeError where it is not OpenBLAS."""
        import ctypes

        self._path, self._prefix = path, prefix
        library = ctypes.CDLL(path, mode=os.RTLD_LOCAL)
        self.product, self._set_threads, describe, core = (
            library[prefix + name]
            for name in (_PRODUCT, "openblas_set_num_threads", "openblas_get_config", "openblas_get_corename")
        )
        describe.restype = core.restype = ctypes.c_char_p
        self.name = " ".join((describe() or b"OpenBLAS").decode(errors="replace").split()[:2])
        self.has_small_kernels = (core() or b"").decode(errors="replace").lower() in _WITH_SMALL_KERNELS

    def use_one_thread(self) -> None:
        """Products are shared among MLX's threads (`mlxqwen/model/cores.py`). OpenBLAS's own wait for one another in a
        loop that computes nothing, which takes several times as long as the product where other programs run.
        """
        self._set_threads(1)

    def offer(self) -> None:
        """Have MLX find the product. Raises OSError where there is no way to."""
        import ctypes

        from mlxqwen.symbol_alias import offer

        try:
            offer(_PRODUCT, self.product)
        except OSError:  # such as where nothing may be loaded from memory
            if self._prefix:
                raise
            ctypes.CDLL(self._path, mode=os.RTLD_GLOBAL)


def uses_openblas() -> bool:
    """Whether OpenBLAS computes MLX's float32 products on the CPU.

    Raises:
        OptionError: `MLXQWEN_BLAS` is neither on nor off; nothing was loaded then.
    """
    if _asked() not in (*_ON, *_OFF):
        from mlxqwen.errors import OptionError

        raise OptionError(f"{VARIABLE}: found {os.environ[VARIABLE][:40]!r}, expected on or off")
    return _openblas is not None


def has_small_kernels() -> bool:
    """Whether OpenBLAS has kernels for small products on this processor, which read the matrices where they lie."""
    return _openblas is not None and _openblas.has_small_kernels


def blas_in_use() -> str:
    """The library that computes float32 products on the CPU, for people to read."""
    return "MLX's own" if _openblas is None else _openblas.name


def load_openblas() -> bool:
    """Load OpenBLAS for MLX, which must not be imported yet → whether MLX will use it. Never raises."""
    global _openblas
    if sys.platform != "linux" or _asked() not in _ON:
        return False
    for path, prefix in _candidates():
        try:
            library = _OpenBLAS(path, prefix)
            if computes_right(library.product):
                library.use_one_thread()
                library.offer()
                _openblas = library
                return True
        except (OSError, AttributeError):  # not installed, or without what it should have
            continue
    return False


def _asked() -> str:
    return os.environ.get(VARIABLE, "").strip().lower()


def _candidates() -> Iterator[tuple[str, str]]:
    """Paths of libraries with the prefix of their functions' names, the best first."""
    yield _SYSTEMS, ""
    from importlib.machinery import PathFinder

    package = PathFinder.find_spec(_PACKAGE)  # not imported: it would read its own metadata
    for folder in (package and package.submodule_search_locations) or ():
        yield f"{folder}/lib/libscipy_openblas.so", "scipy_"


def computes_right(product: Callable[..., Any]) -> bool:
    """Whether three products of `cblas_sgemm` hold within float32's bound; old builds are wrong on some processors."""
    return all(_computes_right(product, *shape) for shape in _CHECKED)


def _computes_right(product: Callable[..., Any], rows: int, columns: int, inner: int) -> bool:
    """Whether `x @ w.T` has the right numbers, at places spread over it."""
    import ctypes

    x = [((7 * n) % 31 - 15) / 16 for n in range(rows * inner)]
    w = [((11 * n) % 29 - 14) / 16 for n in range(columns * inner)]
    floats, zeros = ctypes.c_float, [0.0] * (rows * columns)
    left, right, out = (floats * len(x))(*x), (floats * len(w))(*w), (floats * len(zeros))(*zeros)
    one, none = ctypes.c_float(1.0), ctypes.c_float(0.0)
    product(
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
        if not abs(out[place] - sum(terms)) <= inner * 2.0**-23 * sum(map(abs, terms)):  # so is what is no number
            return False
    return True
