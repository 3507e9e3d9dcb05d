"""What an unfinished conversion tells of itself: spelled as a command that a shell and `mlxqwen convert` read back."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.cli.convert import convert
from mlxqwen.files.unfinished import command_to_finish, is_unfinished, words_of_options
from mlxqwen_convert.plan import Options

BITS = st.sampled_from([16, 8, 6, 5, 4, 3, 2])
PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1)
OPTIONS = st.builds(
    Options,
    bits=st.none() | BITS,
    group_size=st.none() | st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    lm_head_bits=st.none() | BITS,
    embed_bits=st.none() | BITS,
    keep=st.lists(st.tuples(PRINTABLE, BITS)).map(tuple),
    quality=st.booleans(),
    strict=st.booleans(),
    device=st.sampled_from(["cpu", "gpu"]),
)


@given(options=OPTIONS)
def test_the_command_line_reads_its_options_back(options: Options) -> None:
    words = words_of_options(json.loads(json.dumps(asdict(options))))
    assert words is not None
    read = convert.make_context("convert", ["source", "output", *shlex.split(words)]).params
    numbers: dict[str, Any] = {
        name: read[name] and int(read[name]) for name in ("bits", "group_size", "lm_head_bits", "embed_bits")
    }
    others = {name: read[name] for name in ("dtype", "keep", "quality", "strict", "device")}
    assert Options(**numbers, **others) == options


def test_defaults_are_not_spelled() -> None:
    assert words_of_options({}) == ""
    assert words_of_options(json.loads(json.dumps(asdict(Options())))) == ""
    assert words_of_options({"quality": True, "bits": 3}) == "--bits 3 --quality"


STRANGE: list[Any] = [
    None,
    [],
    "bits",
    {"bits": "4"},
    {"bits": 4.0},
    {"bits": True},
    {"bits": 7},
    {"bits": [4]},
    {"bits": {}},
    {"dtype": "int8"},
    {"dtype": ["auto"]},
    {"device": "tpu"},
    {"device": ["cpu"]},
    {"quality": 1},
    {"strict": "yes"},
    {"keep": {"a": 8}},
    {"keep": None},
    {"keep": ["ab"]},
    {"keep": [["a", 8, 8]]},
    {"keep": [["a", "8"]]},
    {"keep": [[["a"], 8]]},
    {"keep": [["a\n", 8]]},
    {"keep": [["a\x1b[2J", 8]]},
    {"upload_repo": "me/mine"},
]


@pytest.mark.parametrize("options", STRANGE, ids=repr)
def test_options_that_nobody_gave(options: Any) -> None:
    assert words_of_options(options) is None


def partial_of(folder: Path, manifest: str) -> Path:
    partial = folder / "out.partial"
    partial.mkdir()
    (partial / "conversion.json").write_text(manifest)
    assert is_unfinished(partial)
    return partial


def test_the_command_that_finishes_it(tmp_path: Path) -> None:
    manifest = {"source": "/models/my bf16; ls", "options": {"quality": True, "keep": [["*.down_proj", 8]]}}
    partial = partial_of(tmp_path, json.dumps(manifest))
    quoted = shlex.quote(str(tmp_path / "out"))
    assert command_to_finish(partial) == (
        f"mlxqwen convert '/models/my bf16; ls' {quoted} --keep '*.down_proj=8' --quality --resume"
    )


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"options": {}}',
        '{"source": "/model"}',
        '{"source": ["/model"], "options": {}}',
        '{"source": "--upload-repo=me/mine", "options": {}}',
        '{"source": "/model\\u001b[2J", "options": {}}',
        '{"source": "/model\\ud800", "options": {}}',
        '{"source": "/model", "options": {"upload_repo": "me/mine"}}',
        "[" * 100_000,
    ],
    ids=range(12),
)
def test_a_manifest_that_tells_nothing(tmp_path: Path, manifest: str) -> None:
    partial = partial_of(tmp_path, manifest)
    assert command_to_finish(partial) == f"mlxqwen convert SOURCE {shlex.quote(str(tmp_path / 'out'))} --resume"


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/conversion.json").write_text("{}")
    os.mkfifo(tmp_path / "out.partial/conversion.json")
    assert not any(is_unfinished(tmp_path / name) for name in ("out.partial", "whole", "nothing.partial"))
