"""What the chat tells of a prompt that is too long: which part, how many tokens, the way out; and that it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.text.tokenizer import Tokenizer
from tests.command_line import Result, run
from tests.test_cli_generate import CALCULATOR

TOKENIZER = Tokenizer.from_folder(DEMO_FOLDER)
SLIDES = "Started with --max-kv-size the chat slides over its beginning"
CALLING = [
    {"role": "user", "content": "What is 1 * 2?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1 * 2"}'}}
        ],
    },
]


def chat(*lines: str, arguments: tuple[str, ...] = ()) -> Result:
    options = ("--no-thinking", "--max-tokens", "4", *arguments)
    return run("chat", *options, stdin="".join(f"{line}\n" for line in lines).encode())


def hints(result: Result) -> list[str]:
    lines = result.err.splitlines()
    return [lines[i + 1].strip() for i, line in enumerate(lines) if line.startswith("error: ")]


def tokens(text: str) -> str:
    return f"{len(TOKENIZER.encode_plain(text)):,}"


def test_a_message_that_is_too_long_alone() -> None:
    long = "word " * 600
    for arguments in ((), ("--drop-oldest",)):
        result = chat("Hello", long, "Hello again", "/stats", arguments=arguments)
        (hint,) = hints(result)
        assert hint.startswith(f"The message takes {tokens(long)} tokens. Shorten it. {SLIDES}")
        assert "/drop" not in hint
        assert "Conversation: 4 messages." in result.err  # what was too long is not among them


def test_megabytes_are_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encode_plain = Tokenizer.encode_plain
    monkeypatch.setattr(
        Tokenizer,
        "encode_plain",
        lambda self, text: encode_plain(self, text) if len(text) < 10_000 else pytest.fail("encoded"),
    )
    (hint,) = hints(chat("word " * 1_000_000))
    assert re.match(r"The message takes at least [\d,]{6,} tokens\. Shorten it\. ", hint)


def test_a_system_message_that_leaves_no_room_is_not_set() -> None:
    long = "long " * 600
    result = chat("/system Be brief.", f"/system {long}", "/system", "Hello")
    assert result.err.count("System message: Be brief.") == 2
    assert f"error: /system: found {tokens(long.strip())} tokens, but the model's context of 512" in result.err
    assert len(result.out.splitlines()) == 1
    slides = chat(f"/system {long}", "Hello", arguments=("--max-kv-size", "64"))
    assert (slides.status, "error: " in slides.err) == (0, False)


def test_a_system_message_that_was_given_at_the_start() -> None:
    long = "long " * 600
    result = chat("Hello", "/system -", "Hello", arguments=("--system", long))
    (hint,) = hints(result)
    assert hint.startswith(
        f"The system message takes {tokens(long)} tokens. /system TEXT sets a shorter system message, /system - removes"
    )
    assert len(result.out.splitlines()) == 1


def test_a_message_and_a_system_message_that_are_too_long_together() -> None:
    system, message = "long " * 250, "word " * 300
    (hint,) = hints(chat(message, arguments=("--system", system)))
    told = f"The message takes {tokens(message)} tokens, the system message {tokens(system)}. Shorten one of them: "
    assert hint.startswith(f"{told}/system TEXT")


def test_functions_that_leave_no_room(tmp_path: Path) -> None:
    described = json.loads(json.dumps(CALCULATOR))
    described["function"]["description"] = "word " * 600
    (tmp_path / "tools.json").write_text(json.dumps([described]))
    result = chat("Hello", arguments=("--tools", str(tmp_path / "tools.json")))
    (hint,) = hints(result)
    told = re.match(r"The functions of --tools take (\d+) tokens\. Start the chat with fewer of them\. ", hint)
    assert told is not None
    assert int(told[1]) > len(TOKENIZER.encode_plain("word " * 600))


def test_older_turns_may_go() -> None:
    result = chat("word " * 300, "word " * 300, "/drop", "/clear", "word " * 300)
    assert hints(result)[0].startswith("/drop forgets the oldest turn, /clear all of them. ")
    assert len(result.out.splitlines()) == 2


def test_a_result_that_is_too_long_is_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "open.json").write_text(json.dumps({"messages": CALLING, "tools": [CALCULATOR]}))
    copy = tmp_path / "copy.json"
    given = ("--messages", str(tmp_path / "open.json"))
    result = chat("word " * 600, "2", f"/save {copy}", arguments=given)
    assert hints(result)[0].startswith("The last message, with the calls and results behind it, takes ")
    roles = [message["role"] for message in json.loads(copy.read_text())["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_stats_tell_of_a_window() -> None:
    assert (
        "tokens, a window of 64 slides over them.\n" in chat("Hello", "/stats", arguments=("--max-kv-size", "64")).err
    )
    assert re.search(r"Context: \d+ of 512 tokens\.\n", chat("Hello", "/stats").err)
