"""What a terminal is shown while a model is loaded and a prompt is read."""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Generator

import pytest

from mlxqwen.chat.reply import Delta
from mlxqwen.cli.chat_answer import Answer, OnPrefill, show_answer
from mlxqwen.cli.chat_view import PlainView
from mlxqwen.cli.terminal import LoadingLine, PrefillProgress, prefill_lines
from mlxqwen.engine.events import Event
from mlxqwen.status_line import StatusLine
from tests.command_line import Terminal, run, written
from tests.test_cli_generate import says


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(io.BytesIO(), encoding="utf-8", newline="", write_through=True)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a line was drawn."""
    event, draw = threading.Event(), StatusLine.draw

    def noted(self: StatusLine, *versions: str) -> None:
        draw(self, *versions)
        event.set()

    monkeypatch.setattr(StatusLine, "draw", noted)
    return event


def test_a_long_prompt_is_told_before_its_first_chunk(terminal: Terminal) -> None:
    progress = PrefillProgress(terminal)
    progress(0, 22_898)
    assert written(terminal) == "\rReading the prompt: 0 of 22,898 tokens"
    progress(22_898, 22_898)
    assert written(terminal).endswith("\r\x1b[K")


def test_a_short_prompt_is_not(terminal: Terminal) -> None:
    progress = PrefillProgress(terminal)
    for done in (0, 20):
        progress(done, 20)
    progress(16, 400)  # the next one, most of it cached
    assert written(terminal) == ""
    progress(200, 400)
    assert written(terminal).startswith("\rReading the prompt: 200 of 400 tokens")


def test_a_prompt_that_is_long_turned_into_tokens_is_told(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, drawn: threading.Event
) -> None:
    monkeypatch.setattr(PrefillProgress, "_SECONDS", 0.0)
    progress = PrefillProgress(terminal)
    progress.begin()
    assert drawn.wait(5)
    assert written(terminal) == "\rReading the prompt"
    progress(0, 20)
    assert written(terminal).endswith("\r\x1b[K")
    progress(20, 20)


def test_ctrl_c_is_heard_while_a_prompt_of_a_chat_is_turned_into_tokens() -> None:
    after: list[str] = []

    def begins(on_prefill: OnPrefill) -> Generator[Event]:
        signal.raise_signal(signal.SIGINT)
        after.append("went on")
        raise AssertionError

    view = PlainView(io.StringIO(), io.StringIO(), folds_reasoning=False, count_tokens=len)
    answer = show_answer(begins, view, stoppable=True)
    assert answer == Answer(None, has_begun=False)
    assert after == []


def test_rate_and_time_left() -> None:
    long, middle, short, least = prefill_lines(1_536, 2_048, 512, 2.0)
    assert long == "Reading the prompt: 1,536 of 2,048 tokens  256 tokens/s  0:02 left"
    assert middle == "Reading the prompt: 1,536 of 2,048 tokens  0:02 left"
    assert short == "Reading the prompt: 1,536 of 2,048 tokens"
    assert least == "Prompt: 75 %"
    assert prefill_lines(0, 10, 0, 0.0)[0] == "Reading the prompt: 0 of 10 tokens"


def test_loading_is_told_once_it_takes_long(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, drawn: threading.Event
) -> None:
    monkeypatch.setattr(LoadingLine, "_SECONDS", 0.0)
    with LoadingLine(terminal, "Qwen/Qwen3-4B\n"):
        assert drawn.wait(5)
    assert written(terminal).startswith("\rLoading Qwen/Qwen3-4B")
    assert written(terminal).endswith("\r\x1b[K")


def test_quick_loading_and_pipes_are_silent(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoadingLine(terminal, "x"):
        pass
    assert written(terminal) == ""
    monkeypatch.setattr(LoadingLine, "_SECONDS", 0.0)
    pipe = io.StringIO()
    with LoadingLine(pipe, "x"):
        time.sleep(0.01)
    with LoadingLine(terminal, "x") as line:
        line.end()
        before = written(terminal)
        line._draw()
        assert written(terminal) == before
    assert pipe.getvalue() == ""


def test_speed_is_the_last_dim_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    says(monkeypatch, Delta(content="so"))
    assert run("generate", "a", on_terminal=True).err.endswith("\x1b[2m7 tokens, 7.0 tokens/s\n\x1b[22m")
    for options in (["-q"], ["--json"]):
        assert "tokens/s" not in run("generate", "a", *options, on_terminal=True).err
    assert run("generate", "a").err == ""
