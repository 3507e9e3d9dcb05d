"""Messages on terminals that are narrower than they are: broken between words, and commands whole."""

from __future__ import annotations

import logging
import os

import pytest

from mlxqwen.cli import terminal
from mlxqwen.cli.terminal import print_error, print_notes
from tests.command_line import library_logging_kept, run


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "terminal_size", lambda stream: os.terminal_size((40, 24)))


PROBLEM = "./model: no such folder here, and what follows is longer than a line"


@pytest.mark.usefixtures("narrow")
def test_messages_break_between_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    print_error(PROBLEM, "Give another.")
    assert capsys.readouterr().err == f"error: {PROBLEM}\n       Give another.\n"  # not a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    print_error(PROBLEM, "Give the folder that holds config.json and the weights.")
    assert capsys.readouterr().err.splitlines() == [
        "error: ./model: no such folder here, and",
        "       what follows is longer than a",
        "       line",
        "       Give the folder that holds",
        "       config.json and the weights.",
    ]
    with library_logging_kept():
        print_notes()
        logging.getLogger("mlxqwen").warning("adapters in folders beside the weights are not applied")
    assert capsys.readouterr().err == "note: adapters in folders beside the\n      weights are not applied\n"


@pytest.mark.usefixtures("narrow")
def test_commands_stay_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = 'mlxqwen convert ./source "./my output" --quality --resume'
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for hint in (f"Finish it: {command}", f"What is written is kept. Go on: {command}"):
        print_error("unfinished", hint)
        assert capsys.readouterr().err.splitlines()[-1] == f"       {command}"
    print_error("x", "Ask: mlxqwen generate --model other yes")
    assert capsys.readouterr().err.splitlines()[1:] == ["       Ask:", "       mlxqwen generate --model other yes"]
    print_error("x", "Say no more, but ask: mlxqwen info")
    assert capsys.readouterr().err.splitlines()[1:] == ["       Say no more, but ask:", "       mlxqwen info"]


def test_the_last_switch_counts() -> None:
    for switches, is_thinking in ((["--thinking", "--no-thinking"], False), (["--no-thinking", "--thinking"], True)):
        done = run("generate", "Hello", *switches, "--verbose", "--max-tokens", "1")
        assert f"temperature {0.6 if is_thinking else 0.7}," in done.err, done.err
