"""The disk tier: what another run finds, and what becomes of damage, kills, full disks and folders of others."""

from __future__ import annotations

import logging
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from mlxqwen.cache import disk_tier, make_cache
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.cache.chain import TokenChain, seed
from mlxqwen.cache.disk_tier import DiskTier
from mlxqwen.cache.prefix_store import PrefixStore, namespace
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.files.checkpoint import save_safetensors
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.test_blocks import KINDS, OTHER, PROMPT, assert_same, continuation, read
from tests.test_prefix_store import LARGE, SIZE, SPACE, assert_right, holding, length, prompt, put


def store_on(folder: Path, capacity: int = LARGE, *, memory: int = LARGE, fingerprint: str = "weights") -> PrefixStore:
    """A store as another process would open it."""
    return PrefixStore(fingerprint, memory, DiskTier(folder, capacity))


def chain_of(*symbols: int) -> TokenChain:
    return TokenChain(seed("weights", SPACE), prompt(*symbols))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "prefixes"


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of at most two blocks."""
    monkeypatch.setattr(disk_tier, "_RUN_BYTES", 2 * SIZE + 2048)


@pytest.mark.parametrize("kind", KINDS)
def test_another_run_goes_on_as_if_it_had_read_the_tokens(tiny: Qwen3ForCausalLM, folder: Path, kind: str) -> None:
    cache = make_cache(tiny, **KINDS[kind])
    space, first = namespace(cache, mx.float32), store_on(folder)
    read(tiny, cache, PROMPT)
    first.put(space, PROMPT, cache, 0)
    first.flush()
    branch = [*PROMPT[:35], *OTHER[:6]]
    ring = None if cache.max_kv_size is None else (cache.max_kv_size, cache.keep)
    match = store_on(folder).match(space, branch, ring=ring)
    assert match.length == 32
    found, fresh = cache.like(1), cache.like(1)
    match.fill(found)
    read(tiny, fresh, branch[:32])
    assert_same(continuation(tiny, found, branch[32:]), continuation(tiny, fresh, branch[32:]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_numbers_come_back_to_the_bit(folder: Path, dtype: mx.Dtype) -> None:
    cache = holding(prompt(1, 2, tail=0))
    for layer in cache:
        layer.keys = (mx.random.normal(layer.keys[0].shape).astype(dtype),)
        layer.values = (mx.random.normal(layer.keys[0].shape).astype(dtype),)
    store = store_on(folder)
    store.put(SPACE, prompt(1, 2), cache, 0)
    store.flush()
    found = cache.like(1)
    store_on(folder).match(SPACE, prompt(1, 2)).fill(found)
    for one, other in zip(found.state, cache.state, strict=True):
        assert one.dtype == dtype
        assert mx.array_equal(one[..., :32, :], other[..., :32, :]).item()


def test_a_run_of_blocks_is_a_file_and_branches_share_its_front(folder: Path) -> None:
    store = store_on(folder)
    put(store, 1, 2, 3, 4)
    put(store, 1, 2, 5)
    store.flush()
    assert len(files(folder)) == 2
    again = store_on(folder, memory=0)
    assert [length(again, *symbols) for symbols in [(1, 2, 3, 4, 6), (1, 2, 5, 3), (1, 2, 6), (2,)]] == [4, 3, 2, 0]
    put(again, 1, 2, 3, 4)
    again.flush()
    assert len(files(folder)) == 2


@pytest.mark.usefixtures("small_files")
def test_memory_is_asked_before_the_disk_and_any_part_of_a_run_can_follow(folder: Path) -> None:
    store = store_on(folder)
    put(store, *range(1, 8))
    store.flush()
    assert len(files(folder)) == 4
    for known in range(8):
        other = store_on(folder)
        pin = other.put(SPACE, prompt(*range(1, 8)), holding(prompt(*range(1, 1 + known), tail=0)), 0)
        assert pin.length == known * BLOCK
        assert length(other, *range(1, 9)) == 7
    # where only the middle is there, what memory has before it is enough
    (folder / f"{chain_of(1).keys[0].hex()}.kv1").unlink()
    other = store_on(folder)
    assert length(other, *range(1, 8)) == 0
    put(other, 1, 2)
    assert length(other, *range(1, 8)) == 7


def test_all_is_the_owners_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        store = store_on(folder)
        put(store, 1)
        store.flush()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(folder)] == [0o600]


def test_opening_reads_no_file_and_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_on(folder)
    put(store, 1)
    store.flush()
    monkeypatch.setattr(disk_tier, "open_run", lambda path: pytest.fail("opened"))
    PrefixStore(lambda: pytest.fail("asked"), LARGE, DiskTier(folder, LARGE))


def test_other_models_and_versions_are_left_alone(folder: Path) -> None:
    store = store_on(folder)
    put(store, 1, 2)
    store.flush()
    own = files(folder)
    (folder / f"{'0' * 32}.kv9").write_bytes(b"of a later version")
    (folder / "notes.txt").write_text("of the user")
    other = store_on(folder, fingerprint="other weights")
    assert length(other, 1, 2) == 0
    put(other, 1, 2)
    other.flush()
    assert length(store_on(folder, fingerprint="other weights"), 1, 2) == 2
    assert length(store_on(folder), 1, 2) == 2
    assert len(files(folder)) == len(own) + 3


# --- the cap


@pytest.mark.usefixtures("small_files")
def test_the_least_recently_used_files_go_first_and_the_end_of_a_chain_before_its_front(folder: Path) -> None:
    file = 2 * SIZE + 1024  # and a header of less
    store = store_on(folder, 4 * file)
    for symbols in [(1, 2, 3, 4), (5, 6), (7, 8)]:
        put(store, *symbols)
        store.flush()
    assert length(store_on(folder, 4 * file, memory=0), 1, 2, 3, 4) == 4  # used once more
    put(store, 9, 10)
    store.flush()
    again = store_on(folder, 4 * file, memory=0)
    assert [length(again, *some) for some in [(5, 6), (1, 2, 3, 4), (7, 8), (9, 10)]] == [0, 4, 2, 2]
    again = store_on(folder, 3 * file, memory=0)  # what is too much goes when it is opened
    assert [length(again, *some) for some in [(7, 8), (9, 10), (1, 2, 3, 4)]] == [2, 2, 2]


@pytest.mark.usefixtures("small_files")
def test_files_never_take_more_than_the_capacity(folder: Path) -> None:
    capacity = 5 * SIZE
    store = store_on(folder, capacity, memory=0)
    chooser = random.Random(0)
    for _ in range(40):
        symbols = [chooser.randint(1, 3) for _ in range(chooser.randint(1, 4))]
        put(store, *symbols, pin=False)
        store.flush()
        assert nbytes(folder) <= capacity
        assert length(store, *symbols) >= min(len(symbols), 3)
    assert nbytes(folder) > 3 * SIZE


def test_a_capacity_below_a_block_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_on(folder, SIZE, memory=0)
    for _ in range(3):
        put(store, 1, 2)
        store.flush()
    assert files(folder) == []
    (record,) = caplog.records
    assert f"{folder}: its capacity of {SIZE:,} bytes holds no block, which takes 16," in record.message


@pytest.mark.parametrize("capacity", [0, -1, 1.5, True, "2GB"])
def test_a_capacity_that_is_no_number_of_bytes_is_refused(folder: Path, capacity: Any) -> None:
    with pytest.raises(OptionError, match="expected a number of bytes above 0"):
        DiskTier(folder, capacity)
    assert not folder.exists()


# --- damage


def damaged(folder: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A run finds the file so, uses nothing of it that is not right, and writes it anew."""
    (path,) = files(folder)
    path.write_bytes(content)
    caplog.clear()
    store = store_on(folder)
    match = store.match(SPACE, prompt(1, 2))
    assert match.length < 32
    assert_right(match, prompt(1, 2))
    assert files(folder) == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "is damaged" in caplog.text
    put(store, 1, 2)
    store.flush()
    assert length(store_on(folder), 1, 2) == 2


def test_a_file_with_any_byte_flipped_is_dropped_and_read_anew(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_on(folder)
    put(store, 1, 2)
    store.flush()
    (path,) = files(folder)
    whole = path.read_bytes()
    header = len(whole) - 2 * SIZE
    places = [*range(header), *range(header, len(whole), 997), len(whole) - 1]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        damaged(folder, bytes(flipped), caplog)
    assert path.read_bytes() == whole


def test_a_file_cut_short_or_longer_is_dropped_and_read_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_on(folder)
    put(store, 1, 2)
    store.flush()
    whole = files(folder)[0].read_bytes()
    for size in [0, 1, 35, 36, 37, 500, len(whole) - SIZE, len(whole) - 1]:
        damaged(folder, whole[:size], caplog)
    damaged(folder, whole + b"\0", caplog)


def test_a_file_under_another_name_is_dropped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_on(folder)
    put(store, 1, 2)
    store.flush()
    (path,) = files(folder)
    path.rename(folder / f"{chain_of(3, 4).keys[0].hex()}.kv1")
    assert length(store_on(folder), 3, 4) == 0
    assert "it holds other blocks than its name says" in caplog.text
    assert files(folder) == []


@pytest.mark.usefixtures("small_files")
def test_the_same_tokens_behind_others_are_other_blocks(folder: Path) -> None:
    store = store_on(folder)
    put(store, 1, 2, 7, 8)
    put(store, 3, 4)
    store.flush()
    last = folder / f"{chain_of(1, 2, 7, 8).keys[2].hex()}.kv1"
    last.rename(folder / f"{chain_of(3, 4, 7, 8).keys[2].hex()}.kv1")
    assert length(store_on(folder), 3, 4, 7, 8) == 2


def test_what_is_no_file_of_this_user_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_on(folder)
    put(store, 1, 2)
    store.flush()
    (path,) = files(folder)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert length(store_on(folder), 1, 2) == 0
    path.unlink()
    os.mkfifo(path)
    assert length(store_on(folder), 1, 2) == 0
    path.unlink()
    path.mkdir()
    assert length(store_on(folder), 1, 2) == 0
    path.rmdir()
    elsewhere.rename(path)
    tier = DiskTier(folder, LARGE)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert length(PrefixStore("weights", LARGE, tier), 1, 2) == 0


# --- failures


def test_a_disk_that_is_full_is_told_once_and_nothing_else_happens(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_on(folder)

    def full(file: object, view: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_tier, "_write_all", full)
    for symbols in [(1, 2), (3, 4)]:
        put(store, *symbols)
        store.flush()
        assert length(store, *symbols) == 2
    assert files(folder) == []
    assert [record.message for record in caplog.records] == [
        f"prompt cache {folder}: a file cannot be written: No space left on device; going on without it"
    ]


def test_a_folder_that_goes_away_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_on(folder)
    put(store, 1, 2)
    folder.rmdir()
    store.flush()
    put(store, 3)
    store.flush()
    assert length(store, 1, 2) == 2
    assert len(caplog.records) == 1


def test_files_that_go_away_are_no_failure(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_on(folder)
    put(store, 1, 2)
    store.flush()
    for path in files(folder):
        path.unlink()
    assert length(store_on(folder), 1, 2) == 0
    put(store, 1, 2)  # in memory, and written anew
    store.flush()
    assert length(store_on(folder), 1, 2) == 2
    assert caplog.records == []


@pytest.mark.parametrize("kind", ["file", "old", "link", "writable", "foreign", "no parent", "fifo", "empty", "null"])
def test_a_folder_that_cannot_be_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path: Path | str = tmp_path / "prefixes"
    assert isinstance(path, Path)
    hint = "Give the name of a folder of your own"
    if kind == "file":
        path.write_text("text")
        expected = "a file, expected a folder"
    elif kind == "old":
        save_safetensors(path, {"a": mx.zeros(1)}, {"user.prompt_cache": "mlxqwen-prompt-cache-2"})
        expected, hint = "a prompt cache of an earlier version, which was a file", "Remove the file, or give another"
    elif kind == "link":
        (tmp_path / "target").mkdir()
        path.symlink_to(tmp_path / "target")
        expected, hint = "a link, expected a folder", "that it leads to"
    elif kind == "writable":
        path.mkdir()
        path.chmod(0o777)
        expected, hint = "others may write to it", "chmod 700"
    elif kind == "foreign":
        path.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        expected = "belongs to another user"
    elif kind == "no parent":
        path = path / "below"
        expected, hint = "there is no folder", "Make it first"
    elif kind == "fifo":
        os.mkfifo(path)
        expected = "neither a folder nor a file"
    elif kind == "empty":
        path, expected = "", "an empty name"
    else:
        path, expected, hint = f"{path}\0", "cannot be written to", "give another name"
    with pytest.raises(CacheError, match=expected) as error:
        DiskTier(path, LARGE)
    assert hint in error.value.hint


def test_a_folder_that_cannot_be_written_to_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(CacheError, match="cannot be written to: Permission denied"):
        DiskTier(folder, LARGE)


# --- several processes

WRITER = """
import random, sys
from pathlib import Path
from mlxqwen.cache import disk_tier
from tests.test_disk_tier import put, store_on
from tests.test_prefix_store import SIZE
disk_tier._RUN_BYTES = 2 * SIZE + 2048
store, chooser = store_on(Path(sys.argv[1]), int(sys.argv[3]), memory=0), random.Random(int(sys.argv[2]))
print("ready", flush=True)
for _ in range(int(sys.argv[4])):
    put(store, *(chooser.randint(1, 3) for _ in range(chooser.randint(1, 6))), pin=False)
    store.flush()
    print("written", flush=True)
"""
CAPACITY = 40 * SIZE


def writer(folder: Path, seed: int, count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seed), str(CAPACITY), str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def found(store: PrefixStore, prompts: Sequence[Sequence[int]]) -> int:
    """Blocks that are found, all of them right."""
    return sum(length(store, *symbols) for symbols in prompts)


SOME = [(a, b, c) for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2, 3)]


@pytest.mark.slow
def test_writers_that_are_killed_leave_a_folder_that_opens_and_is_right(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chooser, blocks = random.Random(1), 0
    for number in range(8):
        process = writer(folder, number, 1_000_000)
        assert process.stdout is not None
        for _ in range(chooser.randint(1, 30)):
            assert process.stdout.readline() == "written\n"
        time.sleep(chooser.random() * 0.01)  # anywhere in one of the next
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert nbytes(folder) <= CAPACITY
        blocks += found(store_on(folder, CAPACITY), SOME)
    assert blocks > 50
    assert caplog.records == []  # nothing was damaged


@pytest.mark.slow
def test_two_processes_share_a_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    processes = [writer(folder, number, 60) for number in (1, 2)]
    store = store_on(folder, CAPACITY, memory=0)
    while any(process.poll() is None for process in processes):
        found(store, SOME[:6])
        assert nbytes_now(folder) <= CAPACITY + 2 * (2 * SIZE + 2048)
    assert [process.returncode for process in processes] == [0, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    assert found(store_on(folder, CAPACITY), SOME) > 20
    assert caplog.records == []


def nbytes_now(folder: Path) -> int:
    """The same while files come and go."""
    total = 0
    for path in files(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_what_killed_writers_left_goes_after_a_while(folder: Path) -> None:
    DiskTier(folder, LARGE)
    old, new = folder / ".partial-old", folder / ".partial-new"
    old.write_bytes(b"x" * 100)
    new.write_bytes(b"x" * 100)
    os.utime(old, (time.time() - 3600,) * 2)
    DiskTier(folder, LARGE)
    assert files(folder) == [new]


class StoreOnDisk(RuleBasedStateMachine):
    """Runs one after the other on a folder whose files are damaged and lost now and then."""

    symbols = st.lists(st.integers(1, 2), max_size=5).map(tuple)

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name) / "prefixes"
        self.written: set[tuple[int, ...]] = set()
        self.unwritten: set[tuple[int, ...]] = set()
        self.lost: set[tuple[int, ...]] = set()  # or still in memory
        self.is_damaged = False
        self.small_files = mock.patch.object(disk_tier, "_RUN_BYTES", 2 * SIZE + 2048)
        self.small_files.start()

    @initialize(memory=st.sampled_from([0, 2 * SIZE, LARGE]))
    def begin(self, memory: int) -> None:
        self.memory = memory
        self.store = store_on(self.folder, memory=memory)

    @rule(prefix=symbols)
    def put(self, prefix: tuple[int, ...]) -> None:
        put(self.store, *prefix, pin=False)
        self.unwritten |= {prefix[: n + 1] for n in range(len(prefix))}

    @rule()
    def flush(self) -> None:
        self.store.flush()
        self.written |= self.unwritten
        self.unwritten = set()

    @rule()
    def reopen(self) -> None:
        """As after kill -9: what was not flushed is lost, if it was not written early."""
        self.lost |= self.unwritten
        self.unwritten = set()
        self.store = store_on(self.folder, memory=self.memory)

    @rule(prefix=symbols)
    def match(self, prefix: tuple[int, ...]) -> None:
        found = length(self.store, *prefix)
        if not self.is_damaged:
            assert found >= next((n for n in range(len(prefix)) if prefix[: n + 1] not in self.written), len(prefix))
        put_ever = self.written | self.unwritten | self.lost
        assert found <= next((n for n in range(len(prefix)) if prefix[: n + 1] not in put_ever), len(prefix))

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        paths = files(self.folder)
        if paths:
            path = data.draw(st.sampled_from(paths))
            content = bytearray(path.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            path.write_bytes(content)
            self.is_damaged = True  # what is written on top of it may be lost with it
            self.lose()

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        paths = files(self.folder)
        if paths:
            data.draw(st.sampled_from(paths)).unlink()
            self.lose()

    def lose(self) -> None:
        self.lost |= self.written
        self.written = set()

    def teardown(self) -> None:
        self.small_files.stop()
        self.temporary.cleanup()


TestStoreOnDisk = StoreOnDisk.TestCase
TestStoreOnDisk.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
