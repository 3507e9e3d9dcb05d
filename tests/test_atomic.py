"""Files that are whole or not there, and on the disk itself, also on systems whose `fsync` stops short of it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import nullcontext
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


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "elsewhere").write_bytes(b"mine")
    path.symlink_to(tmp_path / "elsewhere")
    atomic.write_file(path, b"one")
    assert (path.read_bytes(), path.is_symlink()) == (b"one", False)
    atomic.write_file(path, iter([b"t", b"wo"]))
    assert path.read_bytes() == b"two"
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"
    assert {found.name for found in tmp_path.iterdir()} == {"file", "elsewhere"}


def test_what_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(KeyboardInterrupt):
        atomic.write_file(path, pieces())
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="Input/output error"):
                atomic.write_file(path, b"new")
        assert path.read_bytes() == b"old"
    for wrong in (tmp_path / "no such folder/file", tmp_path):
        with pytest.raises(OSError, match=r"No such|directory"):
            atomic.write_file(wrong, b"new")
    with pytest.raises(ValueError, match="null"):
        atomic.write_file(tmp_path / "nul\0/file", b"new")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("code", "is_told"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_told: bool
) -> None:
    def fail(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "sync", fail)
    with pytest.raises(OSError, match=os.strerror(code)) if is_told else nullcontext():
        atomic.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o400])
def test_a_file_of_the_user_s_own_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    atomic.write_file(path, b"new", private=True, keeps_mode=True)
    assert (path.read_bytes(), mode_of(path)) == (b"new", mode)
    atomic.write_file(path, b"newer", private=True)
    assert (path.read_bytes(), mode_of(path)) == (b"newer", 0o600)


def test_a_link_gives_no_mode_to_the_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "other").chmod(0o666)
    (tmp_path / "file").symlink_to("other")
    atomic.write_file(tmp_path / "file", b"new", private=True, keeps_mode=True)
    assert mode_of(tmp_path / "file") == 0o600
    assert (tmp_path / "other").read_bytes() == b"other"


@pytest.mark.parametrize("umask", [0, 0o077])
def test_private_files_are_their_owner_s_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        atomic.write_file(tmp_path / "private", b"", private=True)
        atomic.write_file(tmp_path / "plain", b"")
        with atomic.staging_folder(tmp_path) as staging:
            assert mode_of(staging) == 0o700
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "private"), mode_of(tmp_path / "plain")) == (0o600, 0o666 & ~umask)
    assert not staging.exists()
