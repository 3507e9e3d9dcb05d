"""Waiting for a hub: what a terminal is shown meanwhile, silence that ends in an error, and Ctrl-C at once.

The hubs' clients wait in threads of theirs, which neither Ctrl-C nor a time limit reaches. So they work in a thread of
their own here, and the thread that waits for it can leave.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO, TypeVar

from mlxqwen.errors import one_line
from mlxqwen.files.hub_settings import TRUE
from mlxqwen.status_line import StatusLine, bar, time_left

__all__ = [
    "Download",
    "Given",
    "QuietLog",
    "SilenceError",
    "download_lines",
    "has_abandoned",
    "looking_up",
    "waited_for",
]

T = TypeVar("T")

logger = logging.getLogger("mlxqwen.download")

_LOG_SECONDS, _LOG_SHARE = 30.0, 10  # lines of the log are at least so far apart, and one part in so many of the bytes
_POLL = 0.1  # seconds
_RATE_OVER = 10.0  # seconds
_abandoned: list[threading.Thread] = []


class SilenceError(TimeoutError):
    """Nothing has come from a hub for longer than is waited."""


class Given(threading.Event):
    """Set once nobody waits any more: work that goes on asks `check` whether it should."""

    def check(self) -> None:
        """Raise `SilenceError` if nobody waits any more."""
        if self.is_set():
            raise SilenceError("nobody waits for it any more")


class QuietLog:
    """A client's log, below a level kept off the terminal while any thread is within `quiet`.

    Args:
        name: the logger's.
        level: what is told still.
    """

    def __init__(self, name: str, level: int) -> None:
        self._logger = logging.getLogger(name)
        self._level = level
        self._lock = threading.Lock()
        self._within = self._before = 0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing below the level; where the user has asked for all there is, it is told."""
        with self._lock:
            if not self._within:
                self._before = self._logger.level
                if self._before in (logging.NOTSET, logging.INFO, logging.WARNING):
                    self._logger.setLevel(self._level)
            self._within += 1
        try:
            yield
        finally:
            with self._lock:
                self._within -= 1
                if not self._within:
                    self._logger.setLevel(self._before)


@dataclass(frozen=True, slots=True)
class Download:
    """What is on its way.

    Attributes:
        name: the model's, for the terminal.
        total: bytes that have to come.
        arrived: tells how many of them have.
        patience: seconds without a byte that are waited.
        setting: the variable that is half of them.
        is_shown: whether a terminal is shown how far it is, or the log where there is none; that of a look-up, which
            has a line of its own, is not.
    """

    name: str
    total: int
    arrived: Callable[[], int]
    patience: float
    setting: str
    is_shown: bool


def has_abandoned() -> bool:
    """Whether a download was left that may still hold up the end of the process."""
    return any(thread.is_alive() for thread in _abandoned)


@contextmanager
def looking_up(name: str) -> Iterator[None]:
    """A line on a terminal while a hub is asked about a model, from the beginning on; wiped in the end."""
    line = _status_line()
    line.draw(f"Looking up {one_line(name)}", "Looking up the model")
    try:
        yield
    finally:
        line.wipe()


def waited_for(
    work: Callable[[Given], T],
    download: Download | None = None,
    *,
    terminal: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """What `work` returns, which a thread of its own does; Ctrl-C leaves it, as does a download that has stopped.

    Args:
        work: takes what tells it that nobody waits any more.
        download: what is shown and watched meanwhile; nothing without it.
        terminal: where it is shown; standard error by default.
        clock: seconds.

    Raises:
        SilenceError: no byte of the download has come for as long as it is waited.
    """
    given, ended = Given(), threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(given))
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="mlxqwen download", daemon=True)
    watch = None if download is None else _Watch(download, terminal, clock)
    thread.start()
    try:
        is_over = False
        while not is_over:
            if watch is not None:
                watch.look()
            is_over = ended.wait(_POLL)
    except BaseException:
        given.set()
        _abandoned.append(thread)
        raise
    finally:
        if watch is not None:
            watch.line.wipe()
    if errors:
        raise errors[0]
    return results[0]


class _Watch:
    """Draws or logs how far a download is, and raises `SilenceError` where nothing comes any more."""

    def __init__(self, download: Download, terminal: TextIO | None, clock: Callable[[], float]) -> None:
        self.line = _status_line(terminal)
        self._download = download
        self._clock = clock
        self._heard = clock()
        self._arrived = download.arrived()
        self._seen: deque[tuple[float, int]] = deque([(self._heard, self._arrived)])
        self._logged = self._heard, self._arrived
        if download.is_shown:
            self._log(download_lines(download.name, self._arrived, download.total, 0, 0.0, 0.0))

    def look(self) -> None:
        now, arrived, download = self._clock(), self._download.arrived(), self._download
        if arrived != self._arrived:
            self._heard, self._arrived = now, arrived
        silent = now - self._heard
        if silent >= download.patience:
            raise SilenceError(f"nothing came for {download.patience:g} seconds ({download.setting} sets half of them)")
        if not download.is_shown:
            return
        self._seen.append((now, arrived))
        while now - self._seen[0][0] > _RATE_OVER:
            self._seen.popleft()
        began, first = self._seen[0]
        lines = download_lines(download.name, arrived, download.total, arrived - first, now - began, silent)
        self.line.draw(*lines)
        logged, told = self._logged
        if now - logged >= _LOG_SECONDS and arrived - told >= download.total / _LOG_SHARE:
            self._logged = now, arrived
            self._log(lines)

    def _log(self, lines: list[str]) -> None:
        """Log the line without a bar, where no terminal is shown one."""
        if not self.line.shows:
            logger.info("%s", lines[2])


def download_lines(name: str, done: int, total: int, recent: int, seconds: float, silent: float) -> list[str]:
    """For example `Downloading Qwen/Qwen3-4B  42 %  |####      |  3.4 of 8.0 GB  31 MB/s  2:28 left`, and shorter ones.

    Args:
        name: the model's.
        done, total: bytes.
        recent: bytes that came in the last `seconds`.
        silent: seconds since the last byte.
    """
    done = min(done, total)
    percent = f"{100 * done // max(total, 1):3d} %"
    unit, size = next((one for one in (("GB", 1e9), ("MB", 1e6)) if total >= one[1]), ("kB", 1e3))
    sizes = f"  {done / size:.1f} of {total / size:.1f} {unit}"
    rate = left = ""
    if silent >= 3:
        rate = f"  nothing for {silent:.0f} s"
    elif recent > 0 and seconds >= 0.2:
        rate = f"  {recent / seconds / 1e6:.1f} MB/s"
        left = f"  {time_left(round((total - done) * seconds / recent))}"
    head = f"Downloading {one_line(name)} {percent}"
    drawn = [bar(width, done, max(total, 1)) for width in (20, 10)]
    tails = [drawn[0] + sizes + rate + left, drawn[1] + sizes + rate + left, sizes + rate + left, rate + left, left]
    return [*(head + tail for tail in tails), head, f"Downloading {percent}"]


def _status_line(terminal: TextIO | None = None) -> StatusLine:
    line = StatusLine(terminal or sys.stderr)
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").strip().lower() in TRUE:
        line.shows = False
    return line
