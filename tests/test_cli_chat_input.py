"""The chat's line editor, in the test's own process: keys, completions, the history."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlxqwen.cli.chat_completion import ChatCompleter
from mlxqwen.cli.chat_history import FileHistory, history_path, open_history
from mlxqwen.cli.chat_input import Keyboard

SEARCH, INTERRUPT, BACKSPACE, LEFT, RIGHT, DELETE, UP = "\x12", "\x03", "\x7f", "\x1b[D", "\x1b[C", "\x1b[3~", "\x1b[A"
FAMILY, FLAG, THUMB, HEART = "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️"

Read = Callable[..., str]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Read]:
    """What the keyboard gives for keys, with lines typed before."""
    monkeypatch.setattr("mlxqwen.cli.chat_input.create_output", lambda stream: DummyOutput())
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def type_keys(typed: str, *before: str) -> str:
            keyboard = Keyboard(InMemoryHistory(before))
            monkeypatch.setattr(keyboard, "_drop_interrupts", lambda: None)
            keys.send_text(typed)
            return keyboard.read()

        yield type_keys


def test_the_history_is_searched(read: Read) -> None:
    before = ("How many r's in strawberry?", "What is 12 + 39?")
    assert read(f"{SEARCH}straw\r\r", *before) == before[0]
    assert read(f"{SEARCH}straw\r now\r", *before) == f"{before[0]} now"
    assert read(f"{SEARCH}a{SEARCH}\r\r", *before) == before[0]
    assert read(f"kept{SEARCH}straw{INTERRUPT}\r", *before) == "kept"


@pytest.mark.parametrize("character", [FAMILY, FLAG, THUMB, HEART, "é", "한", "x"])
def test_one_key_is_one_character(read: Read, character: str) -> None:
    assert read(f"a{character}{BACKSPACE}b\r") == "ab"
    assert read(f"{character}{character}{BACKSPACE}\r") == character
    assert read(f"a{character}{LEFT}b\r") == f"ab{character}"
    assert read(f"{character}b{LEFT}{LEFT}{DELETE}\r") == "b"
    assert read(f"{character}b{LEFT}{LEFT}{RIGHT}c\r") == f"{character}cb"


def test_lines_are_joined_by_backspace(read: Read) -> None:
    assert read(f"a\\\r{BACKSPACE}b\r") == "ab"
    assert read(f"{BACKSPACE}a{LEFT}{LEFT}{DELETE}b\r") == "b"


def completions(typed: str) -> list[str]:
    found = ChatCompleter().get_completions(Document(typed), CompleteEvent(completion_requested=True))
    return [typed[: len(typed) + one.start_position] + one.text for one in found]


def test_commands_are_completed() -> None:
    assert completions("/s") == ["/system", "/save", "/stats"]
    assert completions("/save") == ["/save"]
    assert completions("Hello /s") == completions("/budget ") == completions("/nothing x") == completions("") == []


def test_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("first.json", "find.txt", ".hidden", "it's.json", "bad\n"):
        (tmp_path / name).write_text("")
    (tmp_path / "my talks").mkdir()
    (tmp_path / "my talks" / "one.json").write_text("")
    assert completions("/load fi") == ["/load find.txt", "/load first.json"]
    assert completions("/save ~/first") == ["/save ~/first.json"]
    assert completions(f"/load {tmp_path}/first") == [f"/load {tmp_path}/first.json"]
    assert completions("/load m") == ["/load 'my talks/"]
    assert completions("/load 'my talks/") == ["/load 'my talks/one.json'"]
    assert completions('/load "my talks/o') == ["/load 'my talks/one.json'"]
    assert completions("/load my\\ talks/o") == ["/load 'my talks/one.json'"]
    assert completions("/load .h") == ["/load .hidden"]
    assert len(completions("/load ")) == 4
    assert completions("/load none/") == completions("/load a\0") == []


def kept(path: Path) -> list[str]:
    return list(FileHistory(path).load_history_strings())


def test_the_history_is_kept_between_runs_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    first = FileHistory(path)
    for text in ("one", "two\nlines", "\udcff"):
        first.append_string(text)
    assert kept(path) == ["\udcff", "two\nlines", "one"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert kept(path)[-1] == "one"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_long_or_damaged_history_is_read_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history"
    path.write_bytes(b'\xff\n"one"\n[1]\n"\n"two"')
    assert kept(path) == ["two", "one"]
    path.write_text("".join(f"{json.dumps(str(i))}\n" for i in range(4_001)))
    assert kept(path)[0] == "4000"
    assert len(path.read_text().splitlines()) == len(kept(path)) == 2_000
    monkeypatch.setattr("mlxqwen.cli.chat_history._MOST_BYTES", 100)
    assert kept(path) == [str(i) for i in range(4_000, 3_986, -1)]


def test_a_history_that_cannot_be_kept_is_told_and_the_chat_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    history = open_history(tmp_path / "file" / "history")
    history.append_string("one")
    assert list(history.get_strings()) == ["one"]
    assert "the history is not kept" in caplog.text
    caplog.clear()
    open_history(None).append_string("one")
    assert caplog.text == ""


def test_where_the_history_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "mlxqwen" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "mlxqwen" / "chat_history"
