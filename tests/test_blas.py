"""OpenBLAS in place of the wheel's BLAS: when it is taken, that it is checked, and what it computes."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mlxqwen import blas, symbol_alias
from mlxqwen.blas import blas_in_use, computes_right, has_small_kernels, load_openblas
from mlxqwen.device import current_device
from mlxqwen.errors import OptionError
from mlxqwen.symbol_alias import alias_library, offer

is_linux = sys.platform == "linux"
needs_linux = pytest.mark.skipif(not is_linux, reason="MLX's packages for Linux alone carry the reference BLAS")
is_there = {
    "system": is_linux and ctypes.util.find_library("openblas") is not None,
    "package": is_linux and importlib.util.find_spec("scipy_openblas32") is not None,
}
sources = pytest.mark.parametrize(
    "source",
    [
        pytest.param("system", marks=pytest.mark.skipif(not is_there["system"], reason="no libopenblas0")),
        pytest.param("package", marks=pytest.mark.skipif(not is_there["package"], reason="no scipy-openblas32")),
    ],
)


def floats(address: Any, count: int) -> np.ndarray:
    return np.frombuffer(address, dtype=np.float32, count=count)


class Product:
    """`cblas_sgemm` by NumPy, with an error added to the products of a given shape."""

    def __init__(self, wrong: tuple[int, int] | None = None, error: float = 1e-3) -> None:
        self._wrong, self._error = wrong, error
        self.shapes: list[tuple[int, int, int]] = []

    def __call__(self, *arguments: Any) -> None:
        order, left, right, rows, columns, inner, _, x, x_step, w, w_step, _, out, out_step = arguments
        assert (order, left, right) == (101, 111, 112)  # of cblas.h: row-major, as it is, transposed
        assert (x_step, w_step, out_step) == (inner, inner, columns)
        product = floats(x, rows * inner).reshape(rows, inner) @ floats(w, columns * inner).reshape(columns, inner).T
        if self._wrong == (rows, columns):
            product += self._error
        ctypes.memmove(out, product.astype(np.float32).tobytes(), 4 * rows * columns)
        self.shapes.append((rows, columns, inner))


def test_three_products_are_checked() -> None:
    product = Product()
    assert computes_right(product)
    assert len(product.shapes) == 3
    for rows, columns, _ in product.shapes:
        assert not computes_right(Product((rows, columns)))
        assert not computes_right(Product((rows, columns), float("nan")))


@pytest.mark.parametrize("value", ["off", "0", " OFF ", "no"])
def test_it_can_be_switched_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(blas.VARIABLE, value)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("loaded"))
    assert not load_openblas()
    assert blas_in_use() == "MLX's own"


@pytest.mark.parametrize("value", ["of", "none", "2", "openblas"])
def test_another_word_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(blas.VARIABLE, value)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("loaded"))
    assert not load_openblas()
    current_device.cache_clear()
    with pytest.raises(OptionError, match=f"^MLXQWEN_BLAS: found '{value}', expected on or off$"):
        current_device()


@pytest.mark.parametrize("value", ["", "on", " ON ", "1", "true", "yes"])
def test_words_that_leave_it_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def candidates() -> Iterator[tuple[str, str]]:
        tried.append(value)
        yield from ()

    monkeypatch.setenv(blas.VARIABLE, value)
    monkeypatch.setattr(blas, "_candidates", candidates)
    assert not load_openblas()
    assert not blas.uses_openblas()
    assert bool(tried) == (sys.platform == "linux")


def test_a_machine_without_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(blas.VARIABLE)
    monkeypatch.setattr(blas, "_SYSTEMS", "libnothing-such.so.0")
    monkeypatch.setattr(blas, "_PACKAGE", "nothing_such")
    assert not load_openblas()


class Library:
    """What stands for an OpenBLAS that was loaded, on four threads."""

    def __init__(self, product: Callable[..., None], name: str) -> None:
        self.product, self.name, self.threads, self.has_small_kernels = product, name, 4, name == "right"

    def use_one_thread(self) -> None:
        self.threads = 1

    def offer(self) -> None:
        symbol_alias.offer("cblas_sgemm", self.product)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What MLX would be offered, on a Linux where nothing is loaded yet."""
    functions: list[object] = []
    monkeypatch.delenv(blas.VARIABLE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_openblas", None)
    monkeypatch.setattr(symbol_alias, "offer", lambda name, function: functions.append((name, function)))
    return functions


def test_the_first_library_that_is_right_is_taken(offered: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, right = Library(Product((17, 20)), "wrong"), Library(Product(), "right")
    libraries = {"a": wrong, "b": right}
    monkeypatch.setattr(blas, "_OpenBLAS", lambda path, prefix: libraries[path])
    monkeypatch.setattr(blas, "_candidates", lambda: [("a", ""), ("b", ""), ("not looked at", "")])
    assert load_openblas()
    assert offered == [("cblas_sgemm", right.product)]
    assert blas_in_use() == "right"
    assert has_small_kernels()
    assert (wrong.threads, right.threads) == (4, 1)


def test_a_library_that_is_wrong_is_not_taken(offered: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_OpenBLAS", lambda path, prefix: Library(Product((17, 20)), "wrong"))
    assert not load_openblas()
    assert not offered
    assert blas_in_use() == "MLX's own"
    assert not has_small_kernels()


@needs_linux
def test_a_library_without_its_functions_is_not_taken(offered: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_SYSTEMS", "libc.so.6")
    monkeypatch.setattr(blas, "_PACKAGE", "nothing_such")
    assert not load_openblas()
    assert not offered


@sources
def test_where_nothing_is_loaded_from_memory_plain_names_are_offered_as_they_are(
    offered: list[object], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def forbidden(name: str, function: object) -> None:
        raise OSError("Operation not permitted")

    loaded: list[tuple[str, int]] = []
    load = ctypes.CDLL

    def recorded(path: str, mode: int) -> ctypes.CDLL:
        loaded.append((path, mode))
        return load(path, mode=os.RTLD_LOCAL)

    monkeypatch.setattr(symbol_alias, "offer", forbidden)
    monkeypatch.setattr(blas, "_SYSTEMS", blas._SYSTEMS if source == "system" else "libnothing-such.so.0")
    monkeypatch.setattr(ctypes, "CDLL", recorded)
    assert load_openblas() == (source == "system")
    assert ((blas._SYSTEMS, os.RTLD_GLOBAL) in loaded) == (source == "system")


@needs_linux
def test_a_function_is_found_under_another_name() -> None:
    library = ctypes.CDLL("libc.so.6")
    offer("mlxqwen_absolute_value", library["labs"])
    everything = ctypes.CDLL(None)
    assert everything["mlxqwen_absolute_value"](-5) == 5
    offer("mlxqwen_length", library["strlen"])
    assert (everything["mlxqwen_length"](b"four"), everything["mlxqwen_absolute_value"](-6)) == (4, 6)
    with pytest.raises(AttributeError):
        everything["mlxqwen_absolute"]


def test_other_processors_have_no_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        offer("mlxqwen_nothing", ctypes.CFUNCTYPE(None)(lambda: None))


@pytest.mark.parametrize("name", ["f", "cblas_sgemm", "a_name_of_another_length"])
def test_an_alias_is_one_symbol_without_code(name: str) -> None:
    """Read as the System V ABI lays it out; only the dynamic section leads to the rest."""
    data = alias_library(name, 0x1234_5678_9ABC, 183)

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[place : place + size], "little")

    assert data[:7] == b"ELF"
    assert (number(16, 2), number(18, 2)) == (3, 183)
    start, size, count = number(32, 8), number(54, 2), number(56, 2)
    segments = {number(start + n * size, 4): start + n * size for n in range(count)}
    assert not any(number(place + 4, 4) & 1 for place in segments.values())  # none can be executed
    table, length = (number(segments[2] + offset, 8) for offset in (8, 32))
    assert table + length == len(data)
    tags = {number(place, 8): number(place + 8, 8) for place in range(table, table + length, 16)}
    assert (number(tags[4], 4), number(tags[4] + 4, 4)) == (1, 2)  # a bucket, two symbols
    symbol = tags[6] + number(tags[4] + 8, 4) * tags[11]
    text = data[tags[5] + number(symbol, 4) : tags[5] + tags[10]]
    assert text == name.encode() + b"\0"
    assert (number(symbol + 6, 2), number(symbol + 8, 8)) == (0xFFF1, 0x1234_5678_9ABC)


PROGRAM = """
import json, sys
source, *rest = sys.argv[1:]
if rest:
    import mlx.core
import mlxqwen
from mlxqwen import blas
if source == "package":
    blas._SYSTEMS = "libnothing-such.so.0"
else:
    blas._PACKAGE = "nothing_such"
from mlxqwen import load
import mlx.core as mx
model, tokenizer = load()
ids = tokenizer.encode("How many letters are in the word strawberries, and how many of them are r?")
print(json.dumps([blas.blas_in_use(), mx.concatenate([model(mx.array([ids]))[0, -1:]]).tolist()[0]]))
"""


def answer(source: str, *arguments: str, value: str) -> tuple[str, np.ndarray]:
    environment = {**os.environ, blas.VARIABLE: value}
    command = [sys.executable, "-c", PROGRAM, source, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    name, logits = json.loads(done.stdout)
    return name, np.array(logits)


@sources
def test_logits_are_those_of_mlx_within_the_rounding_of_float32(source: str) -> None:
    name, logits = answer(source, value="on")
    assert name.startswith("OpenBLAS ")
    own, expected = answer(source, value="off")
    assert own == "MLX's own"
    # Four layers of products of up to 512 numbers; 1e-5 of the largest is what another order of sums comes to.
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()
    assert not np.array_equal(logits, expected)  # other kernels ran


@sources
def test_a_process_that_imported_mlx_before_keeps_its_products(source: str) -> None:
    assert answer(source, "mlx first", value="on")[0] == "MLX's own"
