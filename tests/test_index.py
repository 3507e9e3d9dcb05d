"""An index that does not describe the files beside it: what the files hold is loaded, with a note."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxqwen.errors import CheckpointError, MlxqwenError
from mlxqwen.files.checkpoint import INDEX_NAME, Checkpoint
from mlxqwen.model.footprint import measure
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from tests.tiny_checkpoints import DENSE, make_weights, prompt, write_folder, write_safetensors

WEIGHTS = make_weights(DENSE)
NAMES = list(WEIGHTS)
HALF = len(NAMES) // 2
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLAIN = {name: ONE if place < HALF else TWO for place, name in enumerate(NAMES)}
SHARDS = {ONE: NAMES[:HALF], TWO: NAMES[HALF:]}
THIRDS = {name: f"model-{1 + place % 3:05d}-of-00003.safetensors" for place, name in enumerate(NAMES)}
FIRST_OF_THREE = "model-00001-of-00003.safetensors"
IDS = mx.array([prompt(7, 96)])


def folder_of(folder: Path, index: object, files: Mapping[str, Iterable[str]]) -> Path:
    """A folder of these files, each with the tensors of these names, and an index."""
    write_folder(folder, DENSE, {})
    (folder / "model.safetensors").unlink()
    for file, names in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        write_safetensors(folder / file, {name: WEIGHTS[name] for name in names})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("whole") / "in", DENSE, WEIGHTS)


@pytest.fixture(scope="module")
def expected(whole: Path) -> mx.array:
    return load_model(whole, dtype="float32")(IDS)


@pytest.fixture(scope="module")
def converted(whole: Path) -> bytes:
    """The weights of the whole folder, converted."""
    return convert_weights(whole, whole.parent / "out")[0]


def convert_weights(folder: Path, output: Path) -> tuple[bytes, tuple[str, ...]]:
    notes = convert(folder, output, bits=16, dtype="float16", workers=1).notes
    return (output / "model.safetensors").read_bytes(), notes


CASES: dict[str, tuple[Mapping[str, str], Mapping[str, Iterable[str]], list[str]]] = {
    "absent shards beside one whole file": (
        PLAIN,
        {"model.safetensors": NAMES},
        ["names 2 files not in the folder", "does not name model.safetensors"],
    ),
    "absent shards beside other shards": (
        THIRDS,
        SHARDS,
        ["names 3 files not in the folder", f"not name {ONE}, {TWO}"],
    ),
    "absent shards beside files without numbers": (
        PLAIN,
        {"model-a.safetensors": NAMES[:HALF], "model-b.safetensors": NAMES[HALF:]},
        ["does not name model-a.safetensors, model-b.safetensors"],
    ),
    "some absent shards beside one whole file": (
        PLAIN,
        {ONE: NAMES[:HALF], "model.safetensors": NAMES},
        [f"names 1 file not in the folder: {TWO}", f"ignored 1 stray file not named by the index: {ONE}"],
    ),
    "some absent shards beside other shards": (
        THIRDS,
        {FIRST_OF_THREE: NAMES[::3], **SHARDS},
        ["names 2 files not in the folder"],
    ),
    "an absent shard of a tied head alone": (
        {**PLAIN, "lm_head.weight": "model-00003-of-00003.safetensors"},
        SHARDS,
        ["names 1 file not in the folder", "1 tensor that no file holds: lm_head.weight"],
    ),
    "a tied head that is only named": (
        {**PLAIN, "lm_head.weight": TWO},
        SHARDS,
        ["names 1 tensor that no file holds: lm_head.weight"],
    ),
    "a tensor that is not named": (
        dict(list(PLAIN.items())[1:]),
        SHARDS,
        [f"does not name 1 tensor: {NAMES[0]}"],
    ),
    "a tensor given to another shard": (
        {**PLAIN, NAMES[0]: TWO},
        SHARDS,
        [f"gives another file for 1 tensor: {NAMES[0]}"],
    ),
    "a tensor given to an absent shard": (
        {**PLAIN, NAMES[0]: "model-00009-of-00009.safetensors"},
        SHARDS,
        ["names 1 file not in the folder", f"gives another file for 1 tensor: {NAMES[0]}"],
    ),
    "a shard that is not named": (
        dict.fromkeys(NAMES[:HALF], ONE),
        SHARDS,
        [f"does not name {TWO}"],
    ),
    "another shard for each": ({name: TWO if PLAIN[name] == ONE else ONE for name in NAMES}, SHARDS, ["another file"]),
    "dots and slashes": ({name: f"./{file}" for name, file in PLAIN.items()}, SHARDS, []),
    "a dot within": (
        {name: f"sub/./{file}" for name, file in PLAIN.items()},
        {f"sub/{file}": names for file, names in SHARDS.items()},
        [],
    ),
    "a tensor in two files, of which the index names one": (
        PLAIN,
        {ONE: NAMES[:HALF], TWO: NAMES[HALF - 1 :]},
        [],
    ),
    "tensors of the source before it was converted": (
        {f"{name.removesuffix('.weight')}.qweight": ONE for name in NAMES},
        SHARDS,
        [f"names {len(NAMES)} tensors that no file holds", f"does not name {TWO}"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_files_hold_is_loaded(
    tmp_path: Path, expected: mx.array, converted: bytes, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    index, files, notes = CASES[case]
    folder = folder_of(tmp_path / "in", index, files)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)
    said = [record.getMessage() for record in caplog.records]
    assert all(any(note in line for line in said) for note in notes), said
    assert bool(said) == bool(notes)
    assert measure(folder).parameters == sum(array.size for array in WEIGHTS.values())
    weights, told = convert_weights(folder, tmp_path / "out")
    assert weights == converted
    assert set(said) <= set(told)


@pytest.mark.parametrize(
    ("index", "files", "said"),
    [
        (PLAIN, {ONE: NAMES[:HALF]}, f"names 1 file not in the folder: {TWO}"),
        (PLAIN, {TWO: NAMES[HALF:]}, f"names 1 file not in the folder: {ONE}"),
        (THIRDS, {ONE: NAMES[:HALF]}, "names 3 files not in the folder"),
        (THIRDS, {FIRST_OF_THREE: NAMES[::3], ONE: NAMES[:HALF]}, "names 2 files not in the folder"),
        (PLAIN, {ONE: NAMES[:HALF], "model.safetensors": NAMES[1:]}, "names 1 file not in the folder"),
        (PLAIN, {ONE: NAMES[:HALF], TWO: NAMES[HALF:-1]}, f"tensors are missing: {NAMES[-1]}"),
        (PLAIN, {"model.safetensors": NAMES[:-1]}, "names 2 files not in the folder"),
    ],
)
def test_what_no_file_holds_is_an_error(
    tmp_path: Path, index: Mapping[str, str], files: Mapping[str, Iterable[str]], said: str
) -> None:
    folder = folder_of(tmp_path / "in", index, files)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)
    with pytest.raises(MlxqwenError, match=said):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_files_and_no_word_which(tmp_path: Path) -> None:
    files = {ONE: NAMES[:HALF], TWO: NAMES[HALF - 1 :]}
    without = {name: file for name, file in PLAIN.items() if name != NAMES[HALF - 1]}
    for index in (without, {**PLAIN, NAMES[HALF - 1]: "model-00003-of-00003.safetensors"}):
        with pytest.raises(CheckpointError, match=f"is both in {ONE} and in {TWO}"):
            Checkpoint.open(folder_of(tmp_path, index, files))


def test_tensors_that_are_neither_named_nor_of_the_model_are_left_out(
    tmp_path: Path, expected: mx.array, converted: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "in", PLAIN, SHARDS)
    extra = {"mtp.fc.weight": np.ones((3, 3), np.float32)}
    write_safetensors(folder / TWO, {name: WEIGHTS[name] for name in NAMES[HALF:]} | extra)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)
    assert [record.getMessage() for record in caplog.records] == [f"{INDEX_NAME} does not name 1 tensor: mtp.fc.weight"]
    assert convert_weights(folder, tmp_path / "out")[0] == converted
    named = folder_of(tmp_path / "in", {**PLAIN, "mtp.fc.weight": TWO}, {})
    with pytest.raises(CheckpointError, match=r"no place for: mtp\.fc\.weight"):
        load_model(named)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n", "the file is empty"),
    "cut short": (b'{"weight_map": {"a": "mod', "not valid JSON"),
    "no UTF-8": (b"\xff\xfe\x00", "not UTF-8"),
    "a list": (b"[]", "found a list"),
    "without a weight_map": (b'{"metadata": {}}', "found no weight_map"),
    "an empty weight_map": (b'{"weight_map": {}}', "found no weight_map"),
    "no object for a weight_map": (b'{"weight_map": []}', "found no weight_map"),
    "numbers for files": (b'{"weight_map": {"model.norm.weight": 5}}', "expected a file name"),
    "a git-lfs pointer": (POINTER, "a git-lfs pointer"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "a web page"),
}


@pytest.mark.parametrize("files", [{"model.safetensors": NAMES}, SHARDS], ids=["one file", "shards"])
@pytest.mark.parametrize("case", BROKEN)
def test_an_index_that_is_none_beside_whole_files(
    tmp_path: Path,
    expected: mx.array,
    converted: bytes,
    caplog: pytest.LogCaptureFixture,
    case: str,
    files: Mapping[str, Iterable[str]],
) -> None:
    data, why = BROKEN[case]
    folder = folder_of(tmp_path / "in", {}, files)
    (folder / INDEX_NAME).write_bytes(data)
    assert mx.array_equal(load_model(folder, dtype="float32")(IDS), expected)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"left aside {INDEX_NAME}, which cannot be used: ")
    assert why in said[0]
    assert [*measure(folder, check=True).notes] == said
    assert convert_weights(folder, tmp_path / "out") == (converted, tuple(said))


@pytest.mark.parametrize("case", BROKEN)
def test_an_index_that_is_none_beside_nothing_or_a_part(tmp_path: Path, case: str) -> None:
    data, why = BROKEN[case]
    for files in ({}, {ONE: NAMES[:HALF]}, {"a.safetensors": NAMES}):
        folder = folder_of(tmp_path / f"in{len(files)}{next(iter(files), '')}", {}, files)
        (folder / INDEX_NAME).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{INDEX_NAME}: .*{why}") as caught:
            load_model(folder)
        assert caught.value.hint
    lacking = folder_of(tmp_path / "lacking", {}, {"model.safetensors": NAMES[:-1]})
    (lacking / INDEX_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"tensors are missing: {NAMES[-1]}"):
        load_model(lacking)


def test_an_index_that_is_broken_and_leads_out_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", {NAMES[0]: 5, NAMES[1]: "../model.safetensors"}, {"model.safetensors": NAMES})
    with pytest.raises(CheckpointError, match=r"found the file name '\.\./model\.safetensors'"):
        load_model(folder)
