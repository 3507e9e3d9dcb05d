"""The file of a batch's answers: one JSON line each, in the order in which they are finished.

Each line names its input line and the options that it was made with. So a run that ended in any way, even by a power
cut in the middle of a line, continues where it stopped, and lines of other runs are left alone.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mlxqwen.chat.request_files.batch import BatchRequest
from mlxqwen.errors import OptionError
from mlxqwen.files.atomic import sync_descriptor
from mlxqwen.files.json_file import parse_json
from mlxqwen.files.locks import try_lock

__all__ = ["AnswerFile"]

_HEAD = b'{"index": '
_ELSEWHERE = "Choose another --output, or move this file away."


class AnswerFile:
    """An output file, open and locked, with mode 0600 if it is made here; `with` closes it.

    Attributes:
        answered: indices of the requests that have a line.
        failed: how many of these lines have an "error".
    """

    def __init__(self, path: Path, requests: Sequence[BatchRequest], options_digest: str) -> None:
        """Make the file, or continue it: a last line that was cut off is removed.

        Args:
            path: the file; its folder must exist.
            requests: those that the file may hold answers to.
            options_digest: identifies the options that answers depend on.

        Raises:
            OptionError: it cannot be written, another run is writing it, or it holds anything else; then it stays as
                it is.
        """
        self.path = path
        self.answered: set[int] = set()
        self.failed = 0
        self._options_digest = options_digest
        self._end = 0
        with self._errors(hint="Choose an --output that can be written."):
            self._existed = path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            with self._errors():
                self._lock()
                self._take_up({request.index: request for request in requests})
        except BaseException:
            os.close(self._file)
            raise

    def append(self, request: BatchRequest, fields: Mapping[str, Any]) -> None:
        """Write the line of a request, whole or not at all. Raises `OptionError`."""
        known = {"index": request.index, "id": request.id}
        digests = {"request": f"{request.digest}-{self._options_digest}"}
        line = json.dumps({**known, **fields, **digests}, ensure_ascii=False).encode() + b"\n"
        try:
            with self._errors():
                self._write(line)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self._count(request.index, "error" in fields)

    def close(self) -> None:
        """Sync the file to disk; remove it if it is new and has no answers."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            if self._end:
                with self._errors():
                    sync_descriptor(file)
            elif not self._existed:
                with suppress(OSError):
                    self.path.unlink()
        finally:
            os.close(file)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise OptionError(f"{self.path}: not a regular file, expected one that can be read again", hint=_ELSEWHERE)
        if not try_lock(self._file):
            raise OptionError(f"{self.path}: another run is writing it", hint="Wait for its end.")

    def _take_up(self, requests: Mapping[int, BatchRequest]) -> None:
        with open(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, start=1):
                whole = line.endswith(b"\n")
                if not whole and self._is_cut_off(line):
                    os.ftruncate(self._file, self._end)
                    return
                self._read_line(line, f"{self.path}: line {number}", requests)
                if not whole:
                    self._write(b"\n")
                self._end += len(line) + (not whole)

    def _is_cut_off(self, line: bytes) -> bool:
        """Whether a line is the beginning of an answer, cut off."""
        if not line.startswith(_HEAD):
            return _HEAD.startswith(line)
        try:
            parse_json(line.decode())
        except ValueError:
            return True
        return False

    def _read_line(self, line: bytes, where: str, requests: Mapping[int, BatchRequest]) -> None:
        try:
            value = parse_json(line.decode())
            index, digests = value["index"], value["request"]
            line_digest, _, options_digest = digests.partition("-")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise OptionError(f"{where}: found something else than an answer to a batch", hint=_ELSEWHERE) from None
        request = requests.get(index) if isinstance(index, int) else None
        if request is None or request.digest != line_digest:
            raise OptionError(f"{where}: found the answer to another input than this batch", hint=_ELSEWHERE)
        if options_digest != self._options_digest:
            raise OptionError(
                f"{where}: found an answer that was made with other options, expected those of this run",
                hint=f"Repeat the options of the run before. {_ELSEWHERE}",
            )
        if index in self.answered:
            raise OptionError(f"{where}: found a second answer to line {index + 1} of the input", hint="Remove one.")
        self._count(index, "error" in value)

    def _count(self, index: int, failed: bool) -> None:
        self.answered.add(index)
        self.failed += failed

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    @contextmanager
    def _errors(
        self, hint: str = "The answers in it are kept, and the same command goes on from there."
    ) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror or error
            raise OptionError(f"{self.path}: cannot be written: {reason}", hint=hint) from None
