"""What is piped in beside a prompt: where it stands, and when it is not waited for."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.chat.reply import Delta, Reply
from mlxqwen.cli import piped_input
from mlxqwen.cli.piped_input import read_context, with_context
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Done, Event, Timings, Usage
from tests.command_line import Result, run

Asked = Callable[..., str]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The text that the model is asked, for arguments and standard input."""
    seen: list[str] = []

    def stream(self: Engine, messages: Any, **options: Any) -> Iterator[Event]:
        seen.append(messages[-1]["content"])
        yield Delta(content="so")

    monkeypatch.setattr(Engine, "stream", stream)

    def ask(*arguments: str, stdin: bytes | None = b"") -> str:
        assert run("generate", *arguments, stdin=stdin) == Result(0, "so\n", "")
        return seen.pop()

    return ask


def test_what_is_piped_is_the_context_of_the_prompt(asked: Asked, tmp_path: Path) -> None:
    assert asked("Review this", stdin=b"+ one\n- two\n") == "+ one\n- two\n\nReview this"
    assert asked("Review this", stdin=b"") == asked("Review this", stdin=b" \n") == "Review this"
    assert asked("Review this", stdin=None) == "Review this"
    (tmp_path / "prompt").write_text("Review this\n")
    assert asked("--prompt-file", str(tmp_path / "prompt"), stdin=b"one\n") == "one\n\nReview this"
    (tmp_path / "said").write_text(
        json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    )
    assert asked("--messages", str(tmp_path / "said"), "And this?", stdin=b"one\n") == "one\n\nAnd this?"
    (tmp_path / "open").write_text(json.dumps([{"role": "user", "content": "a"}]))
    assert asked("--messages", str(tmp_path / "open"), stdin=b"one\n") == "a"
    assert asked("--messages", "-", "c", stdin=(tmp_path / "open").read_bytes()) == "c"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["-"], "the prompt"),
        (["Review this:", "-"], "the prompt"),
        (["--messages", "-"], "the messages, as JSON"),
        (["--tools", "-", "a"], "the tools, as JSON"),
        (["--json-schema", "-", "a"], "the schema, as JSON"),
        (["--batch", "-", "--output", "/dev/null/x"], "prompts, a line of JSON each"),
    ],
)
def test_a_terminal_is_told_that_it_is_waited_for(arguments: list[str], what: str) -> None:
    note = f"note: type {what}; Ctrl-D on an empty line ends it\n"
    assert run("generate", *arguments, stdin=None).err.startswith(note)
    assert "note: " not in run("generate", *arguments, stdin=b"").err
    assert "note: " not in run("generate", *arguments, "--quiet", stdin=None).err


def test_a_dash_is_where_it_stands(asked: Asked) -> None:
    stdin = b"one\ntwo\n"
    assert asked("-", stdin=stdin) == asked(stdin=stdin) == "one\ntwo"
    assert asked("Review:", "-", stdin=stdin) == asked("Review: -", stdin=stdin) == "Review:\n\none\ntwo"
    assert asked("-", "Be brief.", stdin=stdin) == "one\ntwo\n\nBe brief."
    between = "Review:\n\none\ntwo\n\nBe brief."
    assert asked("Review:", "-", "Be brief.", stdin=stdin) == asked("Review:\n-\nBe brief.", stdin=stdin) == between


@pytest.mark.parametrize("prompt", ["5 - 3?", "- a\n- b", "well-", "a -\nb -", "--"])
def test_other_dashes_are_text(prompt: str) -> None:
    assert with_context(prompt, "context") == f"context\n\n{prompt}"


@pytest.mark.parametrize("words", [("hi", "there"), ("-", "-"), ("a", "b", "-"), ("a", "-", "b", "c")])
def test_a_prompt_of_several_words_stands_in_quotes(words: tuple[str, ...]) -> None:
    result = run("generate", *words, stdin=b"x")
    assert result.status == 2
    assert "unexpected extra argument" in result.err
    assert "in quotes" in result.err


def test_raw_text_is_continued_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(*arguments: str, stdin: bytes) -> int:
        result = run("generate", "--raw", "--json", "--max-tokens", "1", *arguments, stdin=stdin)
        return int(json.loads(result.out)["usage"]["prompt_tokens"])

    alone = tokens("a bb c", stdin=b"")
    assert tokens("a ", "-", " c", stdin=b"bb") == tokens("a bb c", stdin=b"not read, as nobody asked") == alone


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Puts a descriptor in the place of standard input; waits are short."""
    monkeypatch.setattr(piped_input, "_SECONDS", 0.01)
    opened: list[Any] = []

    def use(descriptor: int) -> None:
        opened.append(os.fdopen(descriptor, encoding="utf-8"))
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield use
    for file in opened:
        file.close()


def test_an_open_pipe_is_not_waited_for(stdin: Callable[[int], None]) -> None:
    reading, writing = os.pipe()
    stdin(reading)
    assert read_context() == ""
    os.write(writing, b"one")
    os.close(writing)
    assert read_context() == "one"
    assert read_context() == ""


def test_devices_and_sockets_are_not_read(stdin: Callable[[int], None], tmp_path: Path) -> None:
    stdin(os.open("/dev/zero", os.O_RDONLY))
    assert read_context() == ""
    ours, theirs = socket.socketpair()
    theirs.send(b"one")
    stdin(ours.detach())
    assert read_context() == ""
    theirs.close()
    (tmp_path / "file").write_text("one\n")
    stdin(os.open(tmp_path / "file", os.O_RDONLY))
    assert read_context() == "one"


def test_a_conversation_that_ends_with_an_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "said").write_text(json.dumps(said))

    def answers(*deltas: Delta) -> Result:
        reply = Reply(None, "".join(delta.content or "" for delta in deltas))
        done = Done(reply, "stop", Usage(5, 7, 2), Timings(1.0, 1.0, 5.0, 7.0))
        monkeypatch.setattr(Engine, "stream", lambda self, messages, **options: iter((*deltas, done)))
        return run("generate", "--messages", str(tmp_path / "said"))

    assert answers(Delta(content="c")) == Result(0, "c\n", "")
    told = answers()
    assert (told.status, told.out) == (1, "")
    assert told.err.startswith(f"error: {tmp_path / 'said'}: ends with an answer, ")
    assert 'mlxqwen generate --messages FILE "And then?"' in told.err
