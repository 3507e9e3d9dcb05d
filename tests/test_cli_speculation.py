"""`--speculative` and `--draft` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.engine.request import DEFAULT_DRAFT_TOKENS, MAX_DRAFT_TOKENS
from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import run
from tests.test_cli import assert_error

SHORT = ["--max-tokens", "25", "--seed", "1"]


def answered(*arguments: str) -> dict[str, Any]:
    result = run("generate", "Say one two three.", "--json", *SHORT, *arguments)
    assert result.status == 0, result.err
    answer: dict[str, Any] = json.loads(result.out)
    return answer


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speculative", "lookup"],
        ["--draft", str(DEMO_FOLDER), "--draft-tokens", "3"],
        ["--draft", str(DEMO_FOLDER), "--max-kv-size", "64", "--kv-bits", "8"],
    ],
    ids=str,
)
def test_an_answer_is_the_one_without_guesses(arguments: list[str]) -> None:
    cache = arguments[2:] if "--kv-bits" in arguments else []
    expected, found = answered(*cache), answered(*arguments)
    usage = found.pop("usage")
    assert usage == {
        **expected.pop("usage"),
        "drafted_tokens": usage["drafted_tokens"],
        "accepted_tokens": usage["accepted_tokens"],
    }
    assert {**found, "timings": None} == {**expected, "timings": None}
    if "--draft" in arguments:
        assert 0 < usage["accepted_tokens"] <= usage["drafted_tokens"]


@pytest.mark.parametrize(
    "arguments", [["--speculative", "lookup"], ["--draft", str(DEMO_FOLDER)]], ids=lambda arguments: arguments[0]
)
def test_answers_of_a_batch_are_those_without_guesses(tmp_path: Path, arguments: list[str]) -> None:
    """Also of the last one, which runs alone in the end, and for which something is guessed."""
    lines = tmp_path / "lines"
    asked = [{"prompt": "Say one two three."}, {"prompt": "Hello"}, {"prompt": "one two one two", "max_tokens": 60}]
    lines.write_text("".join(json.dumps(line) + "\n" for line in asked))

    def answers(name: str, *arguments: str) -> list[dict[str, Any]]:
        output = tmp_path / name
        result = run("generate", "--batch", str(lines), "--output", str(output), *SHORT, *arguments)
        assert result.status == 0, result.err
        return sorted(map(json.loads, output.read_text().splitlines()), key=lambda answer: int(answer["index"]))

    def guessed(answer: dict[str, Any]) -> tuple[int, int]:
        return answer["usage"].pop("accepted_tokens"), answer["usage"].pop("drafted_tokens")

    plain, found = answers("plain"), answers("guessed", *arguments)
    assert [guessed(answer) for answer in plain] == [(0, 0)] * 3
    counts = [guessed(answer) for answer in found]
    assert all(accepted <= drafted for accepted, drafted in counts)
    assert counts[2][1] > 0 or "--speculative" in arguments
    for answer in (*plain, *found):
        del answer["request"]  # which tells the options
    assert found == plain


def test_the_numbers_in_the_help_are_the_library_s() -> None:
    told = " ".join(run("generate", "--help").out.split())
    assert f"guessed at once, up to {MAX_DRAFT_TOKENS}; {DEFAULT_DRAFT_TOKENS} by default." in told
    refused = run("generate", "Hello", "--speculative", "lookup", "--draft-tokens", str(MAX_DRAFT_TOKENS + 1))
    assert_error(refused, "--draft-tokens: found 65, expected an integer from 1 to 64", "")


def test_verbose_tells_how_many_guesses_were_right() -> None:
    result = run("generate", "one two three one two", "--raw", "--verbose", *SHORT, "--draft", str(DEMO_FOLDER))
    assert result.status == 0, result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("drafts: ")]
    drafted, accepted = int(line.split()[1]), int(line.split()[3])
    assert line == f"drafts: {drafted} tokens, {accepted} of them accepted ({accepted / drafted:.0%})"
    assert "drafts" not in run("generate", "one", "--raw", "--verbose", *SHORT).err


def test_a_chat_guesses_too() -> None:
    arguments = ["chat", "--verbose", *SHORT]
    plain = run(*arguments, stdin=b"Hello\n/stats\n")
    result = run(*arguments, "--draft", str(DEMO_FOLDER), stdin=b"Hello\n/stats\n")
    assert result.out == plain.out
    assert "Drafts: " in result.err
    assert "Drafts: " not in plain.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--speculative", "lookup", "--draft", "b"], "--draft does the guessing: leave out --speculative."),
        (["a", "--draft-tokens", "3"], "--draft-tokens needs --draft or --speculative"),
        (["a", "--speculative", "guess"], "'guess' is not 'lookup'"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    result = run("generate", *arguments)
    assert result.status == 2
    assert message in result.err


def test_a_draft_that_cannot_be(tmp_path: Any) -> None:
    assert_error(run("generate", "a", "--speculative", "lookup", "--draft-tokens", "0"), "--draft-tokens: found 0")
    assert_error(run("generate", "a", "--draft", str(tmp_path / "none")), "draft model: ", "none")
