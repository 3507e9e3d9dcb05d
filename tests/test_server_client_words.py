"""No message that reaches a client tells it of what only the server's owner has: options of commands, and Python.

All errors below the server and in it are read out of their sources, and told as a client would be told of them.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

import mlxqwen
from mlxqwen import errors
from mlxqwen.cli.commands import mlxqwen as command
from mlxqwen.engine.engine import Engine
from mlxqwen.errors import HubError, InsufficientMemoryError, MlxqwenError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.errors import api_error, load_error
from mlxqwen.text.tokenizer import Tokenizer
from tests.serving import CHAT, Served, ask, serving

PACKAGE = Path(mlxqwen.__file__).parent
ROOMS = ("checks.py", "forks.py", "files", "model", "cache", "sampling", "text", "chat", "engine", "server")
# Problems that name what is not the client's: only programs in Python and commands bring them about.
OF_PROGRAMS = {
    "chat/request_files/conversations.py",
    "server/settings.py",
    "cache/kv_cache.py",
    "engine/benchmark.py",
    "engine/conversation.py",
    "engine/conversation_file.py",
    "engine/engine.py",
    "engine/given.py",
    "engine/speculation/drafter.py",
    "model/given.py",
    "model/qwen3.py",
    "text/tokenizer.py",
}
OF_PROGRAMS_ALONE = (  # beside others that clients bring about
    "cache: found",
    "cached_tokens: found",
    "sampling: found",
    "X: found beside sampling=",
)


@dataclass(frozen=True)
class Told:
    """An error as its source spells it, with X for what is put in."""

    file: str
    line: int
    kind: type[MlxqwenError]
    problem: str
    hint: str


def spelled(node: ast.AST | None, module: ModuleType) -> list[str]:
    """What an expression may come to."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return spelled(node.body, module) + spelled(node.orelse, module)
    if isinstance(node, ast.Name):
        value = getattr(module, node.id, "X")
        return [value if isinstance(value, str) else "X"]
    if isinstance(node, ast.JoinedStr):
        texts = [""]
        for part in node.values:
            inner = spelled(part.value if isinstance(part, ast.FormattedValue) else part, module)
            texts = [text + one for text in texts for one in inner][:16]
        return texts
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [one + other for one in spelled(node.left, module) for other in spelled(node.right, module)]
    return ["X"] if node is not None else [""]


def of_file(path: Path) -> Iterator[Told]:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        callee = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        kind = getattr(errors, callee, None) or getattr(module, callee, None)
        is_error = isinstance(kind, type) and issubclass(kind, MlxqwenError)
        hint = next((one.value for one in node.keywords if one.arg == "hint"), None)
        if not is_error and hint is None:
            continue
        told = kind if isinstance(kind, type) and kind.__module__ == "mlxqwen.errors" else OptionError
        for problem in spelled(node.args[0] if is_error and node.args else None, module):
            for way_out in spelled(hint, module):
                yield Told(str(path.relative_to(PACKAGE)), node.lineno, told, problem, way_out)


@cache
def all_told() -> list[Told]:
    paths = [PACKAGE / room for room in ROOMS]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    return [told for file in files for told in of_file(file)]


@cache
def options() -> set[str]:
    """Every option of every command."""
    context = click.Context(command)
    found = (command.get_command(context, name) for name in command.list_commands(context))
    return {
        opt for one in found if one is not None for param in one.params for opt in param.opts if opt.startswith("--")
    }


_CLASSES = {"ChatRequest", "Conversation", "DraftModel", "Engine", "KVCache", "ReplyParser", "SamplingParams"}


def owners_words(text: str) -> set[str]:
    """Of a message, what is an option, a name of the package's, or Python."""
    words = {option for option in options() if re.search(rf"(?<![\w-]){option}(?![\w-])", text)}
    names = {name: "" if name in _CLASSES else r"[(.]" for name in mlxqwen.__all__}
    words |= {name for name, follows in names.items() if re.search(rf"\b{name}\b{follows}", text)}
    return words | set(re.findall(r"\w+=(?:…|True|False|None)|\bin Python\b|\w+\.\w+\(|\bmlxqwen\b", text))


def test_every_message_is_found() -> None:
    told = all_told()
    assert len({(one.file, one.line) for one in told}) > 350
    assert any("--max-kv-size" in one.hint and one.kind is InsufficientMemoryError for one in told)
    assert any("make_cache(model, max_kv_size=…)" in one.hint for one in told)
    assert {"--max-kv-size", "--yarn", "--force", "--allowed-host"} <= options()
    assert owners_words("Shorten it, or slide over it (--max-kv-size; cache=make_cache(model)).") == {
        "--max-kv-size",
        "make_cache",
    }


def test_no_way_out_of_the_owners_is_told_to_a_client() -> None:
    for one in all_told():
        error = one.kind("thing: found X", hint=one.hint)
        for told in (api_error(error), load_error(error, "demo", "")):
            assert not owners_words(told.message), one
        assert bool(api_error(error).for_owner) == (api_error(error).message != _whole(error) and one.hint != ""), one


def _whole(error: MlxqwenError) -> str:
    return error.problem if not error.hint else f"{error.problem}. {error.hint}"


def test_no_problem_is_told_in_the_owners_words() -> None:
    for one in all_told():
        if one.file in OF_PROGRAMS or one.problem.startswith(OF_PROGRAMS_ALONE):
            continue
        assert not owners_words(one.problem), one


def test_what_the_server_itself_refuses() -> None:
    """`ApiError`, whose message is told as it stands."""
    found = 0
    for path in sorted((PACKAGE / "server").rglob("*.py")):
        module = import_module(f"mlxqwen.server.{path.stem}") if path.parent.name == "server" else mlxqwen
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                for message in spelled(node.args[1], module):
                    found += 1
                    assert not owners_words(message), (path.name, node.lineno)
    assert found > 40


@pytest.fixture(scope="module")
def served(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[Served]:
    with serving(Engine(*small)) as made:
        yield made


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask("word " * 3000)),
        ("/v1/completions", {"model": "demo", "prompt": "word " * 3000}),
        ("/v1/responses", {"model": "demo", "input": "word " * 3000}),
        ("/v1/messages", {**ask("word " * 3000), "max_tokens": 5}),
    ],
)
def test_a_prompt_that_is_too_long(
    served: Served, path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mlxqwen.server")
    answer = served.client.post(path, json=body)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert re.fullmatch(
        r"prompt: (at least )?[\d,]+ tokens, but the model's context of 512 has to hold prompt and answer\. "
        r"Shorten it, leave out older messages, or ask a model with a longer context\.",
        message,
    ), message
    (line,) = caplog.messages
    assert "way out: Shorten it, extend the context (--yarn" in line
    assert "--max-kv-size" in line
    way_out = line.partition("way out: ")[2]
    assert not re.search(r"Python|make_cache|load\(|\.,|;", way_out), line


def test_a_name_that_is_not_the_servers(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mlxqwen.server")
    answer = served.client.post(CHAT, json=ask(), headers={"host": "evil.example"})
    assert answer.status_code == 403
    assert not owners_words(answer.json()["error"]["message"])
    assert "way out: --allowed-host evil.example lets this name in, " in caplog.text
    assert "evil" not in answer.text


@pytest.mark.parametrize(
    ("host", "shown"), [("-rf", "'-rf'"), ("a b", "'a b'"), ("x" * 300, "'xxx"), ("a\x1b", "'a\\x1b'")]
)
def test_a_host_that_is_no_name_is_no_argument(
    served: Served, host: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mlxqwen.server")
    assert served.client.post(CHAT, json=ask(), headers={"host": host}).status_code == 403
    (line,) = caplog.messages
    assert f"way out: --allowed-host NAME adds a name; the Host was {shown}" in line
    assert len(line) < 400


def test_a_model_that_does_not_fit_is_told_with_another_way_out() -> None:
    error = InsufficientMemoryError("weights take 9 GB", hint="Take a smaller one, or --force.")
    assert load_error(error, "big", "").message == (
        'model: "big" cannot be loaded: weights take 9 GB. Ask another model.'
    )
    gone = HubError("org/m: not found", hint="Check the name.")
    assert load_error(gone, "m", "").message.endswith("org/m: not found. Check the name.")
