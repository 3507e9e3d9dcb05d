"""What a chat does with its arguments, files, tools and words, in the test's own process."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.chat.reply import Delta
from mlxqwen.chat.thinking import EARLY_STOP_TEXT
from mlxqwen.cli.chat_answer import OnPrefill, show_answer
from mlxqwen.cli.chat_session import ChatSession
from mlxqwen.cli.chat_view import PlainView
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Done, Event
from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import Result, run
from tests.test_cli_generate import CALCULATOR

DEMO = str(DEMO_FOLDER)
BRIEF = ("--no-thinking", "--seed", "1")


def piped(*arguments: str, lines: Sequence[str] = ()) -> Result:
    return run("chat", *arguments, stdin="".join(f"{line}\n" for line in lines).encode())


def written(path: Path, value: object) -> str:
    path.write_text(json.dumps(value))
    return str(path)


# Arguments


def test_a_first_message_is_answered_before_what_is_typed(tmp_path: Path) -> None:
    asked, file = "What is 2 + 3?", tmp_path / "a.json"
    expected = piped(*BRIEF, lines=[asked])
    assert expected.status == 0
    for arguments in ([asked], [DEMO, asked], ["--model", DEMO, asked]):
        assert piped(*arguments, *BRIEF) == expected
    piped(DEMO, "Hello", *BRIEF, lines=["What is 12 + 39?", f"/save {file}"])
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["Hello", "What is 12 + 39?"]
    assert piped("--model", DEMO, "one-word", *BRIEF).status == 0


def test_a_single_word_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert piped(DEMO, *BRIEF) == Result(0, "", "")
    result = piped("Hello", *BRIEF)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: 'Hello': neither an existing folder nor a hub id")
    assert "one word needs a model before it: mlxqwen chat MODEL Hello." in " ".join(result.err.split())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").symlink_to(DEMO_FOLDER)
    assert piped("my model", *BRIEF, lines=["Hello"]).out
    wrong = piped("--model", DEMO, "other", "Hello")
    assert (wrong.status, "not both: found 'other'" in wrong.err) == (2, True)
    assert piped(DEMO, " ").status == 1


def test_a_conversation_is_gone_on_with(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    file, copy = written(tmp_path / "messages.json", messages), tmp_path / "copy.json"
    result = piped("--messages", file, *BRIEF, lines=["What is 2 + 3?", f"/save {copy}"])
    assert (result.status, result.err.splitlines()[0]) == (0, f"Loaded 2 messages from {file}.")
    assert json.loads(copy.read_text())["messages"][:3] == [*messages, {"role": "user", "content": "What is 2 + 3?"}]
    with_system = piped("--messages", file, "--system", "Be brief.", *BRIEF, lines=[f"/save {tmp_path / 'b'}"])
    assert with_system.status == 0
    assert json.loads((tmp_path / "b").read_text())["messages"][0] == {"role": "system", "content": "Be brief."}


def test_files_are_checked_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "load", lambda *arguments, **options: pytest.fail("loaded"))
    (tmp_path / "bad").write_text("{")
    for option in ("--messages", "--tools"):
        result = piped(option, str(tmp_path / "bad"))
        assert (result.status, str(tmp_path / "bad") in result.err) == (1, True)


# Tools


def test_the_user_tells_what_a_call_returns(tmp_path: Path) -> None:
    tools, copy = written(tmp_path / "tools.json", [CALCULATOR]), tmp_path / "copy.json"
    asked = "What is 1234 * 5678?"
    result = piped("--tools", tools, *BRIEF, asked, lines=["7006652", f"/save {copy}"])
    assert result.status == 0
    call = 'The model calls calculator {"expression": "1234 * 5678"}: type what it returns.'
    assert result.err.splitlines()[0] == call
    assert "7006652" in result.out
    saved = json.loads(copy.read_text())
    roles = [message["role"] for message in saved["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert saved["messages"][2]["tool_call_id"] == saved["messages"][1]["tool_calls"][0]["id"]
    assert saved["options"]["tools"] == [CALCULATOR]
    (tmp_path / "open.json").write_text(json.dumps({**saved, "messages": saved["messages"][:2]}))
    again = piped("--messages", str(tmp_path / "open.json"), lines=["7006652"])
    assert again.err.splitlines()[1] == call
    assert "7006652" in again.out


def test_several_calls_are_answered_one_after_the_other(tmp_path: Path) -> None:
    calls = [
        {
            "id": f"c{i}",
            "type": "function",
            "function": {"name": "calculator", "arguments": json.dumps({"expression": e})},
        }
        for i, e in enumerate(("1 * 2", "3 * 4"))
    ]
    messages = [{"role": "user", "content": "Both"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    file, copy = written(tmp_path / "open.json", {"messages": messages, "tools": [CALCULATOR]}), tmp_path / "copy.json"
    result = piped("--messages", file, *BRIEF, lines=["2", "12", f"/save {copy}"])
    assert result.err.count("The model calls calculator") == 2
    results = [
        (m["tool_call_id"], m["content"]) for m in json.loads(copy.read_text())["messages"] if m["role"] == "tool"
    ]
    assert results == [("c0", "2"), ("c1", "12")]
    undone = piped("--messages", file, *BRIEF, lines=["2", "/undo", "Hello", f"/save {tmp_path / 'b'}"])
    assert undone.status == 0
    assert [m["role"] for m in json.loads((tmp_path / "b").read_text())["messages"]] == ["user", "assistant"]


# Words, and what is told


class Views:
    """Collects what a chat says besides answers."""

    folds_reasoning = False

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, *, hanging: int = 0) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load()


def session(engine: Engine, view: Any, **options: Any) -> ChatSession:
    from mlxqwen.cli.chat import chat

    none = {**dict.fromkeys(param.name for param in chat.params), "stop": ()}
    return ChatSession(engine, view, {**none, **options}, is_interactive=True)


@pytest.mark.parametrize("word", ["exit", " quit ", "/exit", "/bye", "/quit"])
def test_words_that_leave(engine: Engine, word: str) -> None:
    assert session(engine, Views()).handle(word) is False


def test_in_a_pipe_words_are_messages() -> None:
    assert piped(*BRIEF, lines=["exit", "quit"]).out.count("\n") == 2
    assert piped(*BRIEF, lines=["/bye", "Hello"]).out == ""


@pytest.mark.parametrize("budget", [5, 12])
@pytest.mark.parametrize("sentence", [None, "", "Enough."])
def test_a_budget_counts_the_models_own_tokens(engine: Engine, budget: int, sentence: str | None) -> None:
    from mlxqwen.cli.chat_thinking import without_sentence

    options: dict[str, Any] = {"thinking_budget": budget}
    if sentence is not None:
        options["early_stop_text"] = sentence
    *_, done = engine.stream("How many r's in strawberry?", seed=1, **options)
    assert isinstance(done, Done)
    assert done.usage.budget_exhausted
    assert without_sentence(done, engine.tokenizer, options).usage.reasoning_tokens == budget
    assert (done.usage.reasoning_tokens > budget + 20) == (sentence is None)
    *_, done = engine.stream("How many r's in strawberry?", seed=1, thinking_budget=500)
    assert isinstance(done, Done)
    assert without_sentence(done, engine.tokenizer, {"thinking_budget": 500}) == done
    assert EARLY_STOP_TEXT not in str(done.reply.reasoning)


def test_thinking_is_told_in_a_sentence(engine: Engine) -> None:
    view = Views()
    chat = session(engine, view)
    for typed in ("/budget", "/budget 1", "/budget 1200", "/budget 0", "/think", "/no_think"):
        chat.handle(typed)
    assert view.said == [
        f"The model {does} before it answers."
        for does in (
            "thinks as long as it likes",
            "thinks for at most 1 token",
            "thinks for at most 1,200 tokens",
            "does not think",
            "thinks as long as it likes",
            "does not think",
        )
    ]


def test_ctrl_c_ends_the_reading_of_a_prompt_at_once_and_an_answer_behind_its_piece(engine: Engine) -> None:
    done: list[str] = []

    def reading(on_prefill: OnPrefill) -> Generator[Event]:
        on_prefill(0, 1_000)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the chunk")
        yield Delta(content="x")

    def answering(on_prefill: OnPrefill) -> Generator[Event]:
        on_prefill(0, 1_000)
        on_prefill(1_000, 1_000)
        yield Delta(content="x")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the piece")
        yield Delta(content="y")
        done.append("the next one")

    view = PlainView(io.StringIO(), io.StringIO(), folds_reasoning=False, count_tokens=len)
    assert not show_answer(reading, view, stoppable=True).has_begun
    assert show_answer(answering, view, stoppable=True).has_begun
    assert done == ["the piece"]


def test_a_stopped_call_is_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlxqwen.cli import chat_session
    from mlxqwen.cli.chat_answer import Answer

    view = Views()
    chat = session(engine, view, tools=[CALCULATOR], thinking=False, seed=1)

    def stopped(begin: Any, view: Any, *, stoppable: bool) -> Answer:
        events = begin(lambda *read: None)
        while next(events).tool_call is None:
            pass
        events.close()
        return Answer(None, has_begun=True)

    monkeypatch.setattr(chat_session, "show_answer", stopped)
    chat.handle("What is 1234 * 5678?")
    chat.handle(f"/save {tmp_path / 'a'}")
    assert view.said[0] == "Stopped; what is shown stays."
    chat.handle("/stats")
    assert view.said[-1].startswith(
        "The last answer was stopped: its tokens were not counted.\nConversation: 2 messages."
    )
    chat.handle("/undo")
    chat.handle("/stats")
    assert view.said[-1].startswith("There is no last answer.\n")
    assert "tool_calls" not in json.loads((tmp_path / "a").read_text())["messages"][-1]
