"""Hints of weight files, configs and conversions that blame bytes: each with the condition that alone leads to it.

Elsewhere a message names the file, key or tensor, with what was found and expected.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxqwen.errors import MlxqwenError
from mlxqwen.files.checkpoint import INDEX_NAME
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from tests.convert.checkpoints import Source, make_source
from tests.tiny_checkpoints import DENSE, make_weights, write_folder

ROOT = Path(__file__).parent.parent
PLACES = ("mlxqwen/files/checkpoint", "mlxqwen/model", "convert/mlxqwen_convert")
FILES = ("adapters.py", "config.py", "model_files.py", "purpose.py", "tensor_names.py")
BLAMING = re.compile(
    r"\b(download|fetch|run|try|convert|load)\b[^.]*\b(again|anew)\b|damaged|tampered|faulty|missing files", re.I
)
# Each text that blames, and when it is said.
CONDITIONS = {
    "Download the file again, or convert the model again.": "a file's size is another than its header records, or it "
    "is a web page",
    "Download the missing files; an interrupted download can be resumed.": "an index or the numbers of shards "
    "record files that are absent",
    "Run `git lfs pull` in the folder, or download the file again.": "the file is git-lfs's record of one",
    "The file was changed while it was open: load it again.": "an array is not what the header recorded",
    "The file became shorter. Download it again and convert from the start.": "a file's size is less than recorded",
    "Convert again when nothing writes to the source.": "size or time of a file is another than when it was planned",
    "Load it again when nothing writes to it.": "the state of the source is another than when it was planned",
    "Something else writes to the output's folder. Remove it and convert again.": "a file is shorter than written",
    "The disk or the memory may be faulty. Convert again, and tell the developers if this comes back.": "what was "
    "written has another hash or error than recorded",
    "The disk or the memory may be faulty, or something else writes to the output. Convert again.": "the same",
    "damaged": "the state of a converted model in the cache, whose record cannot be read: no hint",
}


def texts_that_blame() -> Iterator[tuple[str, str]]:
    """(file, text) of all strings but docstrings."""
    paths = [path for place in PLACES for path in (ROOT / place).rglob("*.py")]
    for path in (*paths, *(ROOT / "mlxqwen/files" / name for name in FILES)):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
            if isinstance(text, str) and BLAMING.search(text):
                yield path.name, text


def test_no_hint_blames_what_nothing_points_to() -> None:
    found = list(texts_that_blame())
    assert [pair for pair in found if pair[1] not in CONDITIONS] == []
    assert CONDITIONS.keys() == {text for _, text in found}


Damage = Callable[[Path], object]


def shorter(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def longer(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")


def without_data(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def empty(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 0)


def web_page(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!doctype html><title>404</title>")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def absent_file(folder: Path) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [shorter, longer, without_data, empty, web_page, pointer, absent_file])
def test_where_bytes_disagree_with_what_is_recorded(tmp_path: Path, damage: Damage) -> None:
    folder = write_folder(tmp_path, DENSE, make_weights(DENSE))
    damage(folder)
    with pytest.raises(MlxqwenError) as caught:
        load_model(folder)
    assert "ownload" in caught.value.hint


def header(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def no_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:10] = b"{{"
    path.write_bytes(data)


def other_format(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"what nobody knows" * 9)


def config(**changes: Any) -> Damage:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**DENSE, **changes}))


def unknown_format(folder: Path) -> None:
    config(quantization_config={"quant_method": "new"})(folder)
    header(lambda entries: entries[NORM].update(dtype="I32"))(folder)


def index(weight_map: Any) -> Damage:
    return lambda folder: (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def alone(damage: Damage) -> Damage:
    """The damage, where the weights are under a name that only an index could give them."""

    def damaged(folder: Path) -> None:
        damage(folder)
        (folder / "model.safetensors").rename(folder / "other.safetensors")

    return damaged


NORM = "model.norm.weight"
WRONG: dict[str, tuple[Damage, str]] = {
    "a dtype": (header(lambda entries: entries[NORM].update(dtype="F4")), NORM),
    "a shape": (header(lambda entries: entries[NORM].update(shape=[2**40])), NORM),
    "offsets": (header(lambda entries: entries[NORM].update(data_offsets=[0, 1])), NORM),
    "metadata": (header(lambda entries: entries.update(__metadata__=5)), "__metadata__"),
    "a tensor less": (header(lambda entries: entries.update({"model.norms.weight": entries.pop(NORM)})), NORM),
    "no JSON": (no_json, "model.safetensors"),
    "another format": (other_format, "model.safetensors"),
    "a key of the config": (config(rms_norm_eps="x"), "rms_norm_eps"),
    "a key that is missing": (config(vocab_size=None), "vocab_size"),
    "another shape than the config's": (config(intermediate_size=64), "gate_proj"),
    "more layers in the config": (config(num_hidden_layers=3), "model.layers.2"),
    "fewer layers in the config": (config(num_hidden_layers=1), "model.layers.1"),
    "a format that is not known": (unknown_format, "new"),
    "an index without names": (alone(index({})), INDEX_NAME),
    "an index of numbers": (alone(index({NORM: 5})), NORM),
    "an index that leads out": (index({NORM: "../model.safetensors"}), "../model.safetensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_elsewhere_the_thing_is_named(tmp_path: Path, case: str) -> None:
    damage, named = WRONG[case]
    folder = write_folder(tmp_path / "in", DENSE, make_weights(DENSE))
    damage(folder)
    for refused in (lambda: load_model(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(MlxqwenError) as caught:
            refused()
        assert named in caught.value.problem
        assert caught.value.hint
        assert not BLAMING.search(caught.value.hint)


QUERY = "model.layers.0.self_attn.q_proj"


def replaced(word: str, dtype: str, array: Any) -> Callable[[Source], object]:
    return lambda source: source.stored.update({f"{QUERY}.{word}": (dtype, array)})


def without(word: str) -> Callable[[Source], object]:
    return lambda source: source.stored.pop(f"{QUERY}.{word}")


SOURCES: dict[str, tuple[str, Callable[[Source], object], str]] = {
    "a scale that is NaN": ("awq", replaced("scales", "F16", np.full((2, 128), np.nan, np.float16)), "q_proj.scales"),
    "a group that is not there": ("gptq", replaced("g_idx", "I32", np.full(128, 99, np.int32)), "q_proj.g_idx"),
    "a code that is NaN": ("fp8", replaced("weight", "F8_E4M3", np.full((128, 128), 0x7F, np.uint8)), "q_proj.weight"),
    "a weight that is NaN": (
        "f32",
        replaced("weight", "F32", np.full((128, 128), np.nan, np.float32)),
        "q_proj.weight",
    ),
    "scales that are missing": ("int4", without("weight_scale"), "weight_scale is missing"),
    "scales of another shape": ("gptq", replaced("scales", "F16", np.ones((3, 128), np.float16)), "q_proj.scales"),
    "a tensor of no place": ("fp8", replaced("other", "F32", np.ones(3, np.float32)), "q_proj.other"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_conversions_name_the_tensor(tmp_path: Path, case: str) -> None:
    form, change, named = SOURCES[case]
    source = make_source(tmp_path / "in", form)
    change(source)
    with pytest.raises(MlxqwenError) as caught:
        convert(source.write().folder, tmp_path / "out", workers=1)
    assert named in caught.value.problem
    assert not BLAMING.search(caught.value.hint)
