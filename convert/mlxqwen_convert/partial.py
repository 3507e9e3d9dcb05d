"""The folder that a conversion is written into until it is whole: lock, manifest and journal.

`OUTPUT.partial` lies beside `OUTPUT`. Its weight files bear the suffix `.part` and it has no `config.json`, so that
nothing takes it for a model. The manifest says what it was begun from; the journal has a line for every finished task
with the hash of what was written, which is checked again before the task is skipped, and its error. What else lies in
the folder is not published, but moved away.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxqwen.files.atomic import STAGED_PREFIX, sync, write_file
from mlxqwen.files.json_file import read_json_object
from mlxqwen.files.locks import is_at, open_lock, try_lock
from mlxqwen.files.unfinished import MANIFEST, words_of_options
from mlxqwen_convert.errors import OutputError, ResumeError
from mlxqwen_convert.pipeline import Written
from mlxqwen_convert.target_files import PARTIAL_SUFFIX, unwritable

__all__ = ["BOOKKEEPING", "PartialFolder", "found_beside", "partial_path", "tidy_output"]

_JOURNAL, _LOCK = "conversion.journal", "conversion.lock"
BOOKKEEPING = (_JOURNAL, MANIFEST, _LOCK)

logger = logging.getLogger("mlxqwen")


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
            self._lock = open_lock(self.path / _LOCK)
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
            os.write(self._journal, json.dumps([key, *written.as_list()]).encode() + b"\n")
        except OSError as cause:
            raise unwritable(self.path, cause) from None

    def write_text(self, name: str, text: str) -> None:
        """Have a small file on the disk: under its name there is all of it or nothing."""
        try:
            write_file(self.path / name, text.encode())
        except OSError as cause:
            raise unwritable(self.path / name, cause) from None

    def keep_only(self, names: Collection[str]) -> None:
        """Move whatever no conversion has written, links among it, into a folder beside the output's.

        Args:
            names: of the files that the conversion writes, relative to the folder.
        """
        strays = list(_strays(self.path, "", {*names, *BOOKKEEPING}))
        others = [path for path in strays if not path.name.startswith(STAGED_PREFIX)]
        try:
            for path in strays:
                if path not in others:  # of this program, killed while it wrote
                    path.unlink(missing_ok=True)
            if not others:
                return
            aside = Path(tempfile.mkdtemp(prefix=f"{self._output.name}.strays-", dir=self.path.parent))
            for path in others:
                place = aside / path.relative_to(self.path)
                place.parent.mkdir(exist_ok=True)
                path.rename(place)
        except OSError as cause:
            raise unwritable(self.path, cause) from None
        logger.warning("%s: what this conversion has not written there is moved to %s", self.path, aside)

    def publish(self, names: Collection[str]) -> None:
        """Give the folder, with the files of these names and no others, its final name.

        From here on there is a whole model, before it there was none.
        """
        self.keep_only(names)
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
        # Whoever held the lock may have published the folder, or thrown it away, since it was opened.
        if not try_lock(self._lock) or not is_at(self._lock, self.path / _LOCK):
            raise busy

    def _begin(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        if not _is_begun(self.path):
            self.write_text(MANIFEST, json.dumps(fingerprint, indent=2) + "\n")
            return
        if not resume:
            raise unfinished(self.path)
        _check_same(self.path, fingerprint)
        self._take_back_names()
        self.done = _read_journal(self.path / _JOURNAL)

    def _take_back_names(self) -> None:
        """Undo what an earlier run did last: weights that had their final names are those of tasks once more."""
        (self.path / "config.json").unlink(missing_ok=True)
        for path in self.path.glob("*.safetensors"):
            path.rename(path.with_name(path.name + PARTIAL_SUFFIX))


def found_beside(output: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> str | None:
    """What a conversion to `output` would go on with, in words; None if nothing is there. Changes nothing.

    Raises:
        OutputError: what is there is in the way, or `resume` is not set.
        ResumeError: it was begun from another source, with other options or by another version.
    """
    path = partial_path(output)
    try:
        _refuse_link(path)
        if not path.is_dir() or not _is_begun(path):
            return None
        _check_same(path, fingerprint)
    except OSError as cause:
        raise unwritable(path, cause) from None
    if not resume:
        raise unfinished(path)
    return f"{path}: an unfinished conversion is there; --resume goes on with it"


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise OutputError(f"{path}: is in the way: a link, expected nothing", hint="Move it away.")


def _is_begun(path: Path) -> bool:
    """Whether there is a manifest; without one there may be nothing but what comes before it."""
    if (path / MANIFEST).exists():
        return True
    if any(found.name != _LOCK and not found.name.startswith(STAGED_PREFIX) for found in path.iterdir()):
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
    # The manifest may be gone already: the lock goes last.
    if not all((output / name).is_file() for name in (_LOCK, "config.json")) or (output / _LOCK).stat().st_size:
        return
    with suppress(OSError):
        lock = open_lock(output / _LOCK)
        try:
            if try_lock(lock):
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


def unfinished(partial: Path) -> OutputError:
    """An earlier conversion is there, and was not asked to be resumed."""
    return OutputError(
        f"{partial}: an unfinished conversion is there",
        hint="Continue it with --resume, or remove the folder to start anew.",
    )


def _strays(folder: Path, at: str, names: Collection[str]) -> Iterator[Path]:
    """What lies below a folder, known as `at`, that is neither a file of these names nor on the way to one."""
    for path in folder.iterdir():
        name, is_link = at + path.name, path.is_symlink()
        if path.is_dir() and not is_link and any(known.startswith(f"{name}/") for known in names):
            yield from _strays(path, f"{name}/", names)
        elif is_link or name not in names or not path.is_file():
            yield path


def _read_journal(path: Path) -> dict[str, Written]:
    """What is known of each finished task; a line that a crash cut short counts for nothing."""
    done = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError, TypeError, RecursionError):
            key, *known = json.loads(line)
            done[key] = Written.from_list(known)
    return done
