"""The fuzzers of `scripts/fuzzers`: a few seeds of each break no rule, and a rule that is broken is told."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
from fuzzers import caches, configs, headers, kills, replies, schemas

from mlxqwen.cache import block_file
from mlxqwen.errors import MlxqwenError
from mlxqwen.files.checkpoint import read_header
from mlxqwen.files.config import ModelConfig

QUICK = [name for name in fuzz.NAMES if name not in ("kills", "templates")]  # which has a test of its own


@pytest.mark.parametrize("name", QUICK)
def test_some_seeds_break_no_rule(name: str) -> None:
    check = importlib.import_module(f"fuzzers.{name}").check
    assert {seed: problem for seed in range(60) if (problem := check(seed)) is not None} == {}


def test_headers_of_both_kinds_are_made(tmp_path: Path) -> None:
    read = 0
    for seed in range(60):
        (tmp_path / "a.safetensors").write_bytes(headers.make_file(seed))
        try:
            read_header(tmp_path / "a.safetensors")
            read += 1
        except MlxqwenError:
            pass
    assert 10 < read < 50


class _SameDigest:
    """A hash that takes all bytes for the same."""

    def __init__(self, data: object = b"") -> None:
        pass

    def update(self, data: object) -> None:
        pass

    def digest(self) -> bytes:
        return bytes(16)


def wrong(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("broken on purpose")


BROKEN: dict[str, tuple[object, str, Callable[..., Any], Callable[[int], str | None]]] = {
    "headers": (headers, "read_header", lambda path: ({}, {}), headers.check),
    "replies": (replies, "parsed", lambda pieces, thinking: (len(pieces),), replies.check),
    "schemas": (schemas, "find_problem", wrong, schemas.check),
    "configs": (ModelConfig, "from_folder", wrong, configs.check),
    "caches": (block_file, "xxh3_128", _SameDigest, caches.check),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken, check = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    assert any(check(seed) is not None for seed in range(40))


def test_the_time_is_shared_and_the_end_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.run("configs", 0, 7) == 0
    assert capsys.readouterr().out == "configs: 1 tried from seed 7 on, 0 broke a rule\n"


@pytest.mark.parametrize(
    ("files", "too_early"),
    [
        ({"a.safetensors.part": b"we", "conversion.lock": b""}, False),
        ({"a.safetensors": b"weights", "b.safetensors.part": b"mo"}, False),  # a whole shard, and no config yet
        ({"a.safetensors": b"weights", "b.safetensors": b"more", "config.json": b"{}"}, False),  # the whole model
        ({"a.safetensors": b"we"}, True),
        ({"a.safetensors": b"weights", "config.json": b"{}"}, True),
        ({"a.safetensors": b"weights", "b.safetensors": b"mo", "config.json": b"{}"}, True),
        ({"config.json": b"{}"}, True),
    ],
    ids=str,
)
def test_what_looks_like_a_model_too_early(tmp_path: Path, files: dict[str, bytes], too_early: bool) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    whole = {"a.safetensors": b"weights", "b.safetensors": b"more", "config.json": b"{}"}
    assert kills.looks_whole_too_early(tmp_path, whole) == too_early
