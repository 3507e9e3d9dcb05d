"""Run real clients, unpatched, against `mlxqwen serve` of the demo model, and tell which of them get along with it.

    scripts/clients                      # all of them
    scripts/clients openai-node llm      # these

Each has an environment of its own below --folder, made by pip or npm when it is first needed; --fresh makes it anew
with the newest libraries. The programs are those of scripts/client_programs: each is given the server's address and the
model's name, and prints what has passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from served import server

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "scripts" / "client_programs"


class ClientError(Exception):
    """A client, its environment or the server did not do as it should."""


@dataclass(frozen=True)
class Client:
    """One client.

    Args:
        name: what it is called here.
        program: its file in `client_programs`.
        packages: of PyPI, or of npm if the program is JavaScript; the first one's version is shown.
        models: the names under which it asks for the demo, each with a server of its own.
    """

    name: str
    program: str
    packages: tuple[str, ...]
    models: tuple[str, ...] = ("demo",)

    @property
    def is_node(self) -> bool:
        """Whether it runs on Node."""
        return self.program.endswith(".mjs")


# Qwen-Agent imports packages that it does not ask for, and speaks the first version of the `mcp` package.
_QWEN_AGENT = ("qwen-agent==0.0.34", "mcp<2", "numpy", "soundfile", "tqdm", "python-dateutil")
CLIENTS = (
    Client("openai", "openai_sdk.py", ("openai",)),
    Client("openai-node", "openai_sdk.mjs", ("openai", "zod")),
    Client("anthropic", "anthropic_sdk.py", ("anthropic",)),
    Client("langchain-openai", "langchain_chat.py", ("langchain-openai",)),
    Client("litellm", "litellm_completion.py", ("litellm",)),
    Client("instructor", "instructor_models.py", ("instructor",)),
    Client("pydantic-ai", "pydantic_agent.py", ("pydantic-ai-slim[openai]",)),
    Client("llm", "llm_command.py", ("llm",)),
    Client("ai-sdk", "ai_sdk.mjs", ("ai", "@ai-sdk/openai-compatible", "zod")),
    Client("qwen-agent", "qwen_agent_assistant.py", _QWEN_AGENT),
    Client("launch-article", "article.py", ("openai",), ("Qwen/Qwen3-8B",)),
    # Tests of thinking are left out unless the model's name is one of those that llm-comply knows to think.
    Client("llm-comply", "comply.py", ("llm-comply==0.5.0", "jsonschema"), ("gpt-5", "claude-sonnet-4")),
)


def make_environment(client: Client, folder: Path, *, fresh: bool) -> Path:
    """The folder with the client's libraries, made if it is not there. Raises `ClientError` if it cannot be."""
    made = folder / client.name
    stamp, wanted = made / "packages.json", json.dumps(client.packages)
    if not fresh and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return made
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    if client.is_node:
        (made / "package.json").write_text('{"private": true, "type": "module"}', encoding="utf-8")
        _checked(["npm", "install", "--no-audit", "--no-fund", *client.packages], made)
    else:
        venv.create(made, with_pip=True)
        _checked([str(made / "bin" / "python"), "-m", "pip", "install", "-q", *client.packages], made)
    stamp.write_text(wanted, encoding="utf-8")
    return made


def version_of(client: Client, made: Path) -> str:
    """The version of the client's first package."""
    name = re.split(r"[\[=<>]", client.packages[0])[0]
    if client.is_node:
        text = (made / "node_modules" / name / "package.json").read_text(encoding="utf-8")
        return str(json.loads(text)["version"])
    question = f"import importlib.metadata as m; print(m.version({name!r}))"
    return _checked([str(made / "bin" / "python"), "-c", question], made).strip()


def _checked(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ClientError(f"{command[0]}: {error.strerror or error}") from None
    if done.returncode:
        raise ClientError(f"{' '.join(command[:4])} …: {_last_line(done.stderr or done.stdout)}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.match(r"[\w.\[\] ]*Error\b", line)), lines[-1] if lines else "")


@contextmanager
def serving(model: str, log: Path) -> Iterator[str]:
    """The address of a server that calls the demo `model`. Raises `ClientError` unless it begins and ends well."""
    lines: list[str] = []
    with ExitStack() as running:
        try:
            process, port, lines = running.enter_context(server("--served-model-name", model))
        except SystemExit as ended:
            raise ClientError(f"server: {ended}") from None
        running.callback(lambda: log.write_text("".join(lines), encoding="utf-8"))
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()
        status = process.wait(timeout=60)
    if status or any("Traceback" in line for line in lines):
        raise ClientError(f"server: ended with {status}, or an error of its own; see {log}")


def run_client(client: Client, made: Path, url: str, model: str, *, timeout: float) -> list[str]:
    """What the client's program prints as passed. Raises `ClientError` where it fails."""
    if client.is_node:  # modules are looked for beside the program
        program = made / client.program
        shutil.copy(PROGRAMS / client.program, program)
        command = ["node", str(program), url, model]
    else:
        command = [str(made / "bin" / "python"), "-P", str(PROGRAMS / client.program), url, model]
    home = made / "home"
    home.mkdir(exist_ok=True)
    # Nothing of the user's: neither keys nor settings, nor the packages of this checkout.
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_", "PYTHON"))
    }
    environment = {
        **kept,
        "HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would ask the network
        "AI_SDK_LOG_WARNINGS": "false",
    }
    log = made / "output.log"
    with log.open("w", encoding="utf-8") as errors:
        try:
            done = subprocess.run(
                command,
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ClientError(f"not over after {timeout:g} s; see {log}") from None
    passed = [line.strip() for line in done.stdout.splitlines() if line.strip() and "\x1b" not in line]
    if done.returncode:
        last = _last_line(log.read_text(encoding="utf-8"))
        raise ClientError(f"after {', '.join(passed) or 'nothing'}: {last[:200]}; see {log}")
    return passed


def main() -> int:
    """Run the clients that are named, and print a table of them. The exit status is 1 if one failed."""
    names = [client.name for client in CLIENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "clients", help="where their environments are")
    parser.add_argument("--fresh", action="store_true", help="make their environments anew")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for each (300)")
    options = parser.parse_args()
    for name in options.names:
        if name not in names:
            parser.error(f"NAME: found {name!r}, expected one of {', '.join(names)}")
    chosen = [client for client in CLIENTS if not options.names or client.name in options.names]
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for client in chosen:
        began = time.monotonic()
        version, passed = "", []
        try:
            made = make_environment(client, folder, fresh=options.fresh)
            version = version_of(client, made)
            for model in client.models:
                with serving(model, made / "server.log") as url:
                    passed += run_client(client, made, url, model, timeout=options.timeout)
            verdict, what = "passed", ", ".join(passed)
        except ClientError as error:
            failed += 1
            verdict, what = "FAILED", str(error)
        print(f"{client.name:17}{version:12}{verdict:8}{time.monotonic() - began:5.0f} s  {what}", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
