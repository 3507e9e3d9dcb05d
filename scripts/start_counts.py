"""Count the modules that a start imports: a measure of its cost that does not depend on the machine."""

from __future__ import annotations

import subprocess

from benchmarks.processes import environment, python

_GENERATE = """
from mlxqwen import generate, load
generate(*load(), prompt="Hello", max_tokens=1)
"""
_COMMAND = """
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
sys.argv = ["mlxqwen", "generate", "Hello", "--max-tokens", "1"]
from mlxqwen.cli import main
with redirect_stdout(StringIO()), redirect_stderr(StringIO()), suppress(SystemExit):
    main()
"""
STARTS = {"import mlxqwen": "import mlxqwen", "load and generate": _GENERATE, "mlxqwen generate": _COMMAND}


def count_imported_modules() -> dict[str, int]:
    """By kind of start, the modules that a bare interpreter has not; each in a process of its own, with the demo."""
    return {name: len(imported_modules(start)) for name, start in STARTS.items()}


def imported_modules(start: str) -> list[str]:
    """The names of the modules that a piece of Python imports, all that those import included."""
    source = f"import sys; bare = set(sys.modules)\n{start}\nprint(*sorted(set(sys.modules) - bare), sep='\\n')"
    result = subprocess.run(python("-c", source), env=environment(), capture_output=True, text=True, check=True)
    return result.stdout.split()


if __name__ == "__main__":
    for name, count in count_imported_modules().items():
        print(f"{count:4} {name}")
