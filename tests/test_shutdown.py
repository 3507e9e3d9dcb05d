"""A process ends while daemon threads compute: they come to a place where they stay, and nothing is aborted."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest

from mlxqwen import shutdown
from mlxqwen.shutdown import _NativeWork
from tests.asgi_calls import PATIENCE

LEAVES_WHILE_IT_STREAMS = """
    def work():
        for _ in range(100):
            for _ in engine.stream("Tell me a story.", max_tokens=400, sampling={"temperature": 1}):
                begun.set()

    engine = Engine.load()
"""
LEAVES_WHILE_IT_LOADS = """
    def work():
        while True:
            Engine.load(make_room=lambda nbytes: begun.set())
"""
LEAVES_WHILE_IT_CONVERTS = """
    def work():
        for number in range(1000):
            convert(DEMO_FOLDER, f"{folder}/{number}", progress=lambda stage, done, total: begun.set())

    folder = sys.argv[1]
"""


@pytest.mark.parametrize(
    "work",
    [LEAVES_WHILE_IT_STREAMS, LEAVES_WHILE_IT_LOADS, LEAVES_WHILE_IT_CONVERTS],
    ids=["streams", "loads", "converts"],
)
def test_a_process_ends_in_peace_while_a_daemon_thread(work: str, tmp_path: Path) -> None:
    script = f"""
    import sys, threading, time
    from mlxqwen import Engine
    from mlxqwen.files.hub import DEMO_FOLDER
    from mlxqwen_convert import convert

    begun = threading.Event()
    {work}
    threading.Thread(target=work, daemon=True).start()
    begun.wait({PATIENCE})
    sys.exit(7)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (7, "")


class Ending:
    """What ends, and threads that compute under it."""

    def __init__(self) -> None:
        self.native_work = _NativeWork()
        self.told: SimpleQueue[str] = SimpleQueue()

    def thread(self, work: Callable[[], None]) -> None:
        """Do `work` in a daemon thread, and tell that it has ended."""

        def do() -> None:
            work()
            self.told.put("ended")

        threading.Thread(target=do, daemon=True).start()

    def heard(self) -> str:
        return self.told.get(timeout=PATIENCE)


@pytest.mark.parametrize("way", ["leave", "pause"])
def test_the_end_waits_for_those_that_compute_and_they_stay(way: str) -> None:
    ending, may_go_on = Ending(), threading.Event()

    def work() -> None:
        with ending.native_work:
            with ending.native_work:
                ending.told.put("begun")
                may_go_on.wait(PATIENCE)
            ending.told.put("still computes")
            if way == "pause":
                ending.native_work.pause()
                ending.told.put("went on")

    ending.thread(work)
    assert ending.heard() == "begun"
    end = threading.Thread(target=ending.native_work.end)
    end.start()
    while not ending.native_work._is_over:
        pass
    assert end.is_alive()
    may_go_on.set()
    assert ending.heard() == "still computes"
    end.join(PATIENCE)
    assert not end.is_alive()
    assert ending.told.empty()


def test_who_comes_too_late_stays_and_the_main_thread_goes_on() -> None:
    ending = Ending()
    ending.native_work.end()

    def work() -> None:
        ending.told.put("comes")
        ending.native_work.begin()

    ending.thread(work)
    assert ending.heard() == "comes"
    with ending.native_work:
        ending.native_work.pause()
    assert ending.told.empty()


def test_without_an_end_threads_come_and_go() -> None:
    ending = Ending()

    def work() -> None:
        with ending.native_work:
            ending.native_work.pause()
        ending.native_work.pause()

    for _ in range(3):
        ending.thread(work)
        assert ending.heard() == "ended"
    assert not ending.native_work._depths


def test_the_end_waits_no_longer_than_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_PATIENCE", 0.01)
    ending, is_over = Ending(), threading.Event()

    def work() -> None:
        with ending.native_work:
            ending.told.put("begun")
            is_over.wait(PATIENCE)

    ending.thread(work)
    assert ending.heard() == "begun"
    ending.native_work.end()
    is_over.set()
