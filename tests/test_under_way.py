"""Downloads that another process has under way: told by `list`, waited for by `pull`, left alone by `rm`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlxqwen.errors import HubError
from mlxqwen.files.downloads import removal_of
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.files.locks import try_lock
from mlxqwen.files.under_way import (
    alone_in_process,
    begun_bytes,
    is_under_way,
    marked,
    none_under_way,
    remove_leftovers,
)
from tests.command_line import run
from tests.loopback_hub import COMMIT, HubModel, LoopbackHub, running_hub
from tests.test_preview import Commands

DEMO = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir() if path.is_file()}
WEIGHTS = len(DEMO["model.safetensors"])


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """Has one model, of whose weights it delivers half."""
    with running_hub({"org/demo": HubModel(DEMO, stalled={"model.safetensors"})}) as server:
        yield server


@pytest.fixture
def commands(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    """Their cache is the one that this process looks into."""
    with running_hub({}) as elsewhere:
        made = Commands(hub.url, elsewhere, tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.home / "hub"))
        monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "converted"))
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        monkeypatch.setattr("modelscope_hub.config._default_config", None)
        yield made


@contextmanager
def pulling(commands: Commands) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "mlxqwen", "pull", "org/demo"]
    process = subprocess.Popen(
        command, env=commands.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(holds: Callable[[], object]) -> None:
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def weights_in_part(commands: Commands) -> list[Path]:
    model = commands.home / "hub" / "models--org--demo"
    if not (model / "snapshots" / COMMIT / "tokenizer.json").exists():  # the largest of the others
        return []
    return [*(model / "blobs").glob("*.incomplete")]  # empty: the client writes 10 MB at a time


def state() -> tuple[str, bool]:
    (row,) = json.loads(run("list", "--json").out)["models"]
    return row["state"], row["downloading"]


def test_what_another_process_downloads(hub: LoopbackHub, commands: Commands) -> None:
    snapshot = commands.home / "hub" / "models--org--demo" / "snapshots" / COMMIT
    with pulling(commands) as first:
        until(lambda: weights_in_part(commands))
        assert state() == ("incomplete", True)
        assert "incomplete, downloading" in run("list").out
        for arguments in (["--yes"], ["--dry-run"]):
            refused = run("rm", "org/demo", *arguments)
            assert (refused.status, refused.out) == (1, "")
            assert refused.err.startswith("error: org/demo: another process is downloading it\n")
        assert weights_in_part(commands)
        with pulling(commands) as second:
            assert second.stderr is not None
            note = "note: org/demo: another process is downloading it; what it has begun is waited for\n"
            assert second.stderr.readline() == note
            hub.models["org/demo"].stalled.clear()
            hub.ends.set()
            assert first.wait(60) == second.wait(60) == 0
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == DEMO
    assert state() == ("ready", False)
    assert run("rm", "org/demo", "--yes").status == 0
    assert not snapshot.exists()


def test_a_process_that_was_ended_holds_nothing(hub: LoopbackHub, commands: Commands) -> None:
    with pulling(commands) as process:
        until(lambda: weights_in_part(commands))
        process.kill()
        process.wait()
    assert weights_in_part(commands)
    assert state() == ("incomplete", False)
    assert run("rm", "org/demo", "--yes").status == 0
    assert not (commands.home / "hub" / "models--org--demo").exists()


def test_a_download_that_begins_between_the_question_and_the_answer(commands: Commands, tmp_path: Path) -> None:
    """Here as another open file of the same process, for which locks are the same."""
    cache = commands.home / "hub"
    (cache / "models--org--demo" / "snapshots" / COMMIT).mkdir(parents=True)
    removal = removal_of("org/demo")
    with marked(cache / ".locks" / "models--org--demo"):
        with pytest.raises(HubError, match="another process is downloading it"):
            removal.run()
        assert removal.paths[0].exists()
    removal.run()
    assert not removal.paths[0].exists()


def test_marks_are_shared_and_seen(tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    assert not is_under_way(locks)
    with marked(locks), marked(locks):
        assert is_under_way(locks)
        with pytest.raises(HubError, match="a: another process"), none_under_way(locks, "a"):
            pass
    assert not is_under_way(locks)


@pytest.mark.parametrize("is_removed", [False, True], ids=["stays", "is removed"])
def test_a_mark_waits_for_who_holds_the_lock(tmp_path: Path, is_removed: bool) -> None:
    locks, is_marked, may_end = tmp_path / "locks", threading.Event(), threading.Event()
    with marked(locks):
        pass

    def download() -> None:
        with marked(locks):
            is_marked.set()
            may_end.wait(60)

    thread = threading.Thread(target=download)
    with none_under_way(locks, "a"):
        thread.start()
        assert not is_marked.wait(0.1)
        if is_removed:
            shutil.rmtree(locks)
    assert is_marked.wait(60)
    assert is_under_way(locks)
    may_end.set()
    thread.join()
    assert not is_under_way(locks)


BOTH = """
import logging, sys, threading
from mlxqwen.files.hub import resolve_model
logging.basicConfig(format="%(levelname)s %(message)s")
folders = []
threads = [threading.Thread(target=lambda: folders.append(resolve_model("org/demo"))) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(folders), len(set(folders)), folders[0])
"""


def test_two_threads_of_a_process_download_once(hub: LoopbackHub, commands: Commands) -> None:
    command = [sys.executable, "-c", BOTH]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=commands.environment, stdout=pipe, stderr=pipe, text=True)
    assert process.stderr is not None
    told = process.stderr.readline()
    assert (
        told == "WARNING org/demo: another thread of this process is downloading it; what it has begun is waited for\n"
    )
    hub.models["org/demo"].stalled.clear()
    hub.ends.set()
    out, err = process.communicate(timeout=60)
    assert (out.split(" ")[:2], err) == (["2", "1"], "")
    asked = [one.path for one in hub.requests if one.method == "GET" and one.path.endswith("/tokenizer.json")]
    assert len(asked) == 1
    assert {path.name: path.read_bytes() for path in Path(out.split(" ", 2)[2].strip()).iterdir()} == DEMO


def test_threads_take_turns_for_one_model_alone(tmp_path: Path) -> None:
    waits: list[str] = []

    def in_turn(folder: str) -> bool:
        with alone_in_process(tmp_path / folder, lambda: waits.append(folder)) as has_waited:
            return has_waited

    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(in_turn("a")))
    with alone_in_process(tmp_path / "a", lambda: waits.append("first")) as has_waited:
        assert not has_waited
        assert not in_turn("b")
        thread.start()
        until(lambda: waits)
        assert results == []
    thread.join()
    assert (waits, results, in_turn("a")) == (["a"], [True], False)


def test_a_place_that_cannot_be_written_is_not_marked(tmp_path: Path) -> None:
    (tmp_path / "locks").touch()
    with marked(tmp_path / "locks"):
        assert not is_under_way(tmp_path / "locks")


def test_parts_that_no_download_goes_on_with_go_and_do_not_count(tmp_path: Path) -> None:
    blobs, locks = tmp_path / "blobs", tmp_path / "locks"
    blobs.mkdir()
    locks.mkdir()
    sizes = {"a.0123abcd": 1, "b.0123abcd": 2, "c.0123abcd": 4, "d": 8}  # the last as older clients go on with it
    for name, size in sizes.items():
        (blobs / f"{name}.incomplete").write_bytes(b"x" * size)
    for name in "abc":
        (locks / f"{name}.lock").touch()
    held = os.open(locks / "a.lock", os.O_RDWR)
    assert try_lock(held)
    long_ago = time.time() - 3600
    for name in ("a.0123abcd", "b.0123abcd", "d"):
        os.utime(blobs / f"{name}.incomplete", (long_ago, long_ago))
    assert begun_bytes(blobs, locks) == 1 + 8
    remove_leftovers(blobs, locks)
    os.close(held)
    assert {path.name for path in blobs.iterdir()} == {f"{name}.incomplete" for name in sizes if name[0] != "b"}
