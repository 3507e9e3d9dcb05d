"""`scripts/clients`: its table of clients, its command line, and what it makes of programs that pass and fail."""

from __future__ import annotations

import sys
from pathlib import Path

import clients
import pytest
from clients import CLIENTS, PROGRAMS, Client, ClientError, run_client


def test_every_client_has_its_program_and_every_program_its_client() -> None:
    assert len({client.name for client in CLIENTS}) == len(CLIENTS)
    programs = {path.name for path in PROGRAMS.glob("*.*") if path.name != "__init__.py"}
    assert {client.program for client in CLIENTS} | {"mcp_clock.py"} == programs


def test_a_name_that_no_client_has_is_told_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clients", "netscape"])
    with pytest.raises(SystemExit, match="2"):
        clients.main()
    assert "found 'netscape', expected one of openai, openai-node" in capsys.readouterr().err


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose Python is this one, and programs of its own."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(clients, "PROGRAMS", tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "the user's")
    return tmp_path


def test_what_a_program_prints_has_passed_and_it_sees_nothing_of_the_users(made: Path) -> None:
    text = "import os, sys; assert 'OPENAI_API_KEY' not in os.environ; print('chat'); print(*sys.argv[1:])"
    (made / "program.py").write_text(f"{text}; print(os.environ['HOME'])")
    passed = run_client(Client("a", "program.py", ()), made, "http://x/v1", "demo", timeout=60)
    assert passed == ["chat", "http://x/v1 demo", str(made / "home")]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('chat'); raise AssertionError('no answer')", "after chat: AssertionError: no answer"),
        ("raise SystemExit(3)", "after nothing"),
        ("import time; time.sleep(60)", "not over after 0.5 s"),
    ],
)
def test_a_program_that_fails_is_told_with_its_last_words(made: Path, program: str, words: str) -> None:
    (made / "program.py").write_text(program)
    with pytest.raises(ClientError, match=words):
        run_client(
            Client("a", "program.py", ()), made, "http://x/v1", "demo", timeout=0.5 if "sleep" in program else 60
        )
