"""Ctrl-C leaves the shell a line of its own: the terminal writes ^C wherever the cursor stands."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pexpect
import pytest

from tests.command_line import run

HERE = "from here\n"
COMMANDS = {
    "generate": (["generate", "Hello", "--model", "org/m"], "\n"),
    "quiet": (["generate", "Hello", "--model", "org/m", "--quiet"], "\n"),
    "chat": (["chat", "org/m"], "\n"),
    "bench": (["bench", "--model", "org/m"], "\n"),
    "info": (["info", "org/m"], "\n"),
    "pull": (["pull", "org/m"], "\n"),
    "serve": (["serve", "org/m", "--port", "0"], "\n"),
    "convert": (["convert", "org/m", "out"], f"\r\x1b[Kinterrupted; the same command with --resume goes on {HERE}"),
    "batch": (
        ["generate", "--model", "org/m", "--batch", "questions.jsonl", "--output", "answers.jsonl"],
        f"\r\x1b[Kinterrupted after 0 of 1 answers; the same command goes on {HERE}",
    ),
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a batch in it; Ctrl-C is pressed while the model is looked for."""
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Hello"}\n')
    monkeypatch.chdir(tmp_path)

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxqwen.files.hub.hub_id_of_alias", pressed)  # where every command looks for its model
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_ends(name: str) -> None:
    arguments, last = COMMANDS[name]
    result = run(*arguments, on_terminal=True)
    assert (result.status, result.err) == (130, last)


def test_a_terminal_that_erases_nothing_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    arguments, last = COMMANDS["convert"]
    assert run(*arguments, on_terminal=True).err == last.replace("\r\x1b[K", "\n")


def test_a_log_is_told_without_controls() -> None:
    arguments, last = COMMANDS["convert"]
    assert run(*arguments).err == last.removeprefix("\r\x1b[K")


@pytest.mark.parametrize("log", [False, True], ids=["terminal", "standard error in a file"])
def test_a_server_ends_its_line(tmp_path: Path, log: bool) -> None:
    command = f"exec {sys.executable} -m mlxqwen serve --port 0" + (" 2> log.txt" if log else "")
    terminal = pexpect.spawn("/bin/sh", ["-c", command], encoding="utf-8", timeout=60, cwd=str(tmp_path))
    terminal.expect_exact("The chat page is at ")
    terminal.expect_exact("\r\n")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.before) == (130, "^C\r\n")
    if log:
        assert (tmp_path / "log.txt").read_text() == ""


def test_another_signal_leaves_the_line_as_it_is(tmp_path: Path) -> None:
    command = ["-m", "mlxqwen", "serve", "--port", "0"]
    terminal = pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=60, cwd=str(tmp_path))
    terminal.expect_exact("The chat page is at ")
    terminal.expect_exact("\r\n")
    terminal.kill(signal.SIGTERM)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.before) == (0, "")
