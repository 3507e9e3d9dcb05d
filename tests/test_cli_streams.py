"""Errors of standard streams and of the working folder name what failed, however Python was started."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.cli import _told
from mlxqwen.cli.streams import name_streams
from tests.command_line import run

FULL = Path("/dev/full")
ON_FULL = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def command(*arguments: str, unbuffered: bool = False, cwd: str | None = None, **streams: int) -> tuple[int, str, str]:
    """`mlxqwen ARGUMENTS` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    given: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **streams,
    }
    done = subprocess.run(
        [sys.executable, "-m", "mlxqwen", *arguments],
        env=environment,
        cwd=cwd,
        text=True,
        check=False,
        timeout=60,
        **given,
    )
    return done.returncode, done.stdout or "", done.stderr or ""


@ON_FULL
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["completion", "bash"], ["info"]])
def test_a_full_standard_output_is_named(arguments: list[str], unbuffered: bool) -> None:
    with FULL.open("w") as full:
        status, _, told = command(*arguments, unbuffered=unbuffered, stdout=full.fileno())
    assert (status, told) == (1, "error: standard output: No space left on device\n")


@ON_FULL
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_standard_error_changes_no_answer(unbuffered: bool) -> None:
    with FULL.open("w") as full:
        status, shown, _ = command("--version", unbuffered=unbuffered, stderr=full.fileno())
        assert (status, shown.split()[0]) == (0, "mlxqwen,")
        assert command("generate", "--no-such", unbuffered=unbuffered, stderr=full.fileno())[:2] == (1, "")


def test_an_unreadable_standard_input_is_named(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as for_writing:
        status, _, told = command("generate", "-", stdin=for_writing.fileno())
    assert (status, told) == (1, "error: standard input: Bad file descriptor\n")


def test_a_removed_working_folder_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    run_in = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from mlxqwen.cli import main; import sys; "
    run_in += "sys.argv = ['mlxqwen', 'generate', 'hi', '--prompt-cache', 'folder']; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", run_in], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: working folder: No such file or directory\n"
        "       The working folder was removed: change to one that exists (cd).\n"
    )


def test_named_streams_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"one\r\ntwo\xff\n")
    streams = {
        "stdin": os.fdopen(reading, "r", encoding="utf-8", errors="surrogateescape"),
        "stdout": os.fdopen(os.dup(writing), "w", encoding="latin-1", errors="replace"),
        "stderr": os.fdopen(writing, "w", encoding="ascii", errors="backslashreplace", buffering=1),
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    name_streams()
    for name, stream in streams.items():
        named = getattr(sys, name)
        assert named is not stream
        for attribute in ("encoding", "errors", "line_buffering", "write_through"):
            assert getattr(named, attribute) == getattr(stream, attribute)
        assert (named.fileno(), named.isatty()) == (stream.fileno(), False)
    sys.stderr.write("ü\n")  # a line goes out at once
    sys.stdout.write("é")
    assert [sys.stdin.readline() for _ in range(3)] == ["one\n", "two\udcff\n", "\\xfc\n"]
    sys.stdout.flush()
    assert os.read(reading, 10) == b"\xe9"
    for opened in (sys.stdin, sys.stdout, sys.stderr, *streams.values()):
        opened.close()


def test_streams_in_memory_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = io.TextIOWrapper(io.BytesIO())
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, memory)
    monkeypatch.setattr(sys, "stderr", None)
    name_streams()
    assert sys.stdin is sys.stdout is memory
    assert sys.stderr is None


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    assert run("generate", "--model", str(folder), "hi").err == (
        f"error: {folder / 'config.json'}: Permission denied\n"
        "       Check its permissions, and those of the folders that it lies in.\n"
    )


def test_a_file_that_may_not_be_read_is_told_with_a_way_out() -> None:
    problem, hint = _told(PermissionError(errno.EACCES, "Permission denied", "/models/config.json"))
    assert (problem, hint[:22]) == ("/models/config.json: Permission denied", "Check its permissions,")
    assert _told(PermissionError(errno.EACCES, "Permission denied")) == ("Permission denied", "")
