"""What ends a conversion, and what is left then: the machine's errors keep what is written, the source's do not."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxqwen.errors import MlxqwenError
from mlxqwen_convert import conversion, convert
from mlxqwen_convert.errors import (
    OutputError,
    ResumeError,
    SourceChangedError,
    SourceError,
    SourceUnreadableError,
    VerificationError,
)
from mlxqwen_convert.partial import PartialFolder
from mlxqwen_convert.pipeline import Written, write_task
from mlxqwen_convert.plan import Plan, make_plan
from mlxqwen_convert.target_files import TargetFiles
from mlxqwen_convert.tasks import Task
from tests.convert.checkpoints import MOE, Source, make_source
from tests.convert.test_crash import assert_same


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return make_source(tmp_path / "in", "fp8").write()


@pytest.fixture(autouse=True)
def small_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen_convert.tasks.WEIGHTS_PER_TASK", 4096)
    (tmp_path / "expected").mkdir()


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Those that are done rather than found on the disk."""
    done: list[Task] = []

    def write(plan: Plan, task: Task, *rest: Any) -> Written:
        done.append(task)
        return write_task(plan, task, *rest)

    monkeypatch.setattr("mlxqwen_convert.conversion.write_task", write)
    return done


def crash_in(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    monkeypatch.setattr(owner, name, crash)


def fail_reads(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The read of that number fails, and no other."""
    seen = 0

    def failing(read: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == number:
                raise OSError(5, "Input/output error")
            return read(*arguments)

        return fail

    for name in ("pread", "preadv"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))


def test_a_source_that_cannot_be_read_for_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[Task]
) -> None:
    convert(source.folder, tmp_path / "expected/out")
    everything = len(tasks)
    with monkeypatch.context() as patch:
        fail_reads(patch, 60)
        with pytest.raises(SourceUnreadableError, match="Input/output error"):
            convert(source.folder, tmp_path / "out", workers=1)
    tasks.clear()
    convert(source.folder, tmp_path / "out", resume=True)
    assert 0 < len(tasks) < everything
    assert_same(tmp_path / "out", tmp_path / "expected/out")


@pytest.mark.parametrize("form", ["awq", "fp8"])
def test_sixteen_threads_that_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[Task], form: str
) -> None:
    """What others go on with is the same, whichever tasks were done and in whatever order."""
    source = make_source(tmp_path / "in", form, MOE).write()
    convert(source.folder, tmp_path / "expected/out", workers=1)
    begun: list[str] = []

    def write(plan: Plan, task: Task, *rest: Any) -> Written:
        begun.append(task.key)
        if len(begun) == 60:
            raise Crash
        return write_task(plan, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("mlxqwen_convert.conversion.write_task", write)
        with pytest.raises(Crash):
            convert(source.folder, tmp_path / "out", workers=16)
    tasks.clear()
    convert(source.folder, tmp_path / "out", workers=3, resume=True)
    assert tasks
    assert_same(tmp_path / "out", tmp_path / "expected/out")


def test_an_output_that_cannot_be_read_back(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[Task]
) -> None:
    with monkeypatch.context() as patch:
        flush = TargetFiles.flush

        def flush_then_fail(files: TargetFiles) -> None:
            flush(files)
            fail_reads(patch, 1)

        patch.setattr(TargetFiles, "flush", flush_then_fail)
        with pytest.raises(OutputError, match=r"cannot be read back: Input/output error"):
            convert(source.folder, tmp_path / "out")
    tasks.clear()
    convert(source.folder, tmp_path / "out", resume=True)
    assert not tasks


def test_what_the_disk_has_lost_is_made_again(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[Task]
) -> None:
    convert(source.folder, tmp_path / "expected/out")
    with monkeypatch.context() as patch:
        flush = TargetFiles.flush

        def flush_and_damage(files: TargetFiles) -> None:
            flush(files)
            with files.paths[0].open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")

        patch.setattr(TargetFiles, "flush", flush_and_damage)
        with pytest.raises(VerificationError, match="differs from what was written"):
            convert(source.folder, tmp_path / "out")
    tasks.clear()
    convert(source.folder, tmp_path / "out", resume=True)
    assert len(tasks) == 1
    assert_same(tmp_path / "out", tmp_path / "expected/out")


def test_what_is_wrong_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "f32")
    source.stored["lm_head.weight"][1][3, 5] = np.nan
    with pytest.raises(SourceError, match="lm_head"):
        convert(source.write().folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_reads_that_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    source = make_source(tmp_path / "in", form).write()
    convert(source.folder, tmp_path / "expected/out")
    read, read_into = os.pread, os.preadv
    monkeypatch.setattr("os.pread", lambda fd, size, position: read(fd, -(-size // 2), position))
    monkeypatch.setattr("os.preadv", lambda fd, to, position: read_into(fd, [to[0][: -(-len(to[0]) // 2)]], position))
    convert(source.folder, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "expected/out")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_small_files_that_change_between_runs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "in", "fp8").write(shards=2)
    with monkeypatch.context() as patch:
        crash_in(patch, conversion._Job, "_finish")
        with pytest.raises(Crash):
            convert(source.folder, tmp_path / "out")
    path = source.folder / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ResumeError, match="changed since"):
        convert(source.folder, tmp_path / "out", resume=True)


def test_a_config_that_changes_meanwhile(source: Source, tmp_path: Path) -> None:
    def change(stage: str, done: int, total: int) -> None:
        (source.folder / "config.json").write_text(json.dumps({**source.config, "rope_theta": 777.0}))

    with pytest.raises(SourceChangedError, match=r"config\.json"):
        convert(source.folder, tmp_path / "out", progress=change)
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_replaced_once_their_header_is_read(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[Task]
) -> None:
    """Tensors in another order: the same sizes, other weights at each place."""
    other = make_source(tmp_path / "other", "fp8")
    other.stored = dict(reversed(other.stored.items()))
    other.write()

    def plan_then_replace(*arguments: Any) -> Plan:
        plan = make_plan(*arguments)
        (other.folder / "model.safetensors").replace(source.folder / "model.safetensors")
        return plan

    monkeypatch.setattr("mlxqwen_convert.conversion.make_plan", plan_then_replace)
    with pytest.raises(SourceChangedError, match=r"model\.safetensors"):
        convert(source.folder, tmp_path / "out")
    assert not tasks
    assert not (tmp_path / "out").exists()


def test_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write(shards=2)
    index = source.folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = {}
    for number, name in enumerate(dict.fromkeys(weight_map.values())):
        (source.folder / f"part{number}").mkdir()
        moved[name] = f"part{number}/model.safetensors"
        (source.folder / name).rename(source.folder / moved[name])
    index.write_text(json.dumps({"weight_map": {key: moved[name] for key, name in weight_map.items()}}))

    def stop(stage: str, done: int, total: int) -> None:
        raise Crash

    with pytest.raises(Crash):
        convert(source.folder, tmp_path / "out", progress=stop)
    os.utime(source.folder / "part0/model.safetensors", ns=(1, 1))
    with pytest.raises(ResumeError, match="changed since"):
        convert(source.folder, tmp_path / "out", resume=True)


@pytest.mark.parametrize("text", [None, ""], ids=["none", "empty, but under another name"])
def test_a_crash_before_the_manifest_is_there(source: Source, tmp_path: Path, text: str | None) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "conversion.lock").touch()
    if text is not None:
        (partial / ".partial-0123456789abcdef").write_text(text)
    convert(source.folder, tmp_path / "out", resume=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "conversion" in path.name) == [
        "conversion_report.json"
    ]


@pytest.mark.parametrize("removed", range(4))
def test_a_crash_while_a_finished_model_is_tidied(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """It has its name; what lies there beside the model goes when the output is looked at again."""
    output, unlink = tmp_path / "out", Path.unlink
    gone: list[str] = []

    def crash(path: Path, *, missing_ok: bool = False) -> None:
        if path.parent == output:
            if len(gone) == removed:
                raise Crash
            gone.append(path.name)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with suppress(Crash):
            convert(source.folder, output)
    assert len(gone) == removed
    with pytest.raises(OutputError, match="already exists"):
        convert(source.folder, output)
    convert(source.folder, tmp_path / "expected/out")
    assert_same(output, tmp_path / "expected/out")


def test_a_lock_of_another_kind_stays(source: Source, tmp_path: Path) -> None:
    convert(source.folder, tmp_path / "out")
    (tmp_path / "out" / "conversion.lock").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        convert(source.folder, tmp_path / "out")
    assert (tmp_path / "out" / "conversion.lock").read_text() == "mine"


def test_the_manifest_comes_whole(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        crash_in(patch, Path, "replace")
        with pytest.raises(Crash):
            convert(source.folder, tmp_path / "out")
    assert not (tmp_path / "out.partial/conversion.json").exists()
    convert(source.folder, tmp_path / "out", resume=True)


def test_a_manifest_that_is_damaged_says_what_to_do(source: Source, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "conversion.json").write_text("")
    with pytest.raises(ResumeError, match=r"Remove .*out\.partial to start anew"):
        convert(source.folder, tmp_path / "out", resume=True)


def test_what_somebody_put_into_the_folder_is_not_published(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Links are not written through, and nothing of it is lost."""
    convert(source.folder, tmp_path / "expected/out")
    with monkeypatch.context() as patch:
        crash_in(patch, PartialFolder, "publish")
        with pytest.raises(Crash):
            convert(source.folder, tmp_path / "out")
    partial, outside = tmp_path / "out.partial", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (partial / "secrets.txt").write_text("secret")
    (partial / "model-00002-of-00002.safetensors").write_bytes(b"weights of another")
    (partial / "modeling.py").write_text("raise SystemExit")
    (partial / "docs/deep").mkdir(parents=True)
    (partial / "docs/deep/note").write_text("note")
    (partial / "tokenizer_config.json").unlink()
    (partial / "tokenizer_config.json").symlink_to(outside / "mine")
    (partial / "additional_chat_templates").symlink_to(outside)
    (partial / ".partial-0123456789abcdef").write_text("of a writer that was killed")
    convert(source.folder, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", tmp_path / "expected/out")
    assert (outside / "mine").read_text() == "mine"
    assert [path.name for path in outside.iterdir()] == ["mine"]
    (aside,) = tmp_path.glob("out.strays-*")
    assert {str(path.relative_to(aside)) for path in aside.rglob("*") if not path.is_dir() or path.is_symlink()} == {
        "secrets.txt",
        "model-00002-of-00002.safetensors.part",
        "modeling.py",
        "docs/deep/note",
        "tokenizer_config.json",
        "additional_chat_templates",
    }
    assert str(aside) in caplog.text


def test_what_is_put_there_at_the_last_moment_is_not_published(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PartialFolder.write_text

    def write_and_add(folder: PartialFolder, name: str, text: str) -> None:
        write(folder, name, text)
        (folder.path / "late.txt").write_text("late")

    monkeypatch.setattr(PartialFolder, "write_text", write_and_add)
    convert(source.folder, tmp_path / "out")
    assert not (tmp_path / "out/late.txt").exists()
    assert (tmp_path / "out/config.json").exists()


def test_a_crash_before_the_folder_has_its_name(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[Task]
) -> None:
    convert(source.folder, tmp_path / "expected/out")
    with monkeypatch.context() as patch:
        crash_in(patch, PartialFolder, "publish")
        with pytest.raises(Crash):
            convert(source.folder, tmp_path / "out")
    tasks.clear()
    convert(source.folder, tmp_path / "out", resume=True)
    assert not tasks
    assert_same(tmp_path / "out", tmp_path / "expected/out")


def test_a_partial_folder_that_is_a_link(source: Source, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="a link"):
        convert(source.folder, tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_source_where_the_partial_folder_would_be(tmp_path: Path) -> None:
    source = make_source(tmp_path / "out.partial", "bf16").write()
    before = sorted(source.folder.iterdir())
    with pytest.raises(OutputError, match="where the source is"):
        convert(source.folder, tmp_path / "out")
    assert sorted(source.folder.iterdir()) == before


def test_a_hub_id_is_not_downloaded_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_in(monkeypatch, conversion, "resolve_model")
    (tmp_path / "there").mkdir()
    for output in (tmp_path / "there", tmp_path / "no" / "parent"):
        with pytest.raises(OutputError):
            convert("Qwen/Qwen3-235B-A22B-FP8", output)


def test_paths_that_no_file_system_has(source: Source, tmp_path: Path) -> None:
    for output in (f"{tmp_path}/a\0b", ""):
        with pytest.raises(MlxqwenError, match="path"):
            convert(source.folder, output)


def test_discarding_moves_away_first(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins meanwhile finds no folder that is being emptied."""
    partial = PartialFolder(tmp_path / "out", {}, resume=False)
    found: list[bool] = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: found.append((tmp_path / "out.partial").exists()))
    partial.discard()
    partial.close()
    assert found == [False]


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 24, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_files_than_may_be_open(tmp_path: Path, few_descriptors: None) -> None:
    source = make_source(tmp_path / "in", "bf16", MOE).write(shards=40)
    assert convert(source.folder, tmp_path / "out").verified
