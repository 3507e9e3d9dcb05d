"""Conversions that are killed, interrupted, crowded out or run out of disk: resumed, they end in the same bytes."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxqwen_convert import convert
from mlxqwen_convert.errors import OutputError
from mlxqwen_convert.pipeline import Written, write_task
from mlxqwen_convert.plan import Options, Plan, make_plan
from mlxqwen_convert.tasks import Task, tasks_of
from tests.convert.checkpoints import MOE, make_source

ROOT = Path(__file__).resolve().parents[2]

# A conversion slow enough to be caught at its work: small tasks, and a rest after each.
_SLOW = """
import sys, time
from mlxqwen_convert import tasks
tasks.WEIGHTS_PER_TASK = 4096
from mlxqwen.cli import main
from mlxqwen.cli.terminal import ConversionProgress
ConversionProgress.__call__ = lambda *_: time.sleep({rest})
sys.argv = ["mlxqwen", "convert", *sys.argv[1:]]
main()
"""


def start(
    source: Path, output: Path, *options: str, rest: float = 0.002, bytes_limit: int = 0
) -> subprocess.Popen[str]:
    """A conversion in a process of its own; `bytes_limit` is the most that one of its files may have."""

    def limit() -> None:
        if bytes_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_limit, bytes_limit))

    paths = os.pathsep.join([str(ROOT), str(ROOT / "convert")])
    return subprocess.Popen(
        [sys.executable, "-c", _SLOW.format(rest=rest), str(source), str(output), *options],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def wait_for_tasks(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Until the journal has so many lines, or the process has ended."""
    journal = output.with_name(output.name + ".partial") / "conversion.journal"
    while process.poll() is None:
        try:
            if journal.read_bytes().count(b"\n") >= count:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.001)


def assert_same(one: Path, other: Path) -> None:
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "in", "fp8", MOE).write(shards=2).folder


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "out"
    convert(source, output)
    return output


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tasks here as in the processes that are killed."""
    monkeypatch.setattr("mlxqwen_convert.tasks.WEIGHTS_PER_TASK", 4096)


def test_finished_tasks_are_not_done_again(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    process = start(source, output)
    wait_for_tasks(process, output, 50)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = (tmp_path / "out.partial/conversion.journal").read_bytes().count(b"\n")
    written: list[Task] = []

    def count(plan: Plan, task: Task, *rest: Any) -> Written:
        written.append(task)
        return write_task(plan, task, *rest)

    monkeypatch.setattr("mlxqwen_convert.conversion.write_task", count)
    convert(source, output, resume=True)
    assert len(written) == len(list(tasks_of(make_plan(source, Options())))) - finished
    assert_same(output, reference)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(source: Path, reference: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    output = tmp_path / "out"
    tasks = 0
    for _ in range(3):
        process = start(source, output, "--resume")
        tasks += draw.randrange(1, 60)
        wait_for_tasks(process, output, tasks)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if output.exists():
            break
        partial = tmp_path / "out.partial"
        assert not (partial / "config.json").exists()
        assert not list(partial.glob("*.safetensors"))
    if not output.exists():
        report = convert(source, output, resume=True)
        assert report.resumed
    assert_same(output, reference)
    assert list(tmp_path.iterdir()) == [output]


def test_killed_while_verifying(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(source, output)
    wait_for_tasks(process, output, 120)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not output.exists():
        convert(source, output, resume=True)
    assert_same(output, reference)


def test_what_was_damaged_since_is_made_again(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(source, output)
    wait_for_tasks(process, output, 40)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (shard,) = (tmp_path / "out.partial").glob("*.part")
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 8)
        file.write(b"\xff" * 4096)
    with (tmp_path / "out.partial/conversion.journal").open("a") as journal:
        journal.write("7.0.0-32 0123456789abcdef0123456789abcdef\n3.0")
    convert(source, output, resume=True)
    assert_same(output, reference)


def test_interrupted(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(source, output)
    wait_for_tasks(process, output, 20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not output.exists()
    process = start(source, output, "--resume", rest=0)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same(output, reference)


def test_two_at_once(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = start(source, output)
    wait_for_tasks(first, output, 5)
    first.send_signal(signal.SIGSTOP)
    for options in ([], ["--resume"]):
        second = start(source, output, *options)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 1
        assert errors.startswith("error: ")
        assert "another conversion" in errors
        assert errors.count("\n") == 2
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert_same(output, reference)


def test_a_file_that_may_not_grow(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(source, output, bytes_limit=100_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the disk is full" in errors
    assert "--resume" in errors
    assert errors.count("\n") == 2
    assert not output.exists()
    convert(source, output, resume=True)
    assert_same(output, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs is Linux's")
def test_a_disk_that_fills_up_midway(source: Path, reference: Path, small_disk: Path) -> None:
    output = small_disk / "out"
    process = start(source, output, rest=0.01)
    wait_for_tasks(process, output, 10)
    filler = small_disk / "filler"
    try:
        with filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
    except OSError:
        pass
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the disk is full" in errors
    assert not output.exists()
    with pytest.raises(OutputError, match="free"):
        convert(source, output, resume=True)
    filler.unlink()
    convert(source, output, resume=True)
    assert_same(output, reference)


def test_what_was_written_unverified_is_verified_when_resumed(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(source, output, "--no-verify")
    wait_for_tasks(process, output, 40)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = convert(source, output, resume=True)
    assert report.verified
    assert_same(output, reference)
