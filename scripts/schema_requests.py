"""Requests that schemathesis makes of the server's OpenAPI document: none may be answered by a 5xx.

    scripts/schema_requests.py [--seconds N] [--seed S]

It makes requests that fit the document and others that do not, for every path. The exit status is 1 if one was answered
by a 5xx, in another form than the document says, or not at all, or if something is left in the server's log that should
not be. Needs the extra `schemathesis`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec

from served import server

_CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance"
# Short replies: what they say is of no concern here.
_SERVER = ("--max-model-len", "96", "--max-queue", "4096", "--prefix-cache", "4MB")
_RUN = "from schemathesis.cli import schemathesis; schemathesis()"


def main() -> int:
    """Make requests until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if find_spec("schemathesis") is None:
        sys.exit('schemathesis: not installed, expected the extra of that name: pip install -e ".[schemathesis]"')
    with server(*_SERVER) as (process, port, log), tempfile.TemporaryDirectory() as folder:
        arguments = {
            "--phases": "coverage,fuzzing",
            "--checks": _CHECKS,
            "--max-time": str(options.seconds),
            "--seed": str(options.seed),
            "--workers": "1",  # Python 3.11 parses source in one thread at a time only, which Hypothesis does
            "--generation-database": "none",
            "--request-timeout": "120",
            "--warnings": "off",
        }
        command = [sys.executable, "-c", _RUN, "run", f"http://127.0.0.1:{port}/openapi.json", "--no-color"]
        command += [part for pair in arguments.items() for part in pair]
        status = subprocess.run(command, cwd=folder, check=False).returncode
    tracebacks = sum("Traceback" in line for line in log)
    print(f"{len(log):,} lines of log, {tracebacks} tracebacks, exit status of the server {process.returncode}")
    return int(bool(status or tracebacks or process.returncode))


if __name__ == "__main__":
    sys.exit(main())
