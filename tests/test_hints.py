"""Hints that blame bytes, connections or permissions: each with the condition that alone leads to it.

Elsewhere a message names the variable, file, key or tensor, with what was found and expected.
"""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxqwen.errors import MlxqwenError, TokenizerError
from mlxqwen.files.hub_errors import hub_error
from mlxqwen.files.hub_settings import can_be_imported, faulty_setting, token_source
from mlxqwen.files.json_file import read_json_object, unreadable
from mlxqwen.text.tokenizer_file import build_tokenizer

PACKAGE = Path(__file__).parent.parent / "mlxqwen"
FOLDERS = ("cache", "chat", "cli", "engine", "sampling", "server", "text")
FILES = (
    *("atomic.py", "hub.py", "hub_download.py", "hub_errors.py", "hub_settings.py", "hub_source.py"),
    *(
        "json_file.py",
        "locks.py",
        "modelscope.py",
        "modelscope_errors.py",
        "preview.py",
        "store.py",
        "transfer.py",
        "unfinished.py",
    ),
)
BLAMING = re.compile(
    r"\b(download|fetch|run|try|install|load|convert)\b[^.]*\b(again|anew)\b|damaged|tampered|permissions",
    re.IGNORECASE,
)
# Each text that blames, and when it is said.
CONDITIONS = {
    "The package is incomplete: install it again.": "the folder of the demo model is not there",
    "Run it again: files already complete are kept.": "a connection broke, or a size is another than the hub told",
    "Wait a few minutes and run it again, or set HF_TOKEN, which raises the limit.": "the hub answered 429",
    "Try again later: files already complete are kept.": "the hub answered 500 or above",
    "Run it again; if it stays so, the model is damaged on the hub.": "a size or hash is another than ModelScope lists",
    "Check its permissions.": "the system answered that the user may not",
    "Check its permissions, or give another name.": "the system answered that the user may not",
    "Load the model again, or close it behind the last request.": "the model was closed",
    "Add rows while others run, or start anew.": "rows were added to a stream that is over",
    "Check its permissions, and those of the folders that it lies in.": "the system says that permission is denied",
    "Shorten it, ask for fewer tokens (max_tokens), or try again later.": "memory ran out, which others hold too",
    " is damaged: ": "a file of blocks has not the length, or its bytes not the hash, that its header tells",
}


def texts_that_blame() -> Iterator[tuple[str, str]]:
    """(file, text) of all strings but docstrings."""
    paths = [path for folder in FOLDERS for path in (PACKAGE / folder).rglob("*.py")]
    for path in (*paths, *(PACKAGE / "files" / name for name in FILES)):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
            if isinstance(text, str) and " " in text and BLAMING.search(text):
                yield path.name, text


def test_no_hint_blames_what_nothing_points_to() -> None:
    assert [found for found in texts_that_blame() if found[1] not in CONDITIONS] == []
    assert CONDITIONS.keys() == {text for _, text in texts_that_blame()}


class NetworkError(Exception):
    """As HTTP libraries call it."""


@pytest.mark.parametrize(
    ("cause", "hint"),
    [
        (ConnectionResetError("by peer"), "Run it again"),
        (TimeoutError(), "Run it again"),
        (NetworkError("broke"), "Run it again"),
        (OSError("Consistency check failed: file should be of size 5 but has size 4"), "Run it again"),
        (OSError(errno.ENOSPC, "No space left"), "Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "HF_HOME"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), "HF_HOME"),
        (UnicodeEncodeError("ascii", "\ufeff", 0, 1, "ordinal not in range"), ""),
        (RuntimeError("what nobody knows"), ""),
    ],
    ids=repr,
)
def test_a_download_is_run_again_only_where_it_broke_off(
    cause: Exception, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or "PROXY" in name.upper()]:
        monkeypatch.delenv(name)
    error = hub_error("org/model", None, cause)
    assert error.hint.startswith(hint) if hint == "Run it again" else hint in error.hint
    assert ("again" in error.hint) == (hint == "Run it again")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without settings of the hub's client."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "SSL_")) or "PROXY" in name.upper()]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert faulty_setting() is None
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HF_TOKEN", "\ufeffhf_abc", "HF_TOKEN: found a byte order mark"),
        ("HF_TOKEN", "hf_\u200babc", "U+200B (ZERO WIDTH SPACE) at character 3"),
        ("HUGGING_FACE_HUB_TOKEN", "hf_ä", "HUGGING_FACE_HUB_TOKEN: found U+00E4"),
        ("HF_TOKEN", "hf_\x07", "U+0007 (a control character) at character 3"),
        ("HF_ENDPOINT", "huggingface.co", "HF_ENDPOINT: found 'huggingface.co', expected an address such as https://"),
        ("HF_ENDPOINT", "ftp://x", "expected an address such as https://"),
        ("HF_ENDPOINT", "http://", "expected an address such as https://"),
        ("HF_ENDPOINT", "http://x:99999", "expected an address such as https://"),
        ("HF_ENDPOINT", "http://[bad", "expected an address such as https://"),
        ("HF_ENDPOINT", "\ufeffhttps://x", r"HF_ENDPOINT: found '\ufeffhttps://x'"),
        ("HF_ENDPOINT", "me:s3cr3t@x", "found one with a password"),
        ("SSL_CERT_FILE", "/no/such/file", "SSL_CERT_FILE: found '/no/such/file', which does not exist"),
        ("https_proxy", "ftp://x", "https_proxy: found the scheme 'ftp', expected http, https"),
    ],
)
def test_a_setting_that_cannot_work_is_named(plain: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    plain.setenv(name, value)
    fault = faulty_setting()
    assert fault is not None
    assert said in fault[0]
    assert name in fault[1]
    assert not name.endswith("TOKEN") or "abc" not in fault[0]
    told = hub_error("org/model", None, UnicodeEncodeError("ascii", value, 0, 1, "ordinal not in range"))
    assert (told.problem, told.hint) == (f"org/model: {fault[0]}", fault[1])
    assert can_be_imported() == (value not in ("http://x:99999", "http://[bad"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_abc-D_9\n"),
        ("HF_ENDPOINT", "https://hub.example.com/mirror/"),
        ("HF_ENDPOINT", "http://[::1]:8080"),
        ("HF_ENDPOINT", ""),
        ("SSL_CERT_DIR", "/"),
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("HTTP_PROXY", "proxy.example.com:3128"),
    ],
)
def test_settings_that_may_work(plain: pytest.MonkeyPatch, name: str, value: str) -> None:
    plain.setenv(name, value)
    assert faulty_setting() is None


def test_the_file_of_a_token_is_named(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    assert token_source() == str(token)
    for data, said in ((b"\xef\xbb\xbfhf_abc", "a byte order mark"), (b"\xff\xfeh\0", "no UTF-8 text")):
        token.write_bytes(data)
        fault = faulty_setting()
        assert fault is not None
        assert fault[0].startswith(f"{token}: found {said}")
    plain.setenv("HF_TOKEN", "hf_abc")
    assert faulty_setting() is None
    assert token_source() == "HF_TOKEN"
    plain.delenv("HF_TOKEN")
    token.unlink()
    token.mkdir()
    fault = faulty_setting()
    assert fault is not None
    assert fault[0].startswith(f"{token}: cannot be read")


def test_permissions_are_blamed_where_the_system_names_them() -> None:
    assert unreadable(PermissionError(errno.EACCES, "Permission denied")) == "Check its permissions."
    for number in (errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR):
        assert "permission" not in unreadable(OSError(number, "")).lower()


def written(data: bytes) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        (folder / "config.json").write_bytes(data)
        return read_json_object(folder / "config.json", error=TokenizerError)

    return read


@pytest.mark.parametrize(
    "read",
    [
        *map(written, (b"", b"{", b"[]", b"\xff", b"<html>", b"version https://git-lfs.github.com/spec/v1")),
        lambda folder: read_json_object(folder / "none.json", error=TokenizerError),
        lambda folder: read_json_object(folder, error=TokenizerError),
        lambda folder: build_tokenizer({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}, "file"),
        lambda folder: build_tokenizer({"model": [], "added_tokens": {}}, "file"),
        lambda folder: build_tokenizer({"model": {}, "added_tokens": [{"content": 3}]}, "file"),
    ],
)
def test_what_a_file_holds_is_told_instead_of_damage(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(MlxqwenError) as caught:
        read(tmp_path)
    assert caught.value.hint
    assert not BLAMING.search(str(caught.value))
