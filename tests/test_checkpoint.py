from __future__ import annotations

import copy
import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxqwen.errors import CheckpointError, MlxqwenError, UnsupportedFormatError
from mlxqwen.files.checkpoint import (
    INDEX_NAME,
    ITEM_BYTES,
    MLX_DTYPES,
    Checkpoint,
    load_safetensors,
    read_header,
    save_safetensors,
    write_checkpoint,
)
from tests.checkpoint_arrays import arrays_of

Header = dict[str, Any]
FRESH_PROCESS = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
SCALAR = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}


def file_bytes(header: Header | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(path: Path, header: Header | bytes, data: bytes = b"") -> Path:
    path.write_bytes(file_bytes(header, data))
    return path


def reference_table(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the reference implementation makes of a file."""
    with safetensors.safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def our_table(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_header(path)[0].items()}


def bits(array: mx.array) -> bytes:
    """An array's bytes; through a view, since numpy has no bfloat16."""
    mx.eval(array)
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes() if array.size else b""


# Reading one file


@pytest.mark.parametrize(("dtype", "mlx_name"), MLX_DTYPES.items())
def test_dtypes_as_mlx_has_them(tmp_path: Path, dtype: str, mlx_name: str) -> None:
    size = ITEM_BYTES[dtype]
    data = bytes(i % 2 for i in range(6 * size))
    header = {"t": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * size]}}
    write(tmp_path / "model.safetensors", header, data)
    opened = Checkpoint.open(tmp_path)
    array = arrays_of(opened)["t"]
    assert (array.dtype, array.shape) == (getattr(mx, mlx_name), (2, 3))
    assert bits(array) == opened.read("t") == data
    assert opened.nbytes == opened.tensors["t"].nbytes == len(data)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES.keys() - MLX_DTYPES.keys()))
def test_dtypes_that_mlx_has_not(tmp_path: Path, dtype: str) -> None:
    size = ITEM_BYTES[dtype]
    header = {"t": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
    path = write(tmp_path / "model.safetensors", header, bytes(size))
    assert our_table(path) == reference_table(path) == {"t": (dtype, (1,))}
    with pytest.raises(UnsupportedFormatError, match=f"'t'.*{dtype}"):
        arrays_of(Checkpoint.open(tmp_path))


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "matrix": rng.standard_normal((5, 7)).astype(np.float32),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float16),
        "flags": np.array([True, False, True]),
        "ключ 键": np.arange(6, dtype=np.uint32).reshape(1, 2, 3),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", "note": "a\nb"})
    opened = Checkpoint.open(tmp_path)
    assert our_table(path) == reference_table(path)
    assert dict(opened.metadata) == {"format": "pt", "note": "a\nb"}
    for name, array in arrays_of(opened).items():
        np.testing.assert_array_equal(np.array(array), arrays[name])
        assert opened.read(name) == arrays[name].tobytes()


def entry(**changes: Any) -> bytes:
    return json.dumps({"t": {**SCALAR, **changes}}).encode()


REFUSED = [
    (b"", b"", "starts with"),
    (b"[]", b"", "starts with"),
    (b"null", b"", "starts with"),
    (b"{", b"", "not valid"),
    (b'{"t": 1}', b"", "an object of dtype"),
    (b'{"t": null}', b"", "an object of dtype"),
    (b'{"t": {}}', b"", "an object of dtype"),
    (b"{} x", b"", "not valid"),
    (b"{}\0\0\0", b"", "not valid"),
    (b'{"\xff": 1}', b"", "not UTF-8"),
    (b'{"\\ud800": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4), "surrogate"),
    (b'{"\\udfff": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4), "surrogate"),
    (b'{"a": ' * 10_000, b"", "nested"),
    (b'{"__metadata__": {"a": 1}}', b"", "__metadata__"),
    (b'{"__metadata__": ["a"]}', b"", "__metadata__"),
    (b'{"__metadata__": {"a": "b"}, "__metadata__": {}}', b"", "twice"),
    (b'{"t": {"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4), "twice"),
    (b'{"t": {"dtype":"F32","shape":[],"data_offsets":[-0,4]}}', bytes(4), "-0"),
    (b'{"t": {"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4), "NaN"),
    (b'{"t": {"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4), "number 1000"),
    (entry(dtype="F33"), bytes(4), "F33"),
    (entry(dtype="f32"), bytes(4), "f32"),
    (entry(dtype=None), bytes(4), "null"),
    (entry(shape=None), bytes(4), "shape null"),
    (entry(shape=[-1]), bytes(4), "-1"),
    (entry(shape=[-1, -1]), bytes(4), "-1"),
    (entry(shape=[1.0]), bytes(4), "1.0"),
    (entry(shape=[True]), bytes(4), "true"),
    (entry(shape=["1"]), bytes(4), '"1"'),
    (entry(shape=[2]), bytes(4), "8 for F32"),
    (entry(shape=[2**62, 4]), bytes(4), "shape"),
    (entry(shape=[2**32, 2**32], data_offsets=[0, 0]), b"", "shape"),
    (entry(shape=[2**64 + 1]), bytes(4), "shape"),
    (entry(data_offsets=[4, 0]), bytes(4), "-4 bytes"),
    (entry(data_offsets=[0]), bytes(4), "[begin, end]"),
    (entry(data_offsets=[0, 4, 4]), bytes(4), "[begin, end]"),
    (entry(data_offsets=[0, True]), bytes(4), "[begin, end]"),
    (entry(data_offsets=None), bytes(4), "[begin, end]"),
    (entry(data_offsets=[4, 8]), bytes(8), "hole"),
    (entry(), bytes(3), "truncated"),
    (entry(), b"", "truncated"),
    (entry(), bytes(5), "1 bytes follow"),
    (json.dumps({"a": SCALAR, "b": SCALAR}).encode(), bytes(4), "overlaps"),
    (json.dumps({"a": SCALAR, "b": {**SCALAR, "data_offsets": [2, 6]}}).encode(), bytes(6), "overlaps"),
    (json.dumps({"a": SCALAR, "b": {**SCALAR, "data_offsets": [8, 12]}}).encode(), bytes(12), "hole"),
]
STRICTER = [
    (b' {"t": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4), "starts with"),
    (b'{"t":["F32",[],[0,4]]}', bytes(4), "an object of dtype"),
    (entry(strides=[1]), bytes(4), "an object of dtype"),
    (b'{"t": %b, "t": %b}' % ((json.dumps(SCALAR).encode(),) * 2), bytes(4), "twice"),
    (b'{"__metadata__": {"a": "1", "a": "2"}}', b"", "twice"),
    (entry(shape=[0, 2**31], data_offsets=[0, 0]), b"", "shape"),
    (entry(shape=[1] * 33), bytes(4), "shape"),
    (entry(dtype="F4", shape=[8]), bytes(4), "F4"),
    (entry(dtype="F8_E4M3FNUZ", shape=[4]), bytes(4), "F8_E4M3FNUZ"),
]


@pytest.mark.parametrize(("header", "data", "said"), REFUSED)
def test_refuses_what_the_reference_refuses(tmp_path: Path, header: bytes, data: bytes, said: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(safetensors.SafetensorError):
        reference_table(path)
    refused(path, said)


@pytest.mark.parametrize(("header", "data", "said"), STRICTER)
def test_is_stricter_than_the_reference(tmp_path: Path, header: bytes, data: bytes, said: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    reference_table(path)
    refused(path, said)


def refused(path: Path, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert said in str(caught.value)
    assert str(path) in caught.value.problem
    assert caught.value.hint


@pytest.mark.parametrize(
    ("header", "data", "tensors"),
    [
        (b"{}", b"", 0),
        (b"{}    \n", b"", 0),
        (b'{"__metadata__": null}', b"", 0),
        (entry(), bytes(4), 1),
        (entry(shape=[0, 5], data_offsets=[0, 0]), b"", 1),
        (b'{"": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4), 1),
        (json.dumps({"z": SCALAR, "a": {**SCALAR, "data_offsets": [4, 8]}}).encode(), bytes(8), 2),
    ],
)
def test_accepts_the_unusual(tmp_path: Path, header: bytes, data: bytes, tensors: int) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    assert our_table(path) == reference_table(path)
    assert len(load_safetensors(path)[0]) == tensors


names = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[Header, bytes]:
    header: Header = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, st.text(st.characters(codec="utf-8")), max_size=2))
    position = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(MLX_DTYPES))), draw(shapes)
        size = ITEM_BYTES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return header, draw(st.binary(min_size=position, max_size=position))


@given(valid_headers(), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_agrees_with_reference_and_mlx_on_valid_files(
    tmp_path: Path, valid: tuple[Header, bytes], ascii_only: bool
) -> None:
    header, data = valid
    path = tmp_path / "model.safetensors"
    write(path, json.dumps(header, ensure_ascii=ascii_only).encode(), data)
    table, metadata = read_header(path)
    assert our_table(path) == reference_table(path)
    assert metadata == header.get("__metadata__", {})
    arrays, _ = load_safetensors(path)
    raw = path.read_bytes()
    for name, tensor in table.items():
        assert raw[tensor.start : tensor.stop] == data[slice(*header[name]["data_offsets"])]
        if tensor.dtype != "BOOL":  # MLX may read any byte but 0 as true
            assert bits(arrays[name]) == raw[tensor.start : tensor.stop]


ODD_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 4, 2**31, 2**32, 2**62, 2**63, 2**64, 1.5, 1e400, "", "F32", "BF16", "F4",
    "F6_E2M3", "X", [], [0], [1, 1], [0, 0], [0, 4], [4, 8], [[]], [0, 2**33], {}, {"a": "b"}, {"a": 1},
]  # fmt: skip


def mutated(header: Header, data: bytes, chance: random.Random) -> bytes:
    """A damaged file: one to three changes to the header's values, its keys, its text or the raw bytes."""
    header = copy.deepcopy(header)
    tensors = [name for name in header if name != "__metadata__"]
    text_changes = 0
    byte_changes = 0
    for _ in range(chance.randint(1, 3)):
        kind = chance.choice(["value", "number", "key", "twin", "text", "bytes", "length"])
        if kind == "value" and tensors and isinstance(found := header[chance.choice(tensors)], dict) and found:
            found[chance.choice(list(found))] = copy.deepcopy(chance.choice(ODD_VALUES))
        elif kind == "number" and tensors:
            shift_number(header[chance.choice(tensors)], chance)
        elif kind == "key":
            header[chance.choice(["", "__metadata__", "new", *tensors])] = copy.deepcopy(chance.choice(ODD_VALUES))
        elif kind == "twin" and tensors:
            header["twin"] = copy.deepcopy(header[chance.choice(tensors)])
        elif kind == "text":
            text_changes += 1
        elif kind == "bytes":
            byte_changes += 1
        elif kind == "length":
            data = data[: chance.randint(0, len(data))] if chance.random() < 0.5 else data + bytes(chance.randint(1, 9))
    text = json.dumps(header).encode()
    for _ in range(text_changes):
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice([b"", b" ", b"-", b"0", b"9", b",", b"[", b"}", b'"']) + text[place + 1 :]
    raw = bytearray(file_bytes(text, data))
    for _ in range(byte_changes):
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(raw)


def shift_number(found: Any, chance: random.Random) -> None:
    numbers = found.get(chance.choice(["shape", "data_offsets"])) if isinstance(found, dict) else None
    if isinstance(numbers, list) and numbers and all(type(number) is int for number in numbers):
        numbers[chance.randrange(len(numbers))] += chance.choice([-4, -1, 1, 4, 2**32, 2**63])


NAMED_STRICTNESS = re.compile(r"starts with|appears twice|expected an object of dtype|found dtype|found shape")


@given(valid_headers(), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_agrees_with_the_reference_on_damaged_files(tmp_path: Path, valid: tuple[Header, bytes], seed: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(mutated(*valid, random.Random(seed)))
    try:
        expected = reference_table(path)
    except (safetensors.SafetensorError, OSError):
        with pytest.raises((CheckpointError, UnsupportedFormatError)):
            read_header(path)
        return
    try:
        found = our_table(path)
    except CheckpointError as error:
        refusal = error.problem
    else:
        assert found == expected
        return
    assert NAMED_STRICTNESS.search(refusal)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"n" * 8_193: SCALAR}, "found a name of 8,193 characters, expected at most 8,192"),
        ({"__metadata__": {str(number): "" for number in range(10_001)}}, "10,001 entries and"),
        ({"__metadata__": {"a": "x" * 5_000_000}}, "1 entries and 5,000,001 characters"),
        ({"x": [1] * 900_000}, "found [1, 1, "),
        ({"x": {**SCALAR, "shape": [1] * 900_000}}, "found shape [1, 1, "),
        ({"x": {**SCALAR, "dtype": "d" * 1_000_000}}, "found dtype "),
        ({"x": {**SCALAR, "d" * 1_000_000: 1}}, "expected an object of dtype"),
    ],
    ids=["name", "entries", "metadata", "list", "shape", "dtype", "key"],
)
def test_large_headers_make_short_errors(tmp_path: Path, header: Header, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(write(tmp_path / "model.safetensors", header, b"\0" * 4))
    assert said in caught.value.problem
    assert len(caught.value.problem) < 600 + len(str(tmp_path))


def test_names_and_metadata_of_the_longest(tmp_path: Path) -> None:
    header = {"n" * 8_192: SCALAR, "__metadata__": {str(number): "" for number in range(10_000)}}
    tensors, metadata = read_header(write(tmp_path / "model.safetensors", header, b"\0" * 4))
    assert (len(tensors), len(metadata)) == (1, 10_000)


def test_a_header_takes_no_memory_on_the_files_word(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 99_999_999) + b"{")
    refused(path, "its header alone needs 100,000,007")
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    refused(path, "announce a header of 100,000,001")
    path.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{")
    refused(path, "announce a header of 18,446,744,073,709,551,615")
    write(path, b'{"t": [' + b"[]," * 3_000_000 + b"[]]}")
    refused(path, "more than 1,000,000 values")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"abc", "only 3 bytes"),
        (b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file"),
        (b"PK\x03\x04\0\0\x08\x08" + bytes(22) + b"archive/data.pkl", "a PyTorch archive"),
        (b"PK\x03\x04\x14\0\0\0" + bytes(22) + b"weight.npy", "a NumPy archive"),
        (b"\x80\x02}q\0(X\x05\0\0\0", "pickle"),
        (b"\x93NUMPY\x01\0v\0", "a NumPy array"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
        (b"<!doctype html><title>404</title>", "a web page"),
        (b'{"error": "Repository not found"}', "no safetensors file"),
    ],
)
def test_names_foreign_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedFormatError)) as caught:
        Checkpoint.open(tmp_path)
    assert said in str(caught.value)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in [
        ("none", "no such file"),
        ("", "not a regular"),
        ("pipe", "not a regular"),
        ("\0", "read"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            read_header(tmp_path / name)


def test_ranges(tmp_path: Path) -> None:
    data = bytes(range(24))
    second = {"dtype": "U8", "shape": [20], "data_offsets": [4, 24]}
    path = write(tmp_path / "model.safetensors", {"a": SCALAR, "b": second}, data)
    opened = Checkpoint.open(tmp_path)
    assert opened.read_range("b", 3, 7) == data[7:11]
    assert opened.read_range("b", 20, 20) == b""
    for start, stop in [(-1, 3), (5, 4), (0, 21)]:
        with pytest.raises(CheckpointError, match="it has 20"):
            opened.read_range("b", start, stop)
    for ask in (opened.read, lambda name: arrays_of(opened, [name])):
        with pytest.raises(CheckpointError, match="no tensor named c"):
            ask("c")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="1 more were expected"):
        opened.read("b")


# Folders


def put(folder: Path, **files: list[str]) -> Path:
    """Safetensors files of float32 scalars by these names."""
    folder.mkdir(exist_ok=True)
    for stem, tensors in files.items():
        header = {name: {**SCALAR, "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(tensors)}
        write(folder / f"{stem}.safetensors", header, bytes(4 * len(tensors)))
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_shards_by_index(tmp_path: Path) -> None:
    put(tmp_path, one=["a", "b"], two=["c"], stray=["a"], model=["z"])
    index(tmp_path, {"c": "two.safetensors", "a": "one.safetensors", "b": "one.safetensors"})
    opened = Checkpoint.open(tmp_path)
    assert {name: tensor.path.stem for name, tensor in opened.tensors.items()} == {
        "c": "two",
        "a": "one",
        "b": "one",
    }
    assert sorted(arrays_of(opened)) == ["a", "b", "c"]
    assert opened.nbytes == 12
    strays = "model.safetensors, stray.safetensors"
    assert opened.notes == (f"ignored 2 stray files not named by the index: {strays}",)


def test_one_file_and_strays(tmp_path: Path) -> None:
    put(tmp_path, model=["a"], consolidated=["a"])
    opened = Checkpoint.open(tmp_path)
    assert list(opened.tensors) == ["a"]
    assert opened.notes == ("ignored 1 stray file not used: consolidated.safetensors",)


def test_many_strays_are_one_note(tmp_path: Path) -> None:
    put(tmp_path, model=["a"], **{f"old-{i:02d}": ["a"] for i in range(30)})
    names = ", ".join(f"old-{i:02d}.safetensors" for i in range(5))
    assert Checkpoint.open(tmp_path).notes == (f"ignored 30 stray files not used: {names} and 25 more",)


def test_shards_without_index(tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002" for i in (1, 2)]
    put(tmp_path, **{names[0]: ["a"], names[1]: ["b"]})
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]
    (tmp_path / f"{names[1]}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shards missing"):
        Checkpoint.open(tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    put(tmp_path, model_a=["x"], model_b=["x"])
    with pytest.raises(CheckpointError, match=r"x is both in model_a\.safetensors and in model_b\.safetensors"):
        Checkpoint.open(tmp_path)


def test_links_that_lead_out_are_followed(tmp_path: Path) -> None:
    """As in the hub's cache."""
    blobs = put(tmp_path / "blobs", abc=["a"])
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "one.safetensors").symlink_to(blobs / "abc.safetensors")
    index(snapshot, {"a": "one.safetensors"})
    assert Checkpoint.open(snapshot).read("a") == bytes(4)
    (blobs / "abc.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 file not in the folder: one\.safetensors"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors", "/etc/one.safetensors", "a/../../one.safetensors", "./../one.safetensors",
        "..\\one.safetensors", "C:one.safetensors", "one.safetensors\0", "\0.safetensors", "", "..",
        "one.bin", "//host/one.safetensors", "a//one.safetensors",
    ],
)  # fmt: skip
def test_an_index_cannot_leave_the_folder(tmp_path: Path, shard: str) -> None:
    put(tmp_path, one=["a"])
    folder = put(tmp_path / "model", one=["a"])
    index(folder, {"a": shard})
    with pytest.raises(CheckpointError, match="in the folder") as caught:
        Checkpoint.open(folder)
    assert "do not use" in caught.value.hint


@pytest.mark.parametrize(
    "weight_map",
    [
        {"n" * 1_000_000: "model.safetensors"},
        {"n" * 1_000_000: 1},
        {"a": "x" * 1_000_000 + ".safetensors"},
    ],
    ids=["name", "name of no file", "file"],
)
def test_long_names_in_an_index(tmp_path: Path, weight_map: Any) -> None:
    index(put(tmp_path, model=["a"]), weight_map)
    with pytest.raises(CheckpointError, match="expected") as caught:
        Checkpoint.open(tmp_path)
    assert len(caught.value.problem) < 600 + len(str(tmp_path))


def test_a_long_value_in_an_index_is_not_spelled_out(tmp_path: Path) -> None:
    index(put(tmp_path, model=["a"]), {"a": ["x" * 1_000_000]})
    assert [len(note) < 600 for note in Checkpoint.open(tmp_path).notes] == [True]


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (None, "no weight_map"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"a": 1}, "a: found 1"),
        ({"a": ["one.safetensors"]}, "expected a file name"),
        ({"a": "x" * 300 + ".safetensors"}, "1 file not in the folder"),
        ({str(i): f"{i}.safetensors" for i in range(9)}, "0.safetensors, 1.safetensors, 2.safetensors, 3"),
        ({str(i): f"{i}.safetensors" for i in range(9)}, "4.safetensors and 4 more"),
    ],
)
def test_a_damaged_index_is_told(tmp_path: Path, weight_map: Any, said: str) -> None:
    put(tmp_path, one=["a"], two=["c"])
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert said in str(caught.value)
    assert INDEX_NAME in caught.value.problem


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no weight files"),
        (["qwen3-q4.gguf"], "GGUF"),
        (["pytorch_model.bin", "config.json"], "PyTorch"),
        (["weights.npz"], "NumPy"),
        (["consolidated.safetensors"], "consolidated.safetensors"),
    ],
)
def test_a_folder_without_weights_is_told(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises((CheckpointError, UnsupportedFormatError)) as caught:
        Checkpoint.open(tmp_path)
    assert said in caught.value.problem
    assert "model.safetensors" in caught.value.problem


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file", "nul\0", "long" * 99):
        with pytest.raises(CheckpointError, match="no such folder"):
            Checkpoint.open(tmp_path / name)
    with pytest.raises(CheckpointError, match="no tensors"):
        Checkpoint.open(put(tmp_path / "empty", model=[]))


def test_the_largest_release_opens_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tensors and shards as Qwen3-235B-A22B has, in sparse files as long as the real ones."""
    shape, size = [4096, 1536], 4096 * 1536 * 2
    weight_map = {}
    for shard in range(1, 119):
        file = f"model-{shard:05d}-of-00118.safetensors"
        header: Header = {"__metadata__": {"format": "pt"}}
        for i in range(314):
            name = f"model.layers.{shard}.mlp.experts.{i}.down_proj.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
            weight_map[name] = file
        length = write(tmp_path / file, header).stat().st_size
        os.truncate(tmp_path / file, length + 314 * size)
    index(tmp_path, weight_map)
    opens: list[str] = []
    really_open = os.open

    def open_and_note(path: Any, *args: Any, **options: Any) -> int:
        opens.append(str(path))
        return really_open(path, *args, **options)

    monkeypatch.setattr(os, "open", open_and_note)
    opened = Checkpoint.open(tmp_path)
    monkeypatch.undo()
    assert sorted(path for path in opens if path.endswith(".safetensors")) == sorted(map(str, tmp_path.glob("*-of-*")))
    assert (len(opened.tensors), opened.nbytes) == (118 * 314, 118 * 314 * size)
    some = arrays_of(opened, list(opened.tensors)[:400])
    assert some["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (4096, 1536)
    assert opened.read_range("model.layers.9.mlp.experts.7.down_proj.weight", size - 9, size) == bytes(9)


# Writing


ARRAYS = {
    "b": mx.arange(12, dtype=mx.uint32).reshape(3, 4),
    "a": mx.array([[0.5, -2.0]], dtype=mx.bfloat16),
    "transposed": mx.arange(6, dtype=mx.float32).reshape(2, 3).T,
    "scalar": mx.array(7, dtype=mx.int32),
    "empty": mx.zeros((0, 3), dtype=mx.float16),
}


def assert_same_arrays(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert bits(found[name]) == bits(mx.contiguous(array))


def test_one_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    for metadata in ({}, {"format": "mlx", "π": 'a "b"\n'}):
        save_safetensors(path, ARRAYS, metadata)
        arrays, found = load_safetensors(path)
        assert_same_arrays(arrays, ARRAYS)
        assert found == metadata
        assert our_table(path) == reference_table(path)
    assert [child.name for child in tmp_path.iterdir()] == ["prompt.cache"]


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(10**9, 1), (50, 2), (1, 5)])
def test_checkpoint_round_trip(tmp_path: Path, max_shard_bytes: int, shards: int) -> None:
    folder = tmp_path / "new" / "model"
    write_checkpoint(folder, ARRAYS, metadata={"format": "mlx"}, max_shard_bytes=max_shard_bytes)
    opened = Checkpoint.open(folder)
    assert_same_arrays(arrays_of(opened), ARRAYS)
    assert (dict(opened.metadata), opened.notes) == ({"format": "mlx"}, ())
    written = json.loads((folder / INDEX_NAME).read_text())
    assert written["metadata"] == {"total_size": opened.nbytes}
    assert list(written["weight_map"]) == list(ARRAYS)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == shards
    assert files[-1] == ("model.safetensors" if shards == 1 else f"model-{shards:05d}-of-{shards:05d}.safetensors")
    assert len(list(folder.iterdir())) == shards + 1


@pytest.mark.parametrize("name", ["model", "weights", "weights-00001-of-00001"])
def test_existing_weights_are_not_overwritten(tmp_path: Path, name: str) -> None:
    put(tmp_path, **{name: ["a"]})
    path = tmp_path / f"{name}.safetensors"
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"already holds weights: {name}\.safetensors"):
        write_checkpoint(tmp_path, ARRAYS, metadata={})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no tensors"):
        write_checkpoint(tmp_path / "new", {}, metadata={})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "model", ARRAYS, metadata={})
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_safetensors(tmp_path / "missing" / "x.safetensors", ARRAYS, {})
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_safetensors(tmp_path / "x.safetensors", ARRAYS, {"lone": "\ud800"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_safetensors(tmp_path / "folder", ARRAYS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


FILL_THE_DISK = """
import resource, signal, sys
from pathlib import Path
import mlx.core as mx
from mlxqwen.files.checkpoint import save_safetensors, write_checkpoint
from mlxqwen.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
arrays = {"small": mx.zeros(10), "large": mx.zeros(100_000)}
folder = Path(sys.argv[1])
for save in (
    lambda: save_safetensors(folder / "saved.safetensors", arrays, {}),
    lambda: write_checkpoint(folder / "model", arrays, metadata={}, max_shard_bytes=1000),
):
    try:
        save()
    except CheckpointError as error:
        print(error.problem)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk, in a process of its own: it cannot be lifted."""
    save_safetensors(tmp_path / "saved.safetensors", ARRAYS, {})
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)],
        env=FRESH_PROCESS,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'saved.safetensors'}: cannot be written")
    assert "model-00002-of-00002.safetensors: cannot be written" in second
    assert_same_arrays(load_safetensors(tmp_path / "saved.safetensors")[0], ARRAYS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "saved.safetensors"]


def test_opening_needs_no_mlx(tmp_path: Path) -> None:
    put(tmp_path, model=["a"])
    code = (
        "import sys; from pathlib import Path; from mlxqwen.files.checkpoint import Checkpoint; "
        "Checkpoint.open(Path(sys.argv[1])).read('a'); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=FRESH_PROCESS,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"mlx.core", "numpy", "safetensors"} & set(done.stdout.split())


def test_errors_stay_in_the_tree(tmp_path: Path) -> None:
    """A name that would forge terminal output comes out escaped."""
    path = write(tmp_path / "model.safetensors", {"\x1b[2Jx": {**SCALAR, "dtype": "X"}}, bytes(4))
    with pytest.raises(MlxqwenError) as caught:
        read_header(path)
    assert "\x1b" not in str(caught.value)
