"""Run the examples of the documentation on the demo model and write what they print into the pages.

    python scripts/make_transcripts.py            # rewrites README.md and docs/thinking.md in place
    python scripts/make_transcripts.py --check    # only says whether they are up to date

In a block marked `console` the lines that begin with `$ ` are run by the shell, and what they print follows each.
A block marked `python` that is followed by one marked `text` is run, the later ones of a page with the names of those
before, and prints into that. Every other block is left alone. Examples give seeds, so the same machine prints the same.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/thinking.md")
SHELL = f'''python() {{ "{sys.executable}" "$@"; }}; mlxqwen() {{ python -m mlxqwen "$@"; }}
'''
_CONSOLE = re.compile(r"^```console\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_PYTHON = re.compile(r"(?P<code>^```python\n(?P<body>.*?)^```$\n+)^```text\n.*?^```$", re.DOTALL | re.MULTILINE)
_BETWEEN = "--- the next example prints: ---"


class ExampleError(Exception):
    """An example that ended with an error."""

    def __init__(self, example: str, printed: str) -> None:
        super().__init__(f"this example failed:\n{example}\nIt printed:\n{printed}")


def commands(console: str) -> list[str]:
    """The commands of a console block; a line that ends in a backslash goes on in the next."""
    found: list[str] = []
    goes_on = False
    for line in console.splitlines():
        if goes_on:
            found[-1] += f"\n{line}"
        elif line.startswith("$ "):
            found.append(line.removeprefix("$ "))
        else:
            continue
        goes_on = line.endswith("\\")
    return found


def run(arguments: list[str], example: str, folder: Path, stdin: str = "") -> str:
    """Everything that a program prints, errors among it, with no blanks at line ends."""
    paths = (str(ROOT), str(ROOT / "convert"), str(ROOT / "scripts"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise ExampleError(example, done.stdout)
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.strip("\n").splitlines())


def updated(page: str) -> str:
    """The markdown `page` with every transcript as it is printed now.

    Raises:
        ExampleError: an example failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scripts").symlink_to(ROOT / "scripts")
        page = _CONSOLE.sub(lambda block: _console(block["body"], folder), page)
        pieces = [match["body"] for match in _PYTHON.finditer(page)]
        printed = iter(_python(pieces, folder))
        return _PYTHON.sub(lambda block: f"{block['code']}```text\n{next(printed)}```", page)


def _console(body: str, folder: Path) -> str:
    lines = "".join(
        f"$ {command}\n{run(['bash', '-c', SHELL + command], command, folder)}" for command in commands(body)
    )
    return f"```console\n{lines}```"


def _python(pieces: list[str], folder: Path) -> list[str]:
    """What each piece of a page prints, all run as one program."""
    if not pieces:
        return []
    program = f"\nprint({_BETWEEN!r}, flush=True)\n".join(pieces)
    printed = run([sys.executable, "-"], program, folder, stdin=program)
    return [part.lstrip("\n") for part in printed.split(f"{_BETWEEN}\n")]


def main() -> int:
    """Rewrite or check the pages, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a transcript is out of date")
    parser.add_argument("pages", nargs="*", type=Path, default=[ROOT / page for page in PAGES])
    options = parser.parse_args()
    stale = []
    for page in options.pages:
        before = page.read_text(encoding="utf-8")
        try:
            after = updated(before)
        except ExampleError as problem:
            print(f"{page}: {problem}", file=sys.stderr)
            return 1
        if after != before:
            stale.append(page)
            if not options.check:
                page.write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{page}: {'out of date; run scripts/make_transcripts.py' if options.check else 'rewritten'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
