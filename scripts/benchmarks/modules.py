"""The modules that a start imports: a measure of its cost that does not depend on the machine."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.processes import environment, python

__all__ = ["STARTS", "imported_modules", "module_counts"]

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


def imported_modules(start: str) -> list[str]:
    """The names of the modules that a piece of Python imports, all that those import included."""
    source = f"import sys; bare = set(sys.modules)\n{start}\nprint(*sorted(set(sys.modules) - bare), sep='\\n')"
    result = subprocess.run(python("-c", source), env=environment(), capture_output=True, text=True, check=True)
    return result.stdout.split()


def module_counts() -> dict[str, int]:
    """Modules imported, by whose they are."""
    found: dict[str, int] = {}
    for start, source in STARTS.items():
        owners = {"mlxqwen": 0, "libraries": 0, "standard library": 0}
        for name in imported_modules(source):
            top = name.partition(".")[0]
            if top in ("mlxqwen", "mlxqwen_convert"):
                owners["mlxqwen"] += 1
            else:
                owners["standard library" if top in sys.stdlib_module_names else "libraries"] += 1
        found |= {f"modules, {start}: {owner}": count for owner, count in owners.items()}
    return found
