"""Waiting for a hub: what is shown, silence, and leaving; by a clock of our own."""

from __future__ import annotations

import io
import logging
import threading
from itertools import count
from unittest.mock import Mock

import pytest

from mlxqwen.cli.serve import _leave, _log_requests, _LogHandler
from mlxqwen.files.transfer import Download, Given, SilenceError, download_lines, has_abandoned, looking_up, waited_for
from mlxqwen.status_line import StatusLine
from tests.command_line import Terminal, library_logging_kept, written


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(io.BytesIO(), encoding="utf-8", newline="", write_through=True)


def test_what_comes_is_told_with_its_rate() -> None:
    lines = download_lines("Qwen/Qwen3-4B", 3_400_000_000, 8_000_000_000, 310_000_000, 10.0, 0.1)
    assert lines[0] == ("Downloading Qwen/Qwen3-4B  42 %  |########            |  3.4 of 8.0 GB  31.0 MB/s  2:28 left")
    assert lines[-3:] == [
        "Downloading Qwen/Qwen3-4B  42 %  2:28 left",
        "Downloading Qwen/Qwen3-4B  42 %",
        "Downloading  42 %",
    ]
    assert download_lines("m", 0, 50_000, 0, 9.0, 8.0)[2] == "Downloading m   0 %  0.0 of 50.0 kB  nothing for 8 s"
    assert download_lines("m", 9, 5, 1, 1.0, 0.0)[-1] == "Downloading 100 %"  # another revision's file counts, too
    assert download_lines("m\n", 0, 10**11, 10**6, 1.0, 0.0)[4] == r"Downloading m\n   0 %  27:46:40 left"


def test_silence_ends_the_wait_and_the_work_is_told(terminal: Terminal) -> None:
    told, seconds = threading.Event(), count(0.0, 5.0)

    def work(given: Given) -> None:
        given.wait()
        told.set()

    download = Download("org/m", 100, lambda: 40, 20.0, "HF_HUB_DOWNLOAD_TIMEOUT", is_shown=True)
    with pytest.raises(SilenceError, match=r"^nothing came for 20 seconds \(HF_HUB_DOWNLOAD_TIMEOUT sets half"):
        waited_for(work, download, terminal=terminal, clock=lambda: next(seconds))
    assert told.wait(5)
    assert "Downloading org/m  40 %" in written(terminal)
    assert "nothing for 15 s" in written(terminal)
    assert written(terminal).endswith("\r\x1b[K")


def test_what_comes_at_once_is_told_too(terminal: Terminal) -> None:
    download = Download("org/m", 100, lambda: 40, 20.0, "X", is_shown=True)
    assert waited_for(lambda given: "here", download, terminal=terminal) == "here"
    assert written(terminal).startswith("\rDownloading org/m  40 %")


def test_bytes_that_come_keep_it_waiting(terminal: Terminal) -> None:
    seconds, arrived, looked = count(0.0, 15.0), count(1), threading.Semaphore(0)

    def coming() -> int:
        looked.release()
        return next(arrived)

    def work(_: Given) -> str:
        for _number in range(4):
            looked.acquire()
        return "here"

    download = Download("org/m", 100, coming, 20.0, "X", is_shown=False)
    assert waited_for(work, download, terminal=terminal, clock=lambda: next(seconds)) == "here"


def test_errors_of_the_work_are_its_own() -> None:
    def work(_: Given) -> None:
        raise ValueError("so")

    with pytest.raises(ValueError, match=r"^so$"):
        waited_for(work)


def test_ctrl_c_leaves_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def work(given: Given) -> None:
        goes_on.wait()
        with pytest.raises(SilenceError):
            given.check()
        ended.set()

    def interrupted() -> int:
        raise KeyboardInterrupt

    arrived = iter([lambda: 0, interrupted])
    with pytest.raises(KeyboardInterrupt):
        waited_for(work, Download("org/m", 1, lambda: next(arrived)(), 9.0, "X", is_shown=True))
    assert has_abandoned()
    goes_on.set()
    assert ended.wait(5)


def test_the_look_up_is_told_at_once(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal)
    with looking_up("org/m"):
        assert written(terminal) == "\rLooking up org/m"
        StatusLine(terminal).draw("x")
        assert written(terminal).endswith("\r\x1b[K\rx")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = written(terminal)
    with looking_up("org/m"):
        assert written(terminal) == before


def test_a_line_of_the_servers_log_takes_the_place_of_the_progress(terminal: Terminal) -> None:
    StatusLine(terminal).draw("Downloading   2 %")
    _LogHandler(terminal).handle(logging.makeLogRecord({"msg": "GET /health 200"}))
    assert written(terminal) == "\rDownloading   2 %\r\x1b[KGET /health 200\n"


def test_where_no_terminal_is_the_log_has_a_line_a_tenth_and_half_a_minute_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlxqwen.files.transfer._POLL", 0.001)
    caplog.set_level(logging.INFO, "mlxqwen.download")
    # Each look is 10 seconds after the last: a tenth comes between two of the first, later between five.
    arrived = [0, 10, 20, 30, 40, 50, 52, 54, 56, 58, 60, 62, 64, 66, 68, 70, *[100] * 100]
    looks, done = iter(arrived), threading.Semaphore(0)

    def coming() -> int:
        done.release()
        return next(looks)

    def work(_: Given) -> str:
        for _number in range(len(arrived) - 100):
            done.acquire()
        return "here"

    seconds = count(0.0, 10.0)
    for is_shown in (True, False):
        looks = iter(arrived)
        download = Download("org/m", 100, coming, 1e9, "X", is_shown=is_shown)
        assert waited_for(work, download, terminal=io.StringIO(), clock=lambda: next(seconds)) == "here"
    told = [record.getMessage().partition(" %")[0].rpartition(" ")[2] for record in caplog.records]
    assert told[:4] == ["0", "30", "52", "62"]
    assert caplog.messages[1].startswith("Downloading org/m  30 %  0.0 of 0.1 kB  ")
    assert caplog.messages.count(caplog.messages[0]) == 1


def test_the_servers_log_has_lines_of_downloads(capsys: pytest.CaptureFixture[str]) -> None:
    with library_logging_kept():
        _log_requests()
        logging.getLogger("mlxqwen.download").info("Downloading org/m  30 %")
        assert capsys.readouterr().err.endswith(" Downloading org/m  30 %\n")


def test_a_server_that_leaves_a_download_wipes_its_progress(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os._exit", Mock(side_effect=SystemExit))
    StatusLine(terminal).draw("Downloading   2 %")
    with pytest.raises(SystemExit):
        _leave(130)
    assert written(terminal) == "\rDownloading   2 %\r\x1b[K"
