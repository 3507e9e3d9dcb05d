from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxqwen.errors import ConfigError
from mlxqwen.files.json_file import parse_json, read_json_object, shown

characters = st.characters(codec="utf-8")
numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(characters),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(characters), inner, max_size=4),
    max_leaves=12,
)


def read(tmp_path: Path, content: bytes | str, **options: Any) -> dict[str, object]:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_json_object(path, error=ConfigError, **options)


@given(value=st.dictionaries(st.text(characters), json_values, max_size=4), escape=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_what_the_standard_library_writes(tmp_path: Path, value: dict[str, object], escape: bool) -> None:
    assert read(tmp_path, json.dumps(value, ensure_ascii=escape)) == value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[1]", "list"),
        (b"null", "NoneType"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b'{"a": 1} x', "line 1, column 10"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"x": {"\\u0061": 1, "a": 2}}', "'a' appears twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\xef\xbb\xbf" * 3 + b'{"a": 1}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "deeper than 64"),
        (b'{"a": ' + b"[" * 200_000, "deeper than 64"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"\n <!DOCTYPE html><title>404</title>", "a web page"),
        (b"<html>", "a web page"),
    ],
)
def test_refuses(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read(tmp_path, content)
    assert said in caught.value.problem
    assert caught.value.hint


def test_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    assert read(tmp_path, b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_size_is_bounded(tmp_path: Path) -> None:
    assert read(tmp_path, b'{"a": 1}', max_bytes=8) == {"a": 1}
    with pytest.raises(ConfigError, match="larger than 7 bytes"):
        read(tmp_path, b'{"a": 1}', max_bytes=7)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read(tmp_path, b'\xef\xbb\xbf{"a": "\xef\xbb\xbf"}') == {"a": "\ufeff"}
    assert parse_json("\ufeff[1]") == [1]
    assert read_json_object(tmp_path / "config.json", error=ConfigError, parse=json.loads) == {"a": "\ufeff"}


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": [' + b"[]," * 500_000 + b"[]]}",
        b'{"a": [' + b"1," * 1_000_000 + b"1]}",
        b"{" + b'"":0,' * 1_000_000 + b'"":0}',
    ],
    ids=["lists", "numbers", "keys"],
)
def test_values_are_counted_before_any_is_made(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("the text is parsed"))
    with pytest.raises(ConfigError, match="more than 1,000,000 values"):
        read(tmp_path, content)


class Counted(list[int]):
    """A list that tells how many of its items were looked at."""

    seen = 0

    def __iter__(self) -> Iterator[int]:
        for item in super().__iter__():
            self.seen += 1
            yield item


def test_no_more_is_spelled_than_is_shown() -> None:
    items = Counted([7] * 100_000)
    assert shown(items) == "[" + "7, " * 32 + "7,…"
    assert items.seen < 60


@given(value=json_values)
def test_short_values_are_shown_whole(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert shown(value) == (text if len(text) <= 100 else f"{text[:99]}…")


def test_long_keys_are_shown_in_part(tmp_path: Path) -> None:
    key = "k" * 1_000_000
    with pytest.raises(ConfigError, match="appears twice") as caught:
        read(tmp_path, f'{{"{key}": 1, "{key}": 2}}')
    assert len(caught.value.problem) < 500


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in [
        ("missing.json", "no such file"),
        ("", "a folder"),
        ("pipe", "not a regular file"),
        ("loop", "cannot be read"),
        ("nul\0", "cannot be read"),
        ("long" * 99, "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=said):
            read_json_object(tmp_path / name, error=ConfigError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_refuses_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch(mode=0o000)
    with pytest.raises(ConfigError, match="Permission denied"):
        read_json_object(path, error=ConfigError)
