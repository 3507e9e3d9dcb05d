"""Conversions that are killed: nothing half written is published, and resumed they end in the same bytes."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen_convert.partial import tidy_output

ROOT = Path(__file__).parent.parent.parent
_PATHS = os.pathsep.join([str(ROOT), str(ROOT / "convert")])
_CONVERT = """
import sys
import mlxqwen_convert.tasks
mlxqwen_convert.tasks.WEIGHTS_PER_TASK = 4096
from mlxqwen_convert import convert
convert(sys.argv[1], sys.argv[2], bits=int(sys.argv[3]), resume=True)
"""
_MOST_SECONDS = 3.0


def start(output: Path, bits: int) -> subprocess.Popen[bytes]:
    """A process that converts the demo model, or goes on with that."""
    return subprocess.Popen(
        [sys.executable, "-c", _CONVERT, str(DEMO_FOLDER), str(output), str(bits)],
        env={**os.environ, "PYTHONPATH": _PATHS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.cache
def expected(bits: int) -> dict[str, bytes]:
    """What a conversion writes that nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out")
        start(output, bits).communicate()
        return contents(output)


def looks_whole_too_early(partial: Path, whole: dict[str, bytes]) -> bool:
    """Whether the unfinished folder has a config, or weights of final names, before all is there under those names.

    Just before the folder gets its own name, its files have theirs: then it is the model, to the byte.
    """
    if not (partial / "config.json").exists():
        return any(path.read_bytes() != whole.get(path.name) for path in partial.glob("*.safetensors"))
    found = contents(partial)
    return any(found.get(name) != data for name, data in whole.items())


def check(seed: int) -> str | None:
    """What broke: a part that looks like a model, an error, or other bytes. None if nothing."""
    draw = random.Random(seed)
    bits = draw.choice([4, 8])
    whole = expected(bits)
    with tempfile.TemporaryDirectory() as folder:
        output, partial = Path(folder, "out"), Path(folder, "out.partial")
        for _ in range(draw.randrange(1, 4)):
            process = start(output, bits)
            time.sleep(draw.random() * _MOST_SECONDS)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if output.exists():
                break
            if partial.exists() and looks_whole_too_early(partial, whole):
                return "an unfinished folder looks like a model"
        if output.exists():
            tidy_output(output)  # as the next conversion does: a crash may come between the folder's name and this
        else:
            process = start(output, bits)
            said = process.communicate()[1]
            if process.returncode:
                return said.decode()
        found = contents(output)
    wrong = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
    return f"other bytes in {', '.join(wrong)}" if wrong else None
