"""`mlxqwen generate --batch`: many prompts at once, and runs that end in any way and are taken up."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pexpect
import pytest

from mlxqwen.cli.batch import batch_lines
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.running import RunningBatch
from mlxqwen.errors import GenerationError
from tests.command_line import Result, run
from tests.test_cli import assert_error
from tests.test_cli_generate import CALCULATOR, PRODUCT

QUESTIONS = ["How many r's in strawberry?", "What is 2 + 3?", "Hello", "Which is larger, 12 or 39?", "12 + 39?"]
LONG = "How many r's in strawberry? " * 45


class Files:
    """The input and the output of a batch, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def ask(self, *lines: Mapping[str, Any] | str) -> Files:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.input.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return self

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("generate", "--batch", str(self.input), "--output", str(self.output))

    def run(self, *arguments: str, **options: Any) -> Result:
        return run(*self.arguments, *arguments, **options)

    @property
    def answers(self) -> list[dict[str, Any]]:
        """In the order of the input."""
        lines = map(json.loads, self.output.read_text(encoding="utf-8").splitlines())
        return sorted(lines, key=lambda answer: int(answer["index"]))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path).ask(*({"prompt": question} for question in QUESTIONS))


@cache
def alone(*arguments: str) -> dict[str, Any]:
    """What `generate` says of one prompt, without what no two runs share; said once of the same arguments."""
    result = run("generate", *arguments, "--json")
    assert result.status == 0, result
    return core(json.loads(result.out))


def core(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Without what tells how it came about: in a batch, what others have read of a front is not read again."""
    usage = {name: count for name, count in answer["usage"].items() if name != "cached_tokens"}
    return {**{name: answer[name] for name in ("reasoning", "content", "finish_reason")}, "usage": usage}


# Answers


@pytest.mark.parametrize("size", ["1", "2", "8"])
def test_each_line_gets_what_it_would_get_alone(files: Files, size: str) -> None:
    assert files.run("--seed", "5", "--batch-size", size) == Result(0, "", "")
    assert [core(answer) for answer in files.answers] == [alone(question, "--seed", "5") for question in QUESTIONS]
    assert [answer["index"] for answer in files.answers] == list(range(len(QUESTIONS)))


def test_rows_go_through_the_model_together(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    advance = RunningBatch.advance

    def counted(self: RunningBatch) -> None:
        rows.append(len(self.rows))
        advance(self)

    monkeypatch.setattr(RunningBatch, "advance", counted)
    files.run("--batch-size", "2", "--max-tokens", "4")
    assert max(rows) == 2
    assert sum(rows) == 3 * len(QUESTIONS)  # the first token of each is drawn behind its prompt
    rows.clear()
    files.output.unlink()
    files.run("--batch-size", "8", "--max-tokens", "4")
    assert (max(rows), sum(rows)) == (len(QUESTIONS), 3 * len(QUESTIONS))


def test_lines_have_options_of_their_own(files: Files) -> None:
    question = QUESTIONS[0]
    files.ask(
        {"prompt": question, "id": "b", "thinking": False},
        {"prompt": question, "id": 7, "thinking_budget": 8},
        "",
        {"prompt": question, "max_tokens": 3},
        {"prompt": question, "seed": 9},
        {"prompt": question, "sampling": {"temperature": 0}},
        {"messages": [{"role": "user", "content": question}], "id": None, "seed": None},
    )
    assert files.run("--seed", "4").status == 0
    expected = [
        ["--seed", "4", "--no-thinking"],
        ["--seed", "4", "--thinking-budget", "8"],
        ["--seed", "4", "--max-tokens", "3"],
        ["--seed", "9"],
        ["--seed", "4", "--temperature", "0"],
        ["--seed", "4"],
    ]
    assert [core(answer) for answer in files.answers] == [alone(question, *options) for options in expected]
    assert [(answer["index"], answer["id"]) for answer in files.answers[:4]] == [(0, "b"), (1, 7), (3, None), (4, None)]


def test_options_for_all_lines(files: Files) -> None:
    options = ("--seed", "3", "--system", "Be brief.", "--thinking-budget", "6", "--early-stop-text", "So.")
    more = ("--kv-bits", "8", "--stop", "is", "--max-tokens", "60", "--prefill-chunk", "16")
    assert files.run(*options, *more).status == 0
    assert [core(answer) for answer in files.answers] == [alone(question, *options, *more) for question in QUESTIONS]
    assert any(answer["usage"]["budget_exhausted"] for answer in files.answers)


def test_a_window_holds_lines_of_any_length(files: Files) -> None:
    questions = (LONG, *QUESTIONS[:2])
    files.ask(*({"prompt": question} for question in questions))
    window = ("--max-kv-size", "64", "--kv-keep", "2", "--max-tokens", "20", "--seed", "6")
    assert files.run(*window).status == 0
    assert [core(answer) for answer in files.answers] == [alone(question, *window) for question in questions]


def test_tools_for_all_lines_and_for_one(files: Files, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([CALCULATOR["function"]]))
    clock = {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}}
    files.ask({"prompt": PRODUCT}, {"prompt": PRODUCT, "tools": [clock]})
    options = ("--tools", str(tools), "--temperature", "0")
    assert files.run(*options).status == 0
    first, second = files.answers
    (call,) = first["tool_calls"]
    assert (call["type"], call["function"]["name"], first["finish_reason"]) == ("function", "calculator", "tool_calls")
    assert json.loads(call["function"]["arguments"]) == {"expression": "1234 * 5678"}
    assert core(first) == alone(PRODUCT, *options)
    other = tmp_path / "clock.json"
    other.write_text(json.dumps([clock]))
    assert core(second) == alone(PRODUCT, "--tools", str(other), "--temperature", "0")
    tools.write_text(other.read_text())
    assert_error(files.run(*options), "made with other options")


def test_the_batch_may_come_from_standard_input(files: Files) -> None:
    arguments = ("generate", "--batch", "-", "--output", str(files.output), "--max-tokens", "2")
    assert run(*arguments, stdin=files.input.read_bytes()).status == 0
    assert len(files.answers) == len(QUESTIONS)


def test_verbose_tells_of_all(files: Files) -> None:
    result = files.run("--verbose", "--max-tokens", "4", "--thinking-budget", "2")
    first, second, third, last = result.err.splitlines()
    assert first.startswith("context 512, dtype")
    assert second.startswith("sampling: temperature 0.6, ")
    assert second.endswith("at most 4 tokens within the context")
    assert third.startswith("thinking budget: 2 tokens, then ")
    assert last.startswith("5 answers of 20 tokens in ")
    files.ask({"prompt": QUESTIONS[0]})
    files.output.unlink()
    assert files.run("--verbose", "--max-tokens", "1").err.splitlines()[-1].startswith("1 answer of 1 token in ")


# Failures of single lines


def test_lines_that_fail_are_answers_and_counted(files: Files) -> None:
    files.ask({"prompt": QUESTIONS[0]}, {"prompt": LONG, "id": "long"}, {"prompt": QUESTIONS[1]})
    result = files.run("--seed", "1", "--batch-size", "2")
    assert result.status == 1
    assert result.err.splitlines()[0] == f"error: {files.output}: 1 of 3 lines have failed"
    first, failed, last = files.answers
    assert (failed["index"], failed["id"], sorted(failed)) == (1, "long", ["error", "hint", "id", "index", "request"])
    assert "context of 512" in failed["error"]
    assert "--max-kv-size" in failed["hint"]
    assert failed["hint"] not in failed["error"]
    assert [core(first), core(last)] == [alone(question, "--seed", "5") for question in QUESTIONS[:2]]
    before = files.output.read_bytes()
    again = files.run("--seed", "1")
    assert (again.status, files.output.read_bytes()) == (1, before)
    assert again.err.startswith(f"note: {files.output} has 3 of 3 answers\nerror: ")


def test_a_failed_line_is_tried_again_once_it_is_removed(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.ask({"prompt": QUESTIONS[0]}, {"prompt": QUESTIONS[1]})
    with monkeypatch.context() as broken:
        fail_for(QUESTIONS[1], broken)
        assert files.run("--max-tokens", "2").status == 1
    kept = [line for line in files.output.read_text().splitlines(keepends=True) if '"error"' not in line]
    files.output.write_text("".join(kept))
    assert files.run("--max-tokens", "2").status == 0
    assert [answer["finish_reason"] for answer in files.answers] == ["length", "length"]


def fail_for(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Engine.load().prompt([{"role": "user", "content": question}])
    tell = Generation.tell

    def failing(self: Generation, drawn: int, guess: int | None = None) -> int:
        if list(self.request.prompt) == bad:
            raise GenerationError("logits: found NaN")
        return tell(self, drawn, guess)

    monkeypatch.setattr(Generation, "tell", failing)


def test_one_bad_row_does_not_take_the_others_with_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_for(QUESTIONS[2], monkeypatch)
    assert files.run("--seed", "2").status == 1
    expected = [alone(question, "--seed", "2") for question in QUESTIONS if question != QUESTIONS[2]]
    assert [core(answer) for answer in files.answers if "error" not in answer] == expected
    assert files.answers[2]["error"] == "logits: found NaN"


# Runs that end early


def started(files: Files, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlxqwen", *files.arguments, *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_answers(files: Files, count: int) -> None:
    deadline = time.monotonic() + 60
    while not files.output.exists() or files.output.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines_of(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines())


_SUMS = [{"prompt": f"What is {number} + 39?", "id": number} for number in range(24)]
_SUMS_OPTIONS = ("--seed", "1", "--batch-size", "3", "--max-tokens", "30")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A run that was not ended."""
    files = Files(tmp_path_factory.mktemp("whole"))
    files.ask(*_SUMS)
    assert files.run(*_SUMS_OPTIONS).status == 0
    return files


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_is_taken_up(whole: Files, files: Files, ending: signal.Signals) -> None:
    cut, options = files, _SUMS_OPTIONS
    cut.ask(*_SUMS)
    process = started(cut, *options)
    wait_for_answers(cut, 4)
    process.send_signal(ending)
    _, error = process.communicate(timeout=60)
    done = cut.output.read_bytes().count(b"\n")
    assert 4 <= done < len(_SUMS)
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert error.decode() == f"interrupted after {done} of 24 answers; the same command goes on from here\n"
    else:
        assert process.returncode == -signal.SIGKILL
        with cut.output.open("ab") as file:  # as if in the midst of a line
            file.write(whole.output.read_bytes().splitlines()[-1][:70])
    result = cut.run(*options)
    assert result == Result(0, "", f"note: {cut.output} has {done} of 24 answers\n")
    assert lines_of(cut.output) == lines_of(whole.output)


def test_what_is_done_is_not_done_again(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.run("--max-tokens", "2").status == 0
    before = files.output.read_bytes()
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("loaded"))
    result = files.run("--max-tokens", "2", "--batch-size", "3", "--prefill-chunk", "7")
    assert result == Result(0, "", f"note: {files.output} has 5 of 5 answers\n")
    assert files.output.read_bytes() == before


def test_a_progress_bar_on_a_terminal(files: Files) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mlxqwen", *files.arguments, "--max-tokens", "5"],
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 200),
    )
    child.expect_exact("0 of 5 lines  |                    |")
    child.expect_exact("5 of 5 lines  |####################|")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert str(child.before).endswith("\r\x1b[K")


def test_the_line_of_progress() -> None:
    assert batch_lines(0, 5, 0, 0.0)[0] == "0 of 5 lines  |                    |"
    assert batch_lines(1, 4, 300, 10.0) == [
        "1 of 4 lines  |#####               |  30 tokens/s  0:30 left",
        "1 of 4 lines  30 tokens/s  0:30 left",
        "1 of 4 lines  0:30 left",
        "1 of 4 lines",
    ]
    assert batch_lines(1_000, 2_000, 9, 90.0)[0].startswith("1,000 of 2,000 lines  |##########          |")


def test_progress_fits_a_narrow_terminal(files: Files) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mlxqwen", *files.arguments, "--max-tokens", "5"],
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 20),
    )
    child.expect(pexpect.EOF)
    child.close()
    assert "5 of 5 lines" in child.before
    assert all(len(line) < 20 for line in child.before.replace("\x1b[K", "").split("\r"))


def test_ctrl_c_on_a_terminal_begins_its_own_line(files: Files) -> None:
    files.ask(*({"prompt": QUESTIONS[0], "id": number} for number in range(200)))
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mlxqwen", *files.arguments, "--batch-size", "1"],
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 200),
    )
    child.expect_exact("2 of 200 lines")
    child.sendintr()
    child.expect(r"\r\x1b\[Kinterrupted after [0-9]+ of 200 answers; the same command goes on from here\r\n")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_a_full_disk_is_one_message(files: Files) -> None:
    limit = 900

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "mlxqwen", *files.arguments, "--seed", "5"]
    result = subprocess.run(command, preexec_fn=bounded, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert first == f"error: {files.output}: cannot be written: File too large"
    assert second == "       The answers in it are kept, and the same command goes on from there."
    assert 0 < len(files.answers) < len(QUESTIONS)
    assert files.run("--seed", "5").status == 0
    assert [core(answer) for answer in files.answers] == [alone(question, "--seed", "5") for question in QUESTIONS]


# Bad input, before anything is loaded


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded."""
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("loaded"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", __file__], "--batch needs --output"),
        (["hi", "--output", "x"], "--output needs --batch"),
        (["hi", "--batch-size", "2"], "--batch-size needs --batch"),
        (["hi", "--batch", __file__, "--output", "x"], "reads its prompts from the file: leave out PROMPT"),
        (["--prompt-file", __file__, "--batch", __file__, "--output", "x"], "leave out --prompt-file"),
        (["--messages", __file__, "--batch", __file__, "--output", "x"], "leave out --messages"),
        (["--raw", "--batch", __file__, "--output", "x"], "leave out --raw"),
        (["--json", "--batch", __file__, "--output", "x"], "leave out --json"),
        (["--batch", "-", "--tools", "-", "--output", "x"], "--tools and --batch: only one can be '-'"),
        (["--batch", "/no/such/file", "--output", "x"], "does not exist"),
        (["--batch", "/", "--output", "x"], "is a directory"),
        (["--batch", __file__, "--output", "-"], "--output cannot be '-'"),
        (["--batch", __file__, "--output", "x", "--batch-size", "many"], "not a valid integer"),
        (["--batch", __file__, "--output", "x", "--no-thinking", "--thinking-budget", "1"], "--thinking-budget"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], words: str) -> None:
    assert_error(run("generate", *arguments), "--help'.", words, status=2)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON at column 2"),
        ('{"prompt": "a", "heat": 5}', "found 'heat'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0]: content"),
        ('{"prompt": "a", "sampling": {"top_k": -2}}', "top_k: found -2"),
        ('{"prompt": "\x1b[31m"}', "Invalid control character"),
    ],
)
def test_a_broken_line_is_named_before_anything_runs(files: Files, line: str, words: str) -> None:
    files.ask({"prompt": "a"}, "", line)
    assert_error(files.run(), f"{files.input}: line 3: ", words)
    assert not files.output.exists()


@pytest.mark.usefixtures("no_model")
def test_a_budget_of_a_line_beside_the_switch_of_all(files: Files) -> None:
    files.ask({"prompt": "a", "thinking_budget": 3})
    assert_error(files.run("--no-thinking"), "line 1: thinking_budget: found 3 beside --no-thinking")
    files.ask({"prompt": "a", "thinking_budget": 0})
    assert_error(files.run("--thinking"), "line 1: thinking_budget: found 0 beside --thinking")


@pytest.mark.usefixtures("no_model")
def test_inputs_that_are_none(files: Files) -> None:
    for content, words in (
        (b"", "found no lines"),
        (b'{}\n\n{"prompt": "caf\xe9"}', "found byte 0xe9 at 19, in line 3, expected UTF-8 text"),
    ):
        files.input.write_bytes(content)
        assert_error(files.run(), f"{files.input}: {words}")
    with files.input.open("wb") as large:
        large.truncate(256 * 1024 * 1024 + 1)
    assert_error(files.run(), "268,435,456 bytes")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--batch-size", "0", "error: --batch-size: found 0"),
        ("--max-tokens", "0", "error: --max-tokens: found 0"),
        ("--thinking-budget", "-1", "error: --thinking-budget: found -1, expected an integer from 0 to"),
        ("--max-kv-size", "3", "more than the 4 tokens"),
    ],
)
def test_values_are_checked_first(files: Files, option: str, value: str, words: str) -> None:
    assert_error(files.run(option, value), words)
    assert not files.output.exists()


def copied(files: Files) -> None:
    files.output.write_bytes(files.input.read_bytes())


def linked(files: Files) -> None:
    files.output.symlink_to(files.input)


def of_another_input(files: Files) -> None:
    questions = files.input.read_bytes()
    files.ask({"prompt": "Hello"})
    assert run(*files.arguments, "--max-tokens", "1").status == 0
    files.input.write_bytes(questions)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (copied, "out.jsonl: line 1: found something else than an answer to a batch"),
        (linked, "found as --batch and --output, expected two files"),
        (of_another_input, "out.jsonl: line 1: found the answer to another input than this batch"),
        (lambda files: files.output.mkdir(), "out.jsonl: cannot be written: Is a directory"),
        (lambda files: files.output.write_text("my notes"), "line 1: found something else"),
    ],
)
def test_outputs_that_are_something_else(
    files: Files, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Files], object], words: str
) -> None:
    prepare(files)
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("loaded"))
    before = None if files.output.is_dir() else files.output.read_bytes()
    assert_error(files.run(), words)
    assert files.output.is_dir() or files.output.read_bytes() == before


@pytest.mark.usefixtures("no_model")
def test_outputs_that_cannot_be(files: Files) -> None:
    missing = str(files.output.parent / "missing" / "out.jsonl")
    arguments = ("generate", "--batch", str(files.input), "--output")
    assert_error(run(*arguments, missing), "missing/out.jsonl: cannot be written: no such folder")
    assert_error(run(*arguments, str(files.input)), "found as --batch and --output")
    assert_error(run(*arguments, "/dev/full"), "not a regular file")
    descriptor = os.open(files.output, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert_error(files.run(), "another run is writing it")
    finally:
        os.close(descriptor)


def test_answers_made_with_other_options_are_left_alone(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.run("--max-tokens", "2").status == 0
    before = files.output.read_bytes()
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("loaded"))
    same = ["--max-tokens", "2"]
    others: list[list[str]] = [
        ["--max-tokens", "3"],
        [],
        [*same, "--seed", "1"],
        [*same, "--dtype", "bfloat16"],
        [*same, "--yarn-factor", "2"],
        [*same, "--rope-scaling", '{"rope_type": "yarn", "factor": 2.0}'],
        [*same, "--kv-bits", "8"],
        [*same, "--max-kv-size", "64"],
        [*same, "--max-kv-size", "64", "--kv-keep", "2"],
    ]
    for other in others:
        assert_error(files.run(*other), "line 1: found an answer that was made with other options")
    assert files.output.read_bytes() == before


def test_a_model_that_cannot_be_loaded_leaves_no_output(files: Files) -> None:
    assert_error(files.run("--model", "/no/such/folder"), "no such folder")
    assert not files.output.exists()
