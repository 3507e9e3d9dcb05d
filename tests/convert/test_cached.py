"""Checkpoints that are converted when they are first loaded, and the cache that they are kept in."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxqwen
from mlxqwen.device import Device
from mlxqwen.errors import InsufficientMemoryError, MlxqwenError, TokenizerError
from mlxqwen.files import locks
from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen.model.reading import WeightReader
from mlxqwen_convert import convert
from mlxqwen_convert.cache_list import CachedModel, Removal, cache_folder, cached_models, prune
from mlxqwen_convert.cached import converted, planned
from mlxqwen_convert.errors import DiskFullError, OutputError, SourceChangedError
from tests.convert.checkpoints import make_demo, make_source
from tests.convert.test_cli_convert import ENVIRONMENT
from tests.convert.test_crash import assert_same
from tests.loopback_hub import COMMIT, HubModel, running_hub

PROMPT = [[742, 10, 20, 30]]
DAY = 86_400 * 10**9

# The command, slow enough to be caught at its work: small tasks, and a rest after each.
SLOW = """
import sys, time
from mlxqwen_convert import tasks
tasks.WEIGHTS_PER_TASK = 4096
from mlxqwen.cli import main
from mlxqwen.cli.terminal import ConversionProgress
ConversionProgress.__call__ = lambda *_: time.sleep(0.002)
main()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mlxqwen_convert.tasks.WEIGHTS_PER_TASK", 4096)
    return tmp_path / "cache"


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return make_source(tmp_path / "in", "fp8").write().folder


def generate(
    source: Path | str, *, slow: bool = True, bytes_limit: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    def limit() -> None:
        if bytes_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_limit, bytes_limit))

    start = ["-c", SLOW] if slow else ["-m", "mlxqwen"]
    options = ["--temperature", "0", "--max-tokens", "8", "--no-thinking"]
    return subprocess.Popen(
        [sys.executable, *start, "generate", "Hello", "--model", str(source), *options],
        env={**ENVIRONMENT, "MLXQWEN_CACHE": os.environ["MLXQWEN_CACHE"], **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def wait_for_tasks(process: subprocess.Popen[str], count: int) -> None:
    """Until some tasks of a conversion are in its journal."""
    while process.poll() is None:
        journals = [*cache_folder().glob("converted/*/*.partial/conversion.journal")]
        if journals and journals[0].read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate()[1])


def only() -> CachedModel:
    (model,) = cached_models()
    return model


def states() -> list[str]:
    return [model.state for model in cached_models()]


# Once


@pytest.mark.parametrize("form", ["fp8", "awq", "gptq", "int4"])
def test_load_converts_once(tmp_path: Path, form: str) -> None:
    source = make_demo(tmp_path / "in", form).folder
    seen: list[tuple[str, int, int]] = []
    model, _ = mlxqwen.load(source, on_convert=lambda *args: seen.append(args))
    assert {stage for stage, _, _ in seen} == {"converting", "verifying"}
    assert seen[-1][1] == seen[-1][2]
    convert(source, tmp_path / "in-mlx")
    other, _ = mlxqwen.load(tmp_path / "in-mlx")
    assert mx.array_equal(model(mx.array(PROMPT)), other(mx.array(PROMPT)))
    entry = only()
    assert (entry.source, entry.source_folder, entry.state) == (str(source), str(source), "ready")
    assert_same(entry.model, tmp_path / "in-mlx")
    before = {path: path.stat().st_mtime_ns for path in entry.model.iterdir()}
    seen.clear()
    mlxqwen.load(source, on_convert=lambda *args: seen.append(args))
    assert seen == []
    assert {path: path.stat().st_mtime_ns for path in entry.model.iterdir()} == before


def test_parts_are_converted_in_turns_with_the_replies_of_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs may be computed on another device; nobody else, and nobody has to wait."""
    turns: list[bool] = []

    def recorded(*arguments: Any, turn: Any, **options: Any) -> Any:
        turns.append(turn is not None)
        return convert(*arguments, turn=turn, **options)

    monkeypatch.setattr("mlxqwen_convert.cached.convert", recorded)
    mlxqwen.load(make_demo(tmp_path / "one", "fp8").folder)
    with mlxqwen.Engine.load() as engine:
        assert engine.chat([{"role": "user", "content": "hello"}], max_tokens=1)
        mlxqwen.load(make_demo(tmp_path / "other", "fp8").folder)
    assert turns == [False, True]


def test_one_line_of_notice(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    out, err = generate(source, slow=False).communicate()
    assert err.count("\n") == 2  # the other: that the answer was cut off
    first = err.splitlines()[0]
    assert first.startswith(f"note: {source} (FP8")
    assert "is converted once, to MLX 8-bit" in first
    assert str(only().folder) in first
    again = generate(source, slow=False)
    assert again.communicate()[0] == out
    assert again.returncode == 0


def test_the_size_is_foretold(fp8: Path) -> None:
    (dtype, packed, numbers), _ = planned(fp8)
    tensors = Checkpoint.open(converted(fp8)).tensors.values()
    assert packed == sum(info.nbytes for info in tensors if info.dtype == "U32")
    assert numbers * dtype.size == sum(info.nbytes for info in tensors if info.dtype != "U32")


def test_what_cannot_be_loaded_is_not_converted(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    tiny = Device("tiny", False, 1 << 20, 1 << 20)
    monkeypatch.setattr("mlxqwen.model.loading.current_device", lambda: tiny)
    with pytest.raises(InsufficientMemoryError, match="float32"):
        mlxqwen.load(source)
    with pytest.raises(MlxqwenError, match="dtype"):
        mlxqwen.load(source, dtype="int8", force=True)
    with pytest.raises(MlxqwenError, match="yarn"):
        mlxqwen.load(source, yarn_factor=-1, force=True)
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError):
        mlxqwen.load(source, force=True)
    assert not own_cache.exists()


def test_a_converter_of_one_s_own(tmp_path: Path, own_cache: Path) -> None:
    """It plans first; what it has planned is run when nothing else is wrong."""
    source = make_demo(tmp_path / "in", "fp8").folder
    convert(source, tmp_path / "mlx")
    calls: list[str] = []

    class Planned:
        size = (mx.bfloat16, 1 << 20, 1 << 10)

        def run(self, progress: object = None) -> Path:
            calls.append("run")
            return tmp_path / "mlx"

    def plan(folder: Path, held: ExitStack) -> Planned:
        calls.append(f"plan {folder.name}")
        return Planned()

    with pytest.raises(InsufficientMemoryError):
        mlxqwen.Engine.load(source, converter=plan, device=Device("tiny", False, 1 << 20, 1 << 20))
    tokenizer = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError):
        mlxqwen.Engine.load(source, converter=plan)
    (source / "tokenizer.json").write_bytes(tokenizer)
    assert calls == ["plan in", "plan in"]
    mlxqwen.Engine.load(source, converter=plan)
    assert calls[2:] == ["plan in", "run"]
    assert not own_cache.exists()


def test_force_loads_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    monkeypatch.setattr("mlxqwen.model.loading.current_device", lambda: Device("tiny", False, 1 << 20, 1 << 20))
    mlxqwen.load(source, force=True)
    assert only().state == "ready"


def test_what_cannot_be_converted_leaves_nothing(fp8: Path, own_cache: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(MlxqwenError, match=r"bitsandbytes(.|\n)*Supported"):
        mlxqwen.load(fp8)
    assert not own_cache.exists()


def test_an_error_midway_leaves_no_entry(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8")
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, codes = source.stored[name]
    codes.flat[7] = 0x7F  # not a number
    source.stored[name] = dtype, codes
    source.write()
    with pytest.raises(MlxqwenError, match=r"layers\.1\.mlp\.up_proj"):
        converted(source.folder)
    assert cached_models() == []
    assert list((cache_folder() / "converted").iterdir()) == []


# The key


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_changed_source_is_converted_anew(fp8: Path, name: str) -> None:
    one = converted(fp8)
    os.utime(fp8 / name, ns=(1, 1))
    assert converted(fp8) != one
    assert sorted(states()) == ["ready", "source changed"]


def test_another_version_converts_anew(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = converted(fp8)
    monkeypatch.setattr("mlxqwen.__version__", "99.0.0")
    assert converted(fp8) != one
    assert sorted(states()) == ["other version", "ready"]


def test_links_to_a_folder_are_that_folder(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(fp8)
    assert converted(tmp_path / "link") == converted(fp8)


def test_a_source_that_changes_meanwhile(fp8: Path) -> None:
    def touch(stage: str, done: int, total: int) -> None:
        os.utime(fp8 / "generation_config.json", ns=(1, 1))

    with pytest.raises(SourceChangedError, match="changed"):
        converted(fp8, progress=touch)
    assert cached_models() == []


def in_hub_cache(folder: Path, home: Path) -> Path:
    """The same files as the hub's client would keep them: links to files that are named by their content."""
    repository = home / "models--Some--Model-FP8"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        blob = repository / "blobs" / f"{hash(path.read_bytes()):x}".lstrip("-")
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


def test_a_model_of_the_hub_is_known_by_its_commit(fp8: Path, tmp_path: Path) -> None:
    one = converted(in_hub_cache(fp8, tmp_path / "hub"))
    assert only().source == f"Some/Model-FP8@{COMMIT[:7]}"
    assert one.name == "Model-FP8-mlx"
    shutil.rmtree(tmp_path / "hub")
    assert states() == ["source gone"]
    assert converted(in_hub_cache(fp8, tmp_path / "other")) == one  # downloaded again, elsewhere
    assert states() == ["ready"]


@pytest.mark.slow
def test_a_hub_id_on_the_command_line(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "awq").folder
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with running_hub({"some/demo-awq": HubModel(files)}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
        process = generate("some/demo-awq", slow=False, env=environment)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert f"note: some/demo-awq@{COMMIT[:7]} (AWQ" in err
        again = generate("some/demo-awq", slow=False, env=environment)
        assert again.communicate()[0] == out
    assert only().source == f"some/demo-awq@{COMMIT[:7]}"


# Interrupted, crowded, damaged


@pytest.mark.slow
def test_killed_and_taken_up_again(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    convert(source, tmp_path / "in-mlx")
    process = generate(source)
    wait_for_tasks(process, 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert states() == ["unfinished"]
    journal = next(only().folder.glob("*.partial/conversion.journal"))
    finished = journal.read_bytes().count(b"\n")
    assert finished >= 20
    again = generate(source)
    _, err = again.communicate()
    assert again.returncode == 0, err
    assert "goes on where it was interrupted" in err
    assert states() == ["ready"]
    assert_same(only().model, tmp_path / "in-mlx")


def test_interrupted(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    process = generate(source)
    wait_for_tasks(process, 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[1:] == ["interrupted; the same command goes on from here"]
    assert states() == ["unfinished"]


@pytest.mark.slow
def test_two_at_once_convert_once(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    first = generate(source)
    wait_for_tasks(first, 5)
    first.send_signal(signal.SIGSTOP)
    second = generate(source)
    assert second.stderr is not None
    assert second.stderr.readline() == f"note: {source}: another process is converting it, waiting for that to end\n"
    assert states() == ["converting"]
    (removal,) = prune(everything=True)
    assert removal.in_use
    assert states() == ["converting"]
    first.send_signal(signal.SIGCONT)
    one, other = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert one[0] == other[0]
    assert "converted once" in one[1]
    assert "converted once" not in other[1]


def test_the_one_that_waits_takes_over(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    first = generate(source)
    wait_for_tasks(first, 5)
    first.send_signal(signal.SIGSTOP)
    second = generate(source)
    assert second.stderr is not None
    second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, err = second.communicate()
    assert second.returncode == 0
    assert "goes on where it was interrupted" in err
    assert states() == ["ready"]


def test_a_partial_that_cannot_be_continued_is_begun_anew(fp8: Path, tmp_path: Path) -> None:
    stop_midway(fp8)
    manifest = next(only().folder.glob("*.partial/conversion.json"))
    manifest.write_text(manifest.read_text().replace('"mlx":', '"mlx_of_old":'))
    convert(fp8, tmp_path / "in-mlx")
    assert_same(converted(fp8), tmp_path / "in-mlx")


def stop_midway(folder: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(folder, progress=stop)


def test_a_damaged_model_is_made_again(fp8: Path) -> None:
    model = converted(fp8)
    whole = {path.name: path.read_bytes() for path in model.iterdir()}
    for damage in (
        lambda: (model / "config.json").unlink(),
        lambda: os.truncate(model / "model.safetensors", 1000),
        lambda: shutil.rmtree(model),
        lambda: (model.parent / "entry.json").write_text("{"),
    ):
        damage()
        assert states() != ["ready"]
        assert converted(fp8) == model
        assert {path.name: path.read_bytes() for path in model.iterdir()} == whole
        assert states() == ["ready"]


def test_a_crash_before_the_record_is_finished(fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = converted(fp8)
    record = json.loads((model.parent / "entry.json").read_text())
    del record["files"]
    (model.parent / "entry.json").write_text(json.dumps(record))
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert converted(fp8) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    assert states() == ["ready"]


# Where it is, and where it cannot be


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLXQWEN_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MLXQWEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/mlxqwen"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache/mlxqwen"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library/Caches/mlxqwen"


def not_made(*_: Any, **__: Any) -> None:
    raise FileNotFoundError(2, "No such file or directory")  # as in /proc


def test_a_cache_that_cannot_be_written(tmp_path: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = r"cannot be written(.|\n)*MLXQWEN_CACHE"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", not_made)
        with pytest.raises(OutputError, match=refusal):
            converted(fp8)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=refusal):
        converted(fp8)


@pytest.mark.parametrize("look", [cached_models, prune])
@pytest.mark.parametrize("name", ["file", "x" * 300])
def test_a_cache_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, look: Callable[[], object]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / name))
    with pytest.raises(OutputError, match=r"cannot be read: (Not a dir|File name too)(.|\n)*set MLXQWEN_CACHE"):
        look()


def test_a_disk_too_small_from_the_beginning(fp8: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, so nothing is said to be kept."""
    usage = shutil.disk_usage(fp8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"MLXQWEN_CACHE to a folder on a larger disk\.$"):
        converted(fp8)
    assert list((own_cache / "converted").iterdir()) == []


def test_a_cache_inside_the_source(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQWEN_CACHE", str(fp8 / "cache"))
    with pytest.raises(OutputError, match=r"lies inside the source(.|\n)*MLXQWEN_CACHE"):
        converted(fp8)
    assert cached_models() == []


@pytest.fixture
def read_only(tmp_path: Path, own_cache: Path) -> Iterator[None]:
    own_cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(own_cache)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    converted(make_source(tmp_path / "known", "fp8").write().folder)
    subprocess.run(["mount", "-o", "remount,ro", str(own_cache)], check=True)
    yield
    subprocess.run(["umount", str(own_cache)], check=True)


@pytest.mark.usefixtures("read_only")
def test_a_read_only_cache(tmp_path: Path, fp8: Path) -> None:
    assert (converted(tmp_path / "known") / "config.json").is_file()
    with pytest.raises(OutputError, match=r"Read-only file system(.|\n)*MLXQWEN_CACHE"):
        converted(fp8)
    assert states() == ["ready"]
    with pytest.raises(OutputError, match="cannot be removed: Read-only file system"):
        prune(everything=True)


def test_a_full_disk(tmp_path: Path) -> None:
    source = make_demo(tmp_path / "in", "fp8").folder
    process = generate(source, bytes_limit=400_000)
    _, err = process.communicate()
    assert process.returncode == 1
    notice, problem, hint = err.splitlines()
    assert "is converted once" in notice
    assert "the disk is full" in problem
    assert "MLXQWEN_CACHE" in hint
    assert hint.endswith("What is written is kept: the next start goes on from it.")
    assert states() == ["unfinished"]
    again = generate(source)
    assert "goes on where it was interrupted" in again.communicate()[1]
    assert states() == ["ready"]


def test_a_disk_too_small_from_the_first(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"has 1\.00 kB free(.|\n)*prune"):
        converted(fp8)
    assert cached_models() == []


# Removing


def test_prune_removes_what_is_of_no_use(tmp_path: Path) -> None:
    sources = {name: make_source(tmp_path / name, "fp8").write().folder for name in ("kept", "gone", "new", "half")}
    kept, *_ = [converted(sources[name]) for name in ("kept", "gone", "new")]
    stop_midway(sources["half"])
    shutil.rmtree(sources["gone"])
    os.utime(sources["new"] / "model.safetensors", ns=(1, 1))
    expected = {"gone": "source gone", "new": "source changed", "half": "unfinished"}
    before = {model.folder: model.nbytes for model in cached_models()}
    told = prune(dry_run=True)
    assert {model.folder: model.nbytes for model in cached_models()} == before
    removed = prune()
    assert {Path(removal.model.source).name: removal.reason for removal in removed} == expected
    assert [removal.model.folder for removal in told] == [removal.model.folder for removal in removed]
    assert sum(removal.model.nbytes for removal in removed) == sum(before.values()) - before[kept.parent]
    assert list((cache_folder() / "converted").iterdir()) == [kept.parent]
    assert [removal.model.model for removal in prune(everything=True)] == [kept]
    assert list((cache_folder() / "converted").iterdir()) == []


def test_prune_leaves_what_is_being_loaded(fp8: Path) -> None:
    with ExitStack() as held:
        model = converted(fp8, held=held)
        assert converted(fp8, held=held) == model
        (removal,) = prune(everything=True)
        assert (removal.in_use, removal.model.state) == (True, "ready")
        (fp8 / "config.json").unlink()
        (removal,) = prune()
        assert (removal.in_use, removal.reason) == (True, "source gone")
        assert (model / "config.json").is_file()
    (removal,) = prune()
    assert not removal.in_use
    assert states() == []


def test_a_load_holds_its_models_until_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [make_demo(tmp_path / name, "fp8").folder for name in ("large", "small")]
    read = WeightReader.read
    in_use: list[list[bool]] = []

    def pruned_before(*args: Any) -> Any:
        in_use.append([removal.in_use for removal in prune(everything=True)])
        return read(*args)

    monkeypatch.setattr(WeightReader, "read", pruned_before)
    for _ in range(2):  # made, and found
        mlxqwen.Engine.load(sources[0], draft=sources[1])
        assert set(map(tuple, in_use)) == {(True, True)}
    assert [removal.in_use for removal in prune(everything=True)] == [False, False]


def test_what_is_removed_between_look_and_lock_is_made_anew(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, flock = converted(fp8), fcntl.flock
    removals: list[Removal] = []

    def removed_first(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not removals:
            removals.extend(prune(everything=True))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    assert converted(fp8) == model
    assert [removal.in_use for removal in removals] == [False]
    assert states() == ["ready"]


def test_prune_by_last_use(tmp_path: Path) -> None:
    old, new = (make_source(tmp_path / name, "fp8").write().folder for name in ("old", "new"))
    for source in (old, new):
        record = converted(source).parent / "entry.json"
        os.utime(record, ns=(time.time_ns() - 40 * DAY, time.time_ns() - 40 * DAY))
    converted(new)
    assert [model.source for model in cached_models()] == [str(new), str(old)]
    assert prune(unused_days=41) == []
    (removal,) = prune(unused_days=30)
    assert (removal.model.source, removal.reason) == (str(old), "unused for 40 days")


def test_prune_touches_nothing_else(tmp_path: Path, fp8: Path, own_cache: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    for path in (outside, outside / "inner"):
        (path / "config.json").write_text("mine")
    model = converted(fp8)
    root = own_cache / "converted"
    (root / "0123456789abcdef").symlink_to(outside)
    (root / "removed-0123456789abcdef-01234567").symlink_to(outside)
    (root / "notes").mkdir()
    (root / "notes/config.json").write_text("mine")
    (own_cache / "other").write_text("mine")
    (model.parent / "link").symlink_to(outside)
    (model / "link").symlink_to(outside / "inner")
    record = json.loads((model.parent / "entry.json").read_text())
    (model.parent / "entry.json").write_text(json.dumps({**record, "name": "../../../outside"}))
    assert len(prune(everything=True)) == 1
    assert not model.parent.exists()
    assert (outside / "config.json").read_text() == (outside / "inner/config.json").read_text() == "mine"
    assert {path.name for path in root.iterdir()} == {
        "0123456789abcdef",
        "removed-0123456789abcdef-01234567",
        "notes",
    }
    assert (root / "notes/config.json").exists()
    assert (own_cache / "other").exists()


def test_entries_behind_a_link_are_not_looked_at(tmp_path: Path, fp8: Path, own_cache: Path) -> None:
    converted(fp8)
    (own_cache / "converted").rename(tmp_path / "elsewhere")
    (own_cache / "converted").symlink_to(tmp_path / "elsewhere")
    for call in (cached_models, prune, lambda: converted(fp8)):
        with pytest.raises(OutputError, match="a link"):
            call()


@pytest.mark.parametrize("at", ["", "{model}", "{model}/model.safetensors", "entry.json"])
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_what_others_may_write_to_is_made_anew(fp8: Path, at: str, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    """Names and sizes are as they were; the bytes need not be."""
    model = converted(fp8)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(bytes(len(weights)))
    (model.parent / at.format(model=model.name)).chmod(mode)
    assert states() != ["ready"]
    assert converted(fp8) == model
    assert (model / "model.safetensors").read_bytes() == weights
    assert states() == ["ready"]
    assert ("made anew" in caplog.text) == (at != "entry.json")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("at", ["", "{model}", "{model}/model.safetensors"])
def test_what_belongs_to_another_user_is_made_anew(fp8: Path, at: str) -> None:
    model = converted(fp8)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(bytes(len(weights)))
    os.chown(model.parent / at.format(model=model.name), 12345, 12345)
    assert converted(fp8) == model
    assert (model / "model.safetensors").read_bytes() == weights


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_cache_of_another_user_is_refused(fp8: Path, own_cache: Path) -> None:
    (own_cache / "converted").mkdir(parents=True)
    os.chown(own_cache / "converted", 12345, 12345)
    with pytest.raises(OutputError, match=r"belongs to another user(.|\n)*MLXQWEN_CACHE"):
        converted(fp8)


def test_what_is_made_is_its_owner_s_alone_whatever_the_umask(fp8: Path, own_cache: Path) -> None:
    before = os.umask(0)
    try:
        model = converted(fp8)
    finally:
        os.umask(before)
    for path in (own_cache, *own_cache.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert states() == ["ready"]
    (own_cache / "converted").chmod(0o777)
    (fp8 / "NOTICE").write_text("another state of the source")
    assert converted(fp8) != model
    assert stat.S_IMODE((own_cache / "converted").stat().st_mode) == 0o700


@pytest.mark.parametrize("moment", ["rename", "rmtree"])
def test_two_prunes_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The other one removes the same entry at the worst moment; both end well, and each is told of once."""
    converted(make_source(tmp_path / "in", "fp8").write().folder)
    owner, name = (Path, "rename") if moment == "rename" else (shutil, "rmtree")
    step = getattr(owner, name)

    def other_first(path: Path, *rest: Any) -> Any:
        for found in (cache_folder() / "converted").iterdir():
            subprocess.run(["rm", "-r", str(found)], check=True)
        return step(path, *rest)

    monkeypatch.setattr(owner, name, other_first)
    assert len(prune(everything=True)) == (moment == "rmtree")
    assert cached_models() == []


def test_half_removed_is_no_model(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(fp8)

    def fail(path: Path) -> None:
        (path / model.name / "tokenizer_config.json").unlink()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("mlxqwen.files.store.shutil.rmtree", fail)
        with pytest.raises(OutputError, match="cannot be removed: Input/output error"):
            prune(everything=True)
    assert list(cache_folder().rglob("config.json")) == []
    assert states() == ["half removed"]
    assert converted(fp8) == model
    assert sorted(states()) == ["half removed", "ready"]
    (removal,) = prune()
    assert removal.reason == "half removed"
    assert states() == ["ready"]


def test_damaged_records_are_told_of_and_pruned(fp8: Path) -> None:
    record = converted(fp8).parent / "entry.json"
    contents: list[Any] = [[], {"folder": 3, "name": ["x"]}, {"folder": "\x1b[2J/nowhere", "files": []}]
    for content in contents:
        record.write_text(json.dumps(content))
        assert only().state in ("damaged", "source gone")
    assert len(prune()) == 1
    assert cached_models() == []


def test_who_waits_for_a_removal_starts_anew(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock that was waited for is that of a folder that is gone."""
    take, calls = locks.try_lock, 0

    def removed_first(descriptor: int, *, shared: bool = False) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            prune(everything=True)
        return take(descriptor, shared=shared)

    monkeypatch.setattr("mlxqwen.files.store.try_lock", removed_first)
    assert (converted(fp8) / "config.json").is_file()
    assert calls == 3  # the second is that of `prune`


def test_the_log_is_one_line(fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mlxqwen"):
        converted(fp8)
        converted(fp8)
    assert len(caplog.records) == 1
