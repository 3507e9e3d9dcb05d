"""Whole processes: the packages of this checkout in a fresh interpreter, timed, with the most memory that they held."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from benchmarks.settings import Settings

__all__ = ["ROOT", "ProcessError", "Run", "environment", "output_of", "own_cache", "python", "timed"]

ROOT = Path(__file__).resolve().parents[2]


class ProcessError(Exception):
    """A command did not end well."""


@dataclass(frozen=True)
class Run:
    """One process: seconds by the wall clock and of computing, and the most memory it held, in bytes."""

    seconds: float
    processor_seconds: float
    peak_bytes: int

    def time(self, settings: Settings) -> float:
        """The seconds that count."""
        return self.processor_seconds if settings.processor_time else self.seconds


def environment() -> dict[str, str]:
    """The packages of this checkout come first, installed or not, and are compiled once, as installed ones are."""
    paths = [str(ROOT), str(ROOT / "convert"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """While this is open, nothing that is measured reads or writes the user's cache; it starts with an empty one."""
    with patch.dict(os.environ, MLXQWEN_CACHE=str(folder)):
        yield


def python(*arguments: str | Path) -> list[str]:
    """This interpreter's command line."""
    return [sys.executable, *map(str, arguments)]


def output_of(command: list[str]) -> str:
    """What a command prints. Raises `ProcessError` with what it wrote beside that if it fails."""
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise ProcessError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout


def timed(command: list[str]) -> Run:
    """Run a command to its end. Raises `ProcessError` with what it wrote if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment())
    assert process.stderr is not None
    with process.stderr:
        errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise ProcessError(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)
