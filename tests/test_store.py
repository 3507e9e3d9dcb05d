"""A store in the user's cache: entries made once by whoever comes first, kept while they are read, and removed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlxqwen.errors import CacheError
from mlxqwen.files.store import Entry, Store

KEY = "0123456789abcdef"
# Makes the entry unless it is there, and tells whether it did.
MAKER = """
import sys, time
from mlxqwen.errors import CacheError
from mlxqwen.files.store import Store
entry = Store("things", error=CacheError).entry(sys.argv[1])
is_whole = lambda: entry.read_record() is not None
made = False
while not entry.hold(is_whole):
    with entry.locked(lambda: None):
        if not is_whole():
            made = True
            time.sleep(0.05)
            entry.write_record({"made": True})
print(made)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def store() -> Store:
    return Store("things", error=CacheError)


def made(key: str = KEY) -> Entry:
    entry = store().entry(key)
    with entry.locked(lambda: None):
        entry.write_record({"key": key})
    return entry


def test_whoever_comes_first_makes_it(cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", MAKER, KEY]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = [process.communicate(timeout=60)[0].strip() for process in started]
    assert sorted(told) == ["False", "False", "False", "True"]
    assert [process.returncode for process in started] == [0] * 4
    assert [entry.read_record() for entry in store().entries()] == [{"made": True}]


def test_nothing_is_made_by_looking(cache: Path) -> None:
    entry = store().entry(KEY)
    assert (store().entries(), entry.read_record(), entry.nbytes, entry.last_used) == ([], None, 0, 0.0)
    assert not entry.hold(lambda: entry.read_record() is not None)
    assert not entry.remove()
    assert not cache.exists()


def test_what_is_held_is_not_free(cache: Path) -> None:
    entry, told = made(), []
    with ExitStack() as held:
        assert entry.hold(lambda: True, held)
        with entry.tried() as is_free:
            assert not is_free
        with entry.tried(shared=True) as is_free:
            assert is_free
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mlxqwen.files.store.wait_for_lock", lambda descriptor: held.close())
            with entry.locked(lambda: told.append("waiting")):
                pass
    assert told == ["waiting"]
    with entry.tried() as is_free:
        assert is_free


def test_everything_is_the_owner_s_alone(cache: Path) -> None:
    before = os.umask(0)
    try:
        entry = made()
        (entry.folder / "data/inner").mkdir(parents=True)
        (entry.folder / "data/inner/file").touch()
        assert entry.files(entry.folder / "data") is None
        entry.make_own(entry.folder / "data")
    finally:
        os.umask(before)
    assert entry.files(entry.folder / "data") == {"inner/file": 0}
    for path in (cache, *cache.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", ["", "entry.json"])
def test_what_others_may_write_to_counts_for_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = made()
    (entry.folder / name).chmod(0o777)
    assert entry.read_record() is None
    with entry.locked(lambda: None):
        assert (entry.folder / "entry.json").exists() == bool(name)
        entry.write_record({"made": "anew"})
    assert entry.read_record() == {"made": "anew"}
    assert ("made anew" in caplog.text) == (not name)


def test_entries_of_a_folder_that_others_may_write_to_count_once_it_is_mended(caplog: pytest.LogCaptureFixture) -> None:
    entry = made()
    record = entry.read_record()
    entry.folder.parent.chmod(0o777)  # where others could give one entry the name of another
    assert entry.read_record() is None
    with entry.locked(lambda: None):
        assert entry.read_record() == record
    assert stat.S_IMODE(entry.folder.parent.stat().st_mode) == 0o700
    assert "others could write to it; it is yours alone now" in caplog.text


def test_removed_twice_and_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, other = made(), made("f" * 16)
    assert entry.remove()
    assert not entry.remove()
    remove = shutil.rmtree

    def remove_twice(path: Path) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", remove_twice)
    assert other.remove()
    assert store().entries() == []


def test_the_error_is_that_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/things").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="a link"):
        store()
    monkeypatch.setattr("mlxqwen.files.store.user_cache_folder", lambda: None)
    with pytest.raises(CacheError, match="no home"):
        store()
