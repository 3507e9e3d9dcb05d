"""OpenBLAS in place of the wheel's BLAS: when it is taken, that it is checked, and what it computes."""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mlxqwen import blas
from mlxqwen.blas import blas_in_use, computes_right, load_openblas

is_linux = sys.platform == "linux"
is_installed = is_linux and ctypes.util.find_library("openblas") is not None
needs_openblas = pytest.mark.skipif(not is_installed, reason="libopenblas0 is not installed")


def floats(address: Any, count: int) -> np.ndarray:
    return np.frombuffer(address, dtype=np.float32, count=count)


class Library:
    """`cblas_sgemm` by NumPy, with an error added to one number of each product of a given shape."""

    def __init__(self, wrong: tuple[int, int] | None = None) -> None:
        self._wrong = wrong
        self.shapes: list[tuple[int, int, int]] = []

    def cblas_sgemm(self, *arguments: Any) -> None:
        order, left, right, rows, columns, inner, _, x, x_step, w, w_step, _, out, out_step = arguments
        assert (order, left, right) == (101, 111, 112)  # of cblas.h: row-major, as it is, transposed
        assert (x_step, w_step, out_step) == (inner, inner, columns)
        product = floats(x, rows * inner).reshape(rows, inner) @ floats(w, columns * inner).reshape(columns, inner).T
        if self._wrong == (rows, columns):
            product += 1e-3
        ctypes.memmove(out, product.astype(np.float32).tobytes(), 4 * rows * columns)
        self.shapes.append((rows, columns, inner))


def test_three_products_are_checked() -> None:
    library = Library()
    assert computes_right(library)  # type: ignore[arg-type]
    assert len(library.shapes) == 3
    for rows, columns, _ in library.shapes:
        assert not computes_right(Library((rows, columns)))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["off", "0", " OFF ", "no"])
def test_it_can_be_switched_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(blas.VARIABLE, value)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("loaded"))
    assert not load_openblas()
    assert blas_in_use() == "MLX's own"


def test_a_machine_without_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(blas.VARIABLE)
    monkeypatch.setattr(blas, "_LIBRARY", "libnothing-such.so.0")
    assert not load_openblas()


def test_a_library_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(blas.VARIABLE)
    modes: list[int] = []

    def load(name: str, mode: int) -> Library:
        modes.append(mode)
        return Library((17, 20))

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not load_openblas()
    assert modes == [os.RTLD_LOCAL]


PROGRAM = """
import json, sys
if "mlx first" in sys.argv:
    import mlx.core
import mlxqwen
from mlxqwen import load
import mlx.core as mx
from mlxqwen.blas import blas_in_use
model, tokenizer = load()
ids = tokenizer.encode("How many letters are in the word strawberries, and how many of them are r?")
print(json.dumps([blas_in_use(), mx.concatenate([model(mx.array([ids]))[0, -1:]]).tolist()[0]]))
"""


def answer(*arguments: str, value: str) -> tuple[str, np.ndarray]:
    environment = {**os.environ, blas.VARIABLE: value}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    name, logits = json.loads(done.stdout)
    return name, np.array(logits)


@needs_openblas
def test_logits_are_those_of_mlx_within_the_rounding_of_float32() -> None:
    name, logits = answer(value="on")
    assert name.startswith("OpenBLAS ")
    own, expected = answer(value="off")
    assert own == "MLX's own"
    # Four layers of products of up to 512 numbers; 1e-5 of the largest is what another order of sums comes to.
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()
    assert not np.array_equal(logits, expected)  # other kernels ran


@needs_openblas
def test_a_process_that_imported_mlx_before_keeps_its_products() -> None:
    assert answer("mlx first", value="on")[0] == "MLX's own"
