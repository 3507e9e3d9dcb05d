"""Weights read into place: every form that a parameter's tensors come in, beside the same by NumPy."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.errors import CheckpointError
from mlxqwen.files.checkpoint import Checkpoint, TensorReader, save_safetensors
from mlxqwen.model.reading import ParameterSource, WeightReader
from tests.checkpoint_arrays import arrays_of

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def stored(path: Path, arrays: dict[str, mx.array]) -> Checkpoint:
    save_safetensors(path / "model.safetensors", arrays, {})
    return Checkpoint.open(path)


def random(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def read(checkpoint: Checkpoint, sources: list[ParameterSource], dtype: mx.Dtype = mx.float32) -> mx.array:
    with TensorReader() as files:
        return WeightReader(files, dtype).read({"weight": sources})["weight"]


@pytest.mark.parametrize("of_files", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_tensors_lie_one_behind_the_other(tmp_path: Path, of_files: mx.Dtype, dtype: mx.Dtype) -> None:
    parts = {name: random(rows, 5, dtype=of_files) for name, rows in (("q", 7), ("k", 3), ("v", 1))}
    checkpoint = stored(tmp_path, parts)
    found = read(checkpoint, [ParameterSource((checkpoint[name],)) for name in parts], dtype)
    expected = np.concatenate([numbers(part.astype(dtype)) for part in parts.values()])
    assert found.dtype == dtype
    assert np.array_equal(numbers(found), expected)


def test_each_tensor_may_have_a_dtype_of_its_own(tmp_path: Path) -> None:
    parts = {name: random(4, 6, dtype=dtype) for name, dtype in zip("abc", DTYPES, strict=True)}
    checkpoint = stored(tmp_path, parts)
    infos = [checkpoint[name] for name in parts]
    joined = read(checkpoint, [ParameterSource((info,)) for info in infos])
    assert np.array_equal(numbers(joined), np.concatenate([numbers(part) for part in parts.values()]))
    stack = read(checkpoint, [ParameterSource(tuple(infos), stacked=True)])
    assert np.array_equal(numbers(stack), np.stack([numbers(part) for part in parts.values()]))


def test_experts_apart_stacked_and_fused_become_the_same(tmp_path: Path) -> None:
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


def test_codes_and_numbers_of_one_layer_after_another(tmp_path: Path) -> None:
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
    with TensorReader() as files:
        reader = WeightReader(files, mx.float32)
        found = [
            reader.read(
                {name: [ParameterSource((checkpoint[name],))] for name in arrays if name.startswith(str(layer))}
            )
            for layer in range(3)
        ]
    for name, array in ((name, array) for layer in found for name, array in layer.items()):
        assert array.dtype == (mx.uint32 if "weight" in name else mx.float32)
        assert np.array_equal(numbers(array), numbers(arrays[name]))


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, {"weight": random(64, 64)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file ends at byte [\d,]+, 100 more"):
        read(checkpoint, [ParameterSource((checkpoint["weight"],))])


def test_more_files_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.files.checkpoint.reading._MOST_OPEN_FILES", 2)
    parts = [random(2, 3) for _ in range(5)]
    for number, part in enumerate(parts):
        save_safetensors(tmp_path / f"model-{number + 1:05d}-of-00005.safetensors", {f"part{number}": part}, {})
    checkpoint = Checkpoint.open(tmp_path)
    sources = [ParameterSource((checkpoint[f"part{number}"],)) for number in (0, 1, 2, 3, 4, 0)]
    expected = np.concatenate([np.array(part) for part in (*parts, parts[0])])
    assert np.array_equal(np.array(read(checkpoint, sources)), expected)
