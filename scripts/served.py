"""`mlxqwen serve` of this checkout with the demo model, as a process, for scripts that ask it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["server"]

ROOT = Path(__file__).parent.parent


@contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """The server's process, its port, and the lines of its log, whole once the process has ended."""
    with subprocess.Popen(
        [sys.executable, "-m", "mlxqwen", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "convert")])},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = re.search(r":(\d+)/v1", process.stdout.readline())
        if found is None:
            sys.exit(process.communicate()[1])
        log: list[str] = []
        reading = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
        reading.start()
        try:
            yield process, int(found[1]), log
        finally:
            process.terminate()
            process.wait(timeout=60)
            reading.join(timeout=60)
