"""Having files on the disk itself, on systems whose `fsync` stops short of it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from mlxqwen.files import atomic

FULL = 51  # F_FULLFSYNC on macOS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync"))
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: done.append(f"fcntl {command}"))
    return done


def test_macos_is_asked_for_more_than_fsync(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_FULL_FSYNC", FULL)
    atomic.sync(tmp_path)
    assert calls == [f"fcntl {FULL}"]


def test_other_systems_have_fsync(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_FULL_FSYNC", None)
    atomic.sync(tmp_path)
    assert calls == ["fsync"]


@pytest.mark.parametrize(("code", "falls_back"), [(errno.ENOTSUP, True), (errno.EIO, False)])
def test_file_systems_that_know_only_fsync(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, code: int, falls_back: bool
) -> None:
    def fail(descriptor: int, command: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "_FULL_FSYNC", FULL)
    monkeypatch.setattr(fcntl, "fcntl", fail)
    if falls_back:
        atomic.sync(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            atomic.sync(tmp_path)
    assert calls == (["fsync"] if falls_back else [])
