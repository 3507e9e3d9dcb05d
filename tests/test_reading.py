"""Weights read into place: every form that a parameter's tensors come in, beside the same by NumPy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.errors import CheckpointError
from mlxqwen.files.checkpoint import Checkpoint, blank, save_safetensors
from mlxqwen.model import reading
from mlxqwen.model.reading import ParameterSource, WeightReader
from tests.checkpoint_arrays import arrays_of

Reader = Callable[..., mx.array]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def stored(path: Path, arrays: dict[str, mx.array]) -> Checkpoint:
    save_safetensors(path / "model.safetensors", arrays, {})
    return Checkpoint.open(path)


def random(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


@pytest.fixture(autouse=True, params=["whole", "in pieces"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """By one thread and at once, or by three threads in pieces of a few numbers, into memory that is not cleared."""
    if request.param == "whole":
        return 1
    monkeypatch.setattr(reading, "_PIECE", 24)
    monkeypatch.setattr(reading, "_LEAST_OF_A_THREAD", 1)
    monkeypatch.setattr(blank, "_LEAST_BLANK", 0)
    monkeypatch.setattr(blank, "_LEAST_PAGES", 0)
    return 3


@pytest.fixture
def read(threads: int) -> Reader:
    def read(checkpoint: Checkpoint, sources: list[ParameterSource], dtype: mx.Dtype = mx.float32) -> mx.array:
        with WeightReader(dtype, threads) as reader:
            return reader.read({"weight": sources})["weight"]

    return read


@pytest.mark.parametrize("of_files", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_tensors_lie_one_behind_the_other(
    tmp_path: Path, read: Reader, of_files: mx.Dtype, dtype: mx.Dtype
) -> None:
    parts = {name: random(rows, 5, dtype=of_files) for name, rows in (("q", 7), ("k", 3), ("v", 1))}
    checkpoint = stored(tmp_path, parts)
    found = read(checkpoint, [ParameterSource((checkpoint[name],)) for name in parts], dtype)
    expected = np.concatenate([numbers(part.astype(dtype)) for part in parts.values()])
    assert found.dtype == dtype
    assert np.array_equal(numbers(found), expected)


def test_each_tensor_may_have_a_dtype_of_its_own(tmp_path: Path, read: Reader) -> None:
    parts = {name: random(4, 6, dtype=dtype) for name, dtype in zip("abc", DTYPES, strict=True)}
    checkpoint = stored(tmp_path, parts)
    infos = [checkpoint[name] for name in parts]
    joined = read(checkpoint, [ParameterSource((info,)) for info in infos])
    assert np.array_equal(numbers(joined), np.concatenate([numbers(part) for part in parts.values()]))
    stack = read(checkpoint, [ParameterSource(tuple(infos), stacked=True)])
    assert np.array_equal(numbers(stack), np.stack([numbers(part) for part in parts.values()]))


def test_experts_apart_stacked_and_fused_become_the_same(tmp_path: Path, read: Reader) -> None:
    gate, up = random(3, 4, 6, dtype=mx.bfloat16), random(3, 5, 6, dtype=mx.bfloat16)
    even = random(3, 4, 6, dtype=mx.bfloat16)
    apart = {f"{name}{expert}": array[expert] for name, array in (("g", gate), ("u", up)) for expert in range(3)}
    checkpoint = stored(tmp_path, {**apart, "gate": gate, "up": up, "both": mx.concatenate([gate, even], axis=1)})
    expected = np.concatenate([numbers(gate), numbers(up)], axis=1)
    stacks = [ParameterSource(tuple(checkpoint[f"{name}{e}"] for e in range(3)), stacked=True) for name in "gu"]
    whole = [ParameterSource((checkpoint[name],)) for name in ("gate", "up")]
    both = checkpoint["both"]
    halves = [ParameterSource((both,), slice(0, 4)), ParameterSource((both,), slice(4, None))]
    for dtype in (mx.float32, mx.bfloat16):
        assert np.array_equal(numbers(read(checkpoint, stacks, dtype)), expected)
        assert np.array_equal(numbers(read(checkpoint, whole, dtype)), expected)
        assert np.array_equal(
            numbers(read(checkpoint, halves, dtype)), numbers(arrays_of(checkpoint, ["both"])["both"])
        )
        for half, array in zip(halves, (gate, even), strict=True):
            assert np.array_equal(numbers(read(checkpoint, [half], dtype)), numbers(array))


def test_codes_and_numbers_of_one_layer_after_another(tmp_path: Path, threads: int) -> None:
    """The memory that numbers pass through is used again: what was read before stays as it was."""
    arrays = {
        f"{layer}.{name}": array
        for layer in range(3)
        for name, array in (
            ("weight", mx.random.randint(0, 1 << 30, (8, 4)).astype(mx.uint32)),
            ("scales", random(8, 3, dtype=mx.float16)),
            ("norm", random(5, dtype=mx.bfloat16)),
        )
    }
    checkpoint = stored(tmp_path, arrays)
    with WeightReader(mx.float32, threads) as reader:
        found = [
            reader.read(
                {name: [ParameterSource((checkpoint[name],))] for name in arrays if name.startswith(str(layer))}
            )
            for layer in range(3)
        ]
    for name, array in ((name, array) for layer in found for name, array in layer.items()):
        assert array.dtype == (mx.uint32 if "weight" in name else mx.float32)
        assert np.array_equal(numbers(array), numbers(arrays[name]))


def test_a_file_that_ends_early_is_named(tmp_path: Path, read: Reader) -> None:
    checkpoint = stored(tmp_path, {"weight": random(64, 64)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file ends at byte [\d,]+, 100 more"):
        read(checkpoint, [ParameterSource((checkpoint["weight"],))])


def test_more_files_than_are_kept_open(tmp_path: Path, read: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.files.checkpoint.reading._MOST_OPEN_FILES", 2)
    parts = [random(2, 3) for _ in range(5)]
    for number, part in enumerate(parts):
        save_safetensors(tmp_path / f"model-{number + 1:05d}-of-00005.safetensors", {f"part{number}": part}, {})
    checkpoint = Checkpoint.open(tmp_path)
    sources = [ParameterSource((checkpoint[f"part{number}"],)) for number in (0, 1, 2, 3, 4, 0)]
    expected = np.concatenate([np.array(part) for part in (*parts, parts[0])])
    assert np.array_equal(np.array(read(checkpoint, sources)), expected)


def test_of_several_files_that_end_early_the_first_is_named(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread comes first; and those that read on are waited for."""
    for name in "abcd":
        save_safetensors(tmp_path / f"model-{name}.safetensors", {name: random(40)}, {})
    checkpoint = Checkpoint.open(tmp_path)
    for name in "bcd":
        path = tmp_path / f"model-{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-160])
    preadv, under_way = os.preadv, []

    def counted(descriptor: int, buffers: list[memoryview], position: int) -> int:
        under_way.append(descriptor)
        count = preadv(descriptor, buffers, position)
        under_way.remove(descriptor)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    sources = [ParameterSource((checkpoint[name],)) for name in "abcd"]
    with WeightReader(mx.float32, threads) as reader, pytest.raises(CheckpointError, match=r"model-b.*160 more"):
        reader.read({source.tensors[0].name: [source] for source in sources})
    assert not under_way


@pytest.mark.parametrize("together", [False, True])
def test_blank_arrays_are_what_is_written_to_them(*, together: bool) -> None:
    forms: dict[str, Any] = {
        f"{dtype} {size}": ((2, size), dtype)
        for dtype in (mx.uint16, mx.uint32, mx.float16, mx.float32)
        for size in (3, 1 << 17)
    }
    forms["large"] = (1 << 23,), mx.uint16
    before = mx.get_active_memory()
    arrays = blank.blank_arrays(forms, [*forms] if together else ())
    gone = f"{mx.float32} {1 << 17}"
    arrays.pop(gone)
    held = mx.get_active_memory() - before - sum(array.nbytes for array in arrays.values())
    assert (held > 1 << 19) == together  # of the others that are parts of one
    forms.pop(gone)
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == forms
    for number, array in enumerate(arrays.values()):
        numbers_of: Any = array
        memory = memoryview(numbers_of).cast("B")
        memory[:] = bytes([number]) * len(memory)
    for number, array in enumerate(arrays.values()):
        assert np.all(np.array(array).view(np.uint8) == number)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux gives pages when asked")
def test_pages_that_were_asked_for_are_there() -> None:
    memory: Any = blank.blank_arrays({"": ((1 << 22,), mx.uint32)})[""]
    as_bytes = memoryview(memory).cast("B")
    blank.have_pages(as_bytes)
    before = getrusage(RUSAGE_SELF).ru_minflt
    as_bytes[:: os.sysconf("SC_PAGE_SIZE")] = bytes(len(as_bytes) // os.sysconf("SC_PAGE_SIZE"))
    assert getrusage(RUSAGE_SELF).ru_minflt - before < 1000  # of 4096 pages of 4 KiB


def test_without_pages_to_ask_for_weights_are_the_same(
    tmp_path: Path, read: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blank, "_populate", lambda: None)
    part = random(300, 300, dtype=mx.bfloat16)
    checkpoint = stored(tmp_path, {"part": part})
    assert np.array_equal(numbers(read(checkpoint, [ParameterSource((checkpoint["part"],))])), numbers(part))
