"""The folder that a conversion is written into until it is whole: lock, manifest and journal.

`OUTPUT.partial` lies beside `OUTPUT`. Its weight files bear the suffix `.part` and it has no `config.json`, so that
nothing takes it for a model. The manifest says what it was begun from; the journal has a line for every finished task
with the hash of what was written, which is checked again before the task is skipped, and its error.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxqwen.files.checkpoint.writing import sync, sync_descriptor
from mlxqwen.files.json_file import read_json_object
from mlxqwen.files.unfinished import MANIFEST, words_of_options
from mlxqwen_convert.errors import OutputError, ResumeError
from mlxqwen_convert.pipeline import PARTIAL_SUFFIX, Written, unwritable

__all__ = ["BOOKKEEPING", "PartialFolder", "found_beside", "partial_path", "tidy_output"]

_JOURNAL, _LOCK = "conversion.journal", "conversion.lock"
BOOKKEEPING = (_JOURNAL, MANIFEST, _LOCK)
# Of a file that is being written.
_NEW = ".new"


class PartialFolder:
    """A locked folder beside the output.

    Attributes:
        path: the folder.
        done: key → what is known of the tasks that an earlier run has finished.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder and lock it, or take up an earlier one.

        Raises:
            OutputError: another conversion is at it, it is there and `resume` is not set, or it cannot be made.
            ResumeError: it was begun from another source, with other options or by another version.
        """
        self.path = partial_path(output)
        self.done: dict[str, Written] = {}
        self._output = output
        _refuse_link(self.path)
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as cause:
            raise unwritable(self.path, cause) from None
        self._journal = -1
        try:
            self._take_lock()
            self._begin(fingerprint, resume=resume)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._journal = os.open(self.path / _JOURNAL, flags, 0o644)
        except OSError as cause:
            self.close()
            raise unwritable(self.path, cause) from None
        except BaseException:  # Ctrl-C included
            self.close()
            raise

    def note(self, key: str, written: Written) -> None:
        """Add a finished task to the journal."""
        try:
            os.write(self._journal, f"{key} {written.as_text()}\n".encode())
        except OSError as cause:
            raise unwritable(self.path, cause) from None

    def write_text(self, name: str, text: str) -> None:
        """Have a small file on the disk: under its name there is all of it or nothing."""
        path, new = self.path / name, self.path / f"{name}{_NEW}"
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                sync_descriptor(file.fileno())
            new.replace(path)
            sync(self.path)
        except OSError as cause:
            raise unwritable(path, cause) from None

    def publish(self) -> None:
        """Give the folder its final name: from here on there is a whole model, before it there was none."""
        try:
            sync(self.path)
            if self._output.exists():
                raise exists(self._output)
            self.path.rename(self._output)
            # After the name, since a crash between the two must not leave a folder that nothing can go on from.
            _tidy(self._output)
            sync(self._output.parent)
        except OSError as cause:
            raise unwritable(self._output, cause) from None

    def discard(self) -> None:
        """Remove the folder: what is in it is of no use to anyone."""
        away = self.path.with_name(f"{self.path.name}-{secrets.token_hex(4)}")
        with suppress(OSError):
            self.path.rename(away)  # whoever comes next finds nothing, rather than half of it
            shutil.rmtree(away, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock."""
        for descriptor in (self._journal, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._journal = self._lock = -1

    def _take_lock(self) -> None:
        busy = OutputError(
            f"{self.path}: another conversion is writing to it", hint="Wait for it to end, or choose another output."
        )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have published the folder, or thrown it away, since it was opened.
            if os.fstat(self._lock).st_ino != (self.path / _LOCK).stat().st_ino:
                raise busy
        except (BlockingIOError, FileNotFoundError):
            raise busy from None

    def _begin(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        if not _is_begun(self.path):
            self.write_text(MANIFEST, json.dumps(fingerprint, indent=2) + "\n")
            return
        if not resume:
            raise OutputError(
                f"{self.path}: an unfinished conversion is there",
                hint="Continue it with --resume, or remove the folder to start anew.",
            )
        _check_same(self.path, fingerprint)
        self._take_back_names()
        self.done = _read_journal(self.path / _JOURNAL)

    def _take_back_names(self) -> None:
        """Undo what an earlier run did last: weights that had their final names are those of tasks once more."""
        (self.path / "config.json").unlink(missing_ok=True)
        for path in self.path.glob("*.safetensors"):
            path.rename(path.with_name(path.name + PARTIAL_SUFFIX))


def found_beside(output: Path, fingerprint: Mapping[str, Any]) -> str | None:
    """What a conversion to `output` would find of an earlier one, in words; None if nothing. Changes nothing."""
    path = partial_path(output)
    try:
        _refuse_link(path)
        if not path.is_dir() or not _is_begun(path):
            return None
        _check_same(path, fingerprint)
    except (OutputError, ResumeError) as error:
        return f"{error.problem}. {error.hint}"
    except OSError as cause:
        raise unwritable(path, cause) from None
    return f"{path}: an unfinished conversion is there; --resume goes on with it"


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise OutputError(f"{path}: is in the way: a link, expected nothing", hint="Move it away.")


def _is_begun(path: Path) -> bool:
    """Whether there is a manifest; without one there may be nothing but what comes before it."""
    if (path / MANIFEST).exists():
        return True
    if any(found.name not in (_LOCK, MANIFEST + _NEW) for found in path.iterdir()):
        raise OutputError(f"{path}: is in the way and was not made by a conversion", hint="Move it away, or remove it.")
    return False


def _check_same(path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raise `ResumeError` if the conversion at `path` was begun from or with something else."""
    try:
        begun = read_json_object(path / MANIFEST, error=ResumeError)
    except ResumeError as error:
        raise ResumeError(error.problem, hint=f"Remove {path} to start anew.") from None
    difference = _difference(begun, json.loads(json.dumps(fingerprint)))
    if difference is not None:
        raise ResumeError(
            f"{path}: the conversion there was begun {difference}",
            hint="Use what it was begun with, or remove the folder to start anew.",
        )


def _difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What tells the manifest of an earlier run from today's, in words; None if nothing does."""
    if begun.get("versions") != now["versions"]:
        return f"by {_words_of_versions(begun.get('versions'))}, found {_words_of_versions(now['versions'])}"
    if begun.get("source") != now["source"]:
        source = begun.get("source")
        return f"from {source if isinstance(source, str) else 'another source'}, found {now['source']}"
    if begun.get("files") != now["files"]:
        return "from files that have changed since"
    if begun.get("options") != now["options"]:
        words, found = words_of_options(begun.get("options")), words_of_options(now["options"])
        return f"with {'other options' if words is None else words or 'no options'}, found {found or 'none'}"
    if begun.get("plan") != now["plan"]:
        return "from files that have changed since"
    return None


def _words_of_versions(versions: object) -> str:
    if not isinstance(versions, dict) or not versions:
        return "other versions"
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def partial_path(output: Path) -> Path:
    """The folder that a conversion to `output` is written into.

    Raises:
        OutputError: `output` is "." or "/", which no folder beside it can be named after.
    """
    if not output.name:
        raise exists(output)
    return output.with_name(f"{output.name}.partial")


def tidy_output(output: Path) -> None:
    """Remove what a crash, right after a finished model got its name, left beside it."""
    if not all((output / name).is_file() for name in (MANIFEST, _LOCK, "config.json")):
        return
    with suppress(OSError):
        lock = os.open(output / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _tidy(output)
        finally:
            os.close(lock)


def _tidy(output: Path) -> None:
    # The lock last: it tells who may remove the others.
    for name in BOOKKEEPING:
        (output / name).unlink(missing_ok=True)
    sync(output)


def exists(output: Path) -> OutputError:
    """The output is already there."""
    return OutputError(f"{output}: already exists", hint="Choose another output, or remove it first.")


def _read_journal(path: Path) -> dict[str, Written]:
    """What is known of each finished task; a line that a crash cut short counts for nothing."""
    if not path.exists():
        return {}
    done = {}
    for line in path.read_text(encoding="ascii", errors="replace").split("\n")[:-1]:
        key, _, text = line.partition(" ")
        written = Written.from_text(text)
        if written is not None:
            done[key] = written
    return done
