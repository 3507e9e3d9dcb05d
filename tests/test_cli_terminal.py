"""`mlxqwen generate` on a real terminal: pieces as they come, Ctrl-C at any time, escapes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from mlxqwen.files.hub import DEMO_FOLDER

STYLE = re.compile(r"\x1b\[(?:2|22)m")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without a token that ends its reply."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, key: None}))
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture
def terminal() -> Iterator[list[pexpect.spawn]]:
    """Collects the processes that a test starts, to end them."""
    children: list[pexpect.spawn] = []
    yield children
    for child in children:
        child.close(force=True)


BEGUN = "from mlxqwen.cli import main; print('begun', flush=True); main()"
"""The command, which says when it begins: on a busy machine Python itself starts late, and has its own Ctrl-C."""


def start(
    children: list[pexpect.spawn], *arguments: str, program: tuple[str, ...] = ("-m", "mlxqwen"), **environment: str
) -> pexpect.spawn:
    child = pexpect.spawn(
        sys.executable,
        [*program, *arguments],
        env={
            "PATH": "/usr/bin:/bin",
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            "MLXQWEN_BLAS": os.environ["MLXQWEN_BLAS"],
            "MLXQWEN_CORES": os.environ["MLXQWEN_CORES"],
            **environment,
        },
        encoding="utf-8",
        codec_errors="strict",
        timeout=30,
        dimensions=(24, 200),
        cwd=str(Path(__file__).parent.parent),
    )
    children.append(child)
    return child


def finish(child: pexpect.spawn) -> tuple[int, str]:
    """The exit status as a shell counts it, and what was still written."""
    child.expect(pexpect.EOF)
    child.close()
    status = child.exitstatus if child.signalstatus is None else 128 + child.signalstatus
    return status, str(child.before)


def test_reasoning_is_dim_and_the_answer_plain(terminal: list[pexpect.spawn]) -> None:
    child = start(terminal, "generate", "What is 2 + 3?", "--seed", "1", "--thinking")
    status, text = finish(child)
    assert status == 0
    assert text.startswith("\x1b[2m")
    *_, reasoning, answer, speed = text.split("\x1b[2m")
    assert reasoning.rpartition("\x1b[22m")[2] == ""
    assert re.fullmatch(r".*\x1b\[22m\r\n[^\r\n]+\r\n", answer, re.DOTALL)
    assert re.fullmatch(r"\d+ tokens, \d+\.\d tokens/s\r\n\x1b\[22m", speed)


def test_no_color(terminal: list[pexpect.spawn]) -> None:
    status, text = finish(start(terminal, "generate", "What is 2 + 3?", NO_COLOR="1"))
    assert status == 0
    assert "\x1b" not in text


def test_pieces_arrive_and_ctrl_c_keeps_them(terminal: list[pexpect.spawn], endless: Path) -> None:
    child = start(terminal, "generate", "Hello", "--no-thinking", "--max-kv-size", "64", "--model", str(endless))
    for _ in range(5):
        child.expect(r"\w+")
        assert child.isalive()
    child.sendintr()
    status, text = finish(child)
    assert status == 130
    assert "Traceback" not in text
    assert text.endswith("\r\n")


def test_ctrl_c_while_thinking(terminal: list[pexpect.spawn], endless: Path) -> None:
    options = ("--thinking", "--max-kv-size", "64", "--stop", "</think>", "--model", str(endless))
    child = start(terminal, "generate", "Hello", *options)
    child.expect_exact("\x1b[2m")
    child.sendintr()
    status, text = finish(child)
    assert status == 130
    assert "Traceback" not in text
    assert STYLE.sub("", text).endswith("\r\n")


def test_ctrl_c_while_prefilling(terminal: list[pexpect.spawn], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("How many r's in strawberry? " * 20_000)
    options = ("--prompt-file", str(tmp_path / "prompt.txt"), "--max-kv-size", "64")
    child = start(terminal, "generate", *options)
    child.expect("Reading the prompt: [0-9,]+ of [0-9,]+ tokens")
    child.sendintr()
    status, text = finish(child)
    assert status == 130
    assert "Traceback" not in text
    assert text.endswith("\r\n")


@pytest.mark.parametrize("delay", [0.02, 0.15, 0.3])
def test_ctrl_c_at_any_time_while_loading(terminal: list[pexpect.spawn], endless: Path, delay: float) -> None:
    options = ("--max-kv-size", "64", "--model", str(endless))
    child = start(terminal, "generate", "Hello", *options, program=("-c", BEGUN))
    child.expect_exact("begun\r\n")
    child.delaybeforesend = None
    time.sleep(delay)
    child.sendintr()
    status, text = finish(child)
    assert "Traceback" not in text
    assert status == 130


def test_json_after_ctrl_c(terminal: list[pexpect.spawn], endless: Path) -> None:
    options = ("--json", "--verbose", "--max-kv-size", "64", "--model", str(endless))
    child = start(terminal, "generate", "Hello", *options)
    child.expect("sampling: ")
    child.sendintr()
    status, text = finish(child)
    assert status == 130
    objects = [line for line in text.split("\r\n") if "{" in line]
    assert len(objects) == 1
    assert json.loads(objects[0][objects[0].index("{") :])["finish_reason"] == "interrupted"


def test_prompt_missing_on_a_terminal(terminal: list[pexpect.spawn]) -> None:
    status, text = finish(start(terminal, "generate"))
    assert status == 2
    assert text.startswith("error: Give a PROMPT")


def test_dash_reads_the_terminal_to_its_end(terminal: list[pexpect.spawn]) -> None:
    child = start(terminal, "generate", "-", "--max-tokens", "1", "--json")
    child.setecho(False)
    child.sendline("Hello")
    child.sendeof()
    status, text = finish(child)
    assert status == 0
    assert json.loads(text[text.index("{") :])["usage"]["completion_tokens"] == 1


def test_ctrl_c_while_the_prompt_is_typed(terminal: list[pexpect.spawn]) -> None:
    child = start(terminal, "generate", "-", program=("-c", BEGUN))
    child.expect_exact("begun\r\n")
    time.sleep(0.3)  # whether it reads by now or still imports: the end is the same
    child.sendintr()
    status, text = finish(child)
    assert status == 130
    assert "Traceback" not in text
    assert text.endswith("\r\n")
