"""Conversations and batches in files, and answers that survive any end of a run."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.chat.request_files.answers import AnswerFile
from mlxqwen.chat.request_files.batch import BatchRequest, digest, parse_requests
from mlxqwen.chat.request_files.conversations import parse_conversation, parse_tools
from mlxqwen.errors import OptionError

CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": CLOCK}
HELLO = {"role": "user", "content": "Hello"}
LINES = '{"prompt": "a", "id": "first"}\n\n{"messages": [{"role": "user", "content": "b\u2028c"}], "max_tokens": 3}\r\n'


def requests(text: str = LINES, system: str | None = None) -> list[BatchRequest]:
    return parse_requests(text, "in.jsonl", system=system)


# Conversations


def test_a_list_and_an_object_are_the_same_conversation() -> None:
    plain = parse_conversation(json.dumps([HELLO]), "file")
    assert plain == parse_conversation(json.dumps({"messages": [HELLO]}), "file")
    assert (plain.messages, plain.tools) == ((HELLO,), None)


def test_what_is_added_to_a_conversation() -> None:
    conversation = parse_conversation(json.dumps({"messages": [HELLO], "tools": [CLOCK]}), "file")
    assert conversation.tools == (WRAPPED,)
    whole = conversation.with_system("Be brief.").with_user("And now?")
    assert whole.messages == (
        {"role": "system", "content": "Be brief."},
        HELLO,
        {"role": "user", "content": "And now?"},
    )
    assert conversation.with_system(None).with_user(None) is conversation
    with pytest.raises(OptionError, match="system message beside"):
        whole.with_system("Be long.")
    with pytest.raises(OptionError, match="tools: found beside the messages"):
        conversation.with_tools(conversation.tools)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file: found no text, expected JSON"),
        ('[{"role":\n "user",}]', "file: not valid JSON at line 2"),
        ('"hi"', "file: found text, expected a list or an object"),
        ("{}", "file: found no 'messages', expected a list of them"),
        ('{"messages": null}', "file: messages: found null"),
        ("[]", "file: messages: found an empty list"),
        ('{"messages": []}', "empty list"),
        ('{"messages": [{"role": "user", "content": "a"}], "model": "b"}', "found 'model', expected messages, tools"),
        ('{"format": "mlxqwen-conversation-2", "messages": []}', "format: found 'mlxqwen-conversation-2'"),
        ('{"format": "mlxqwen-conversation-1", "messages": [], "options": []}', "options: found a list"),
        ('{"format": "mlxqwen-conversation-1", "messages": [], "tools": []}', "found 'tools'"),
        ('[{"role": "user", "content": 3}]', "file: messages[0]: content: found a number"),
        ('[{"role": "a bot", "content": "a"}]', "messages[0]: role: found 'a bot'"),
        ('[{"role": "user", "role": "user", "content": "a"}]', "'role' appears twice"),
        ('[{"role": "user", "content": NaN}]', "NaN is not JSON"),
        ('[{"role": "user", "content": "\\ud800"}]', "surrogate"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": 5}]}', "tools[0]: name: found 5"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": {}}', "tools: found an object"),
    ],
)
def test_conversations_that_are_none(text: str, words: str) -> None:
    with pytest.raises(OptionError) as found:
        parse_conversation(text, "file")
    assert words in found.value.problem


def test_tools() -> None:
    assert parse_tools(json.dumps([CLOCK]), "file") == parse_tools(json.dumps([WRAPPED]), "file") == (WRAPPED,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "file: found an empty list, expected a list of function schemas"),
        ("{}", "file: found an object"),
        ("[1]", "file: tools[0]: found a number"),
        ('[{"name": "</tools>"}]', "name: found '</tools>'"),
        ("[", "not valid JSON"),
    ],
)
def test_tools_that_are_none(text: str, words: str) -> None:
    with pytest.raises(OptionError) as found:
        parse_tools(text, "file")
    assert words in found.value.problem


# Batches


def test_lines_become_requests() -> None:
    first, second = requests(system="Be brief.")
    assert (first.index, first.id, first.options) == (0, "first", {})
    assert first.conversation.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"})
    assert (second.index, second.id, second.options) == (2, None, {"max_tokens": 3})
    assert second.conversation.messages[1]["content"] == "b\u2028c"
    assert first.digest != second.digest


def test_tools_of_a_line_come_before_the_default() -> None:
    other = {**CLOCK, "name": "other"}
    text = json.dumps({"prompt": "a", "tools": [other]}) + '\n{"prompt": "b"}'
    names = [
        request.with_default_tools(parse_tools(json.dumps([CLOCK]), "file")).conversation.tools
        for request in requests(text)
    ]
    assert [tools[0]["function"]["name"] for tools in names if tools] == ["other", "clock"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON at column 2"),
        ("[]", "found a list, expected an object"),
        ("{}", "neither prompt nor messages"),
        ('{"prompt": null}', "neither prompt nor messages"),
        ('{"prompt": "a", "messages": []}', "both prompt and messages"),
        ('{"prompt": " "}', "prompt: found ' ', expected text"),
        ('{"prompt": 5}', "prompt: found 5"),
        ('{"prompt": "a", "temperature": 1}', "found 'temperature'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0]: content: found a number"),
        ('{"prompt": "a", "tools": [{}]}', "tools[0]: name"),
        ('{"prompt": "a", "id": 1.5}', "id: found 1.5"),
        ('{"prompt": "a", "id": true}', "id: found True"),
        ('{"prompt": "a", "id": "first"}', "id: 'first' is already that of line 1"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens: found 0"),
        ('{"prompt": "a", "max_tokens": "5"}', "max_tokens: found '5'"),
        ('{"prompt": "a", "thinking_budget": -1}', "thinking_budget: found -1"),
        ('{"prompt": "a", "thinking": false, "thinking_budget": 3}', 'found 3 beside "thinking": false'),
        ('{"prompt": "a", "thinking": true, "thinking_budget": 0}', 'found 0 beside "thinking": true'),
        ('{"prompt": "a", "thinking": 1}', "thinking: found 1"),
        ('{"prompt": "a", "seed": -1}', "seed: found -1"),
        ('{"prompt": "a", "seed": 1, "sampling": {"seed": 2}}', "seed: found beside sampling"),
        ('{"prompt": "a", "sampling": 5}', "sampling: found a number"),
        ('{"prompt": "a", "sampling": {"heat": 5}}', "'heat'"),
        ('{"prompt": "a", "sampling": {"top_p": 5}}', "top_p: found 5"),
    ],
)
def test_a_broken_line_is_named(line: str, words: str) -> None:
    with pytest.raises(OptionError) as found:
        requests(f"{LINES}{line}\n{{")
    assert found.value.problem.startswith("in.jsonl: line 4: ")
    assert words in found.value.problem


def test_a_line_with_a_system_message_beside_the_common_one_is_refused() -> None:
    text = json.dumps({"messages": [{"role": "system", "content": "a"}, HELLO]})
    requests(text)
    with pytest.raises(OptionError, match=r"line 1: messages\[0\]: found a system message"):
        requests(text, system="b")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_batch_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="found no lines"):
        requests(text)


# Answers

MANY = "".join(f'{{"prompt": "question {number}", "id": {number}}}\n' for number in range(4))


def answer(path: Path, numbers: Sequence[int], text: str = MANY, options: str = "options") -> None:
    given = requests(text)
    with AnswerFile(path, given, digest(options)) as file:
        for number in numbers:
            file.append(given[number], {"content": f"answer {number} – 答"})


def indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_their_owner_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        answer(tmp_path / "out.jsonl", [0])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o600


def test_answers_are_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answer(path, [2, 0])
    with AnswerFile(path, requests(MANY), digest("options")) as file:
        assert (file.answered, file.failed) == ({0, 2}, 0)
        file.append(requests(MANY)[1], {"error": "no"})
        assert (file.answered, file.failed) == ({0, 1, 2}, 1)
    assert indices(path) == [2, 0, 1]
    with AnswerFile(path, requests(MANY), digest("options")) as file:
        assert file.failed == 1


@given(st.data())
def test_a_file_cut_off_anywhere_is_taken_up(data: st.DataObject) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        answer(path, [3, 1, 0])
        whole = path.read_bytes()
        length = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:length])
        with AnswerFile(path, requests(MANY), digest("options")) as file:
            missing = [number for number in (3, 1, 0) if number not in file.answered]
        # A line that lacks nothing but its line break is whole.
        assert len(missing) == 3 - whole[: length + 1].count(b"\n")
        answer(path, missing)
        assert path.read_bytes() == whole


def test_a_grown_input_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answer(path, [0, 1])
    answer(path, [4], MANY + '{"prompt": "one more"}\n')
    assert indices(path) == [0, 1, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"my notes\n", "line 1: found something else"),
        (b"my notes", "line 1: found something else"),
        (b'{"prompt": "a"}\n', "line 1: found something else"),
        (b"\xff\n", "line 1: found something else"),
        (b"\n", "line 1: found something else"),
        (b"[]\n", "line 1: found something else"),
        (b'{"index": 0, "request": 5}\n', "line 1: found something else"),
        (b'{"index": 99, "request": "a-b"}\n', "line 1: found the answer to another input"),
        (b'{"index": 0, "request": "a-b"}\n', "line 1: found the answer to another input"),
        (b'{"index": {}, "request": "a-b"}\n', "line 1: found the answer to another input"),
        (b'{"index": 0, "request": "a-b"}', "line 1: found the answer to another input"),
        (b'{"index": 0, "cut\n', "line 1: found something else"),
    ],
)
def test_files_of_others_are_left_alone(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(OptionError) as found:
        AnswerFile(path, requests(MANY), "options")
    assert words in found.value.problem
    assert path.read_bytes() == content


def test_other_inputs_and_options_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answer(path, [1, 3])
    with path.open("ab") as file:
        file.write(b'{"index": 2, "cont')
    before = path.read_bytes()
    with pytest.raises(OptionError, match="line 1: found the answer to another input"):
        answer(path, [0], MANY.replace("question 1", "question one"))
    with pytest.raises(OptionError, match="line 1: found an answer that was made with other options"):
        answer(path, [0], options="others")
    assert path.read_bytes() == before
    answer(path, [0])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(OptionError, match="line 4: found a second answer to line 2 of the input"):
        answer(path, [])


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, requests(MANY), "options"), pytest.raises(OptionError, match="another run is writing it"):
        AnswerFile(path, requests(MANY), "options")


def test_a_run_without_answers_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answer(path, [])
    assert not path.exists()
    path.touch()
    answer(path, [])
    assert path.exists()


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "missing" / "out", "no such folder"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/full"), "not a regular file"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(OptionError) as found:
            AnswerFile(path, requests(MANY), "options")
        assert words in found.value.problem


def test_what_does_not_fit_the_disk_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answer(path, [0])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OptionError, match="cannot be written: File too large"):
            answer(path, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    answer(path, [1])
    assert indices(path) == [0, 1]


def test_answers_are_json_lines_whatever_they_say(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fields: dict[str, Any] = {"content": "a\nb\r\u2028c\x00\x1b\U0001f600"}
    with AnswerFile(path, requests(MANY), "options") as file:
        file.append(requests(MANY)[0], fields)
    assert path.read_bytes().count(b"\n") == 1
    assert json.loads(path.read_text(encoding="utf-8"))["content"] == fields["content"]


def test_an_option_of_sampling_alone_is_shown_its_place() -> None:
    with pytest.raises(OptionError) as caught:
        parse_requests('{"prompt": "a", "temperature": 3}', "in.jsonl")
    assert '"sampling": {"temperature": …}' in caught.value.hint


def test_all_lines_that_are_not_sound_are_told_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        parse_requests("\n".join(['{"prompt": "a"}', *["{"] * 7]), "in.jsonl")
    problem = caught.value.problem
    assert problem.startswith("in.jsonl: line 2: not valid JSON")
    assert "line 6: " in problem
    assert "line 7: " not in problem
    assert problem.endswith("; and 2 more")
