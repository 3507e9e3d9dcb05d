"""`--prompt-cache` of `mlxqwen generate` and `mlxqwen chat`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.cli.chat_session import ChatSession
from mlxqwen.engine.engine import Engine
from mlxqwen.errors import GenerationError
from tests.command_line import Result, run
from tests.test_cli import assert_error
from tests.test_cli_chat import INTERRUPT, Chat
from tests.test_prompt_cache import stored_ids

QUESTION, OTHER = "How many r's in strawberry?", "What is 2 + 2?"
BRIEF = ("--system", "You count letters and do nothing else.", "--max-tokens", "12", "--seed", "4")


def generate(*arguments: str, file: Path) -> Result:
    result = run("generate", *arguments, *BRIEF, "--prompt-cache", str(file), "--verbose")
    assert result.status == 0, result
    return result


def usage(*arguments: str, file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(generate(*arguments, "--json", file=file).out)["usage"]
    return found


def test_the_second_run_reads_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    first = generate(QUESTION, file=file)
    assert "of them from the cache" not in first.err
    assert f"prompt cache: {file}: written, {len(stored_ids(file))} tokens\n" in first.err
    made = file.read_bytes()
    again = generate(QUESTION, file=file)
    assert again.out == first.out
    prompt = len(stored_ids(file))
    assert f"prompt: {prompt} tokens, {prompt - 1} of them from the cache, " in again.err
    assert f"prompt cache: {file}: stays as it is\n" in again.err
    counts = usage(OTHER, file=file)
    assert 10 < counts["cached_tokens"] < counts["prompt_tokens"]
    plain = run("generate", OTHER, *BRIEF)
    assert generate(OTHER, file=file).out == plain.out
    assert file.read_bytes() == made


@pytest.mark.parametrize("options", [("--kv-bits", "8"), ("--max-kv-size", "64"), ("--yarn-factor", "2")])
def test_options_have_files_of_their_own(tmp_path: Path, options: tuple[str, ...]) -> None:
    file, own = tmp_path / "file", tmp_path / "own"
    generate(QUESTION, file=file)
    before = file.read_bytes()
    refused = run("generate", QUESTION, *BRIEF, *options, "--prompt-cache", str(file))
    assert_error(refused, "file: made with ", "a file of its own")
    assert file.read_bytes() == before
    first, second = (generate(QUESTION, *options, file=own) for _ in range(2))
    assert (first.out, "from the cache" in second.err) == (second.out, True)


def test_another_prompt_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    generate("Count the r's. " * 12, file=file)
    result = run("generate", OTHER, "--max-tokens", "3", "--prompt-cache", str(file))
    assert f"note: {file} holds another prompt: " in result.err
    assert "it stays as it is, remove it to begin anew\n" in result.err


def test_a_file_that_is_too_short_to_be_of_use_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    run("generate", "Hello", "--max-tokens", "3", "--prompt-cache", str(file))
    stored, document = len(stored_ids(file)), "Count the r's. " * 12
    note = f"note: {file} holds another prompt: "
    again = run("generate", "Hello", "--max-tokens", "3", "--prompt-cache", str(file))
    assert note not in again.err
    longer = run("generate", document, "--max-tokens", "3", "--prompt-cache", str(file), "--verbose")
    found = re.search(r"note: .*: (\d+) of its (\d+) tokens were of use, (\d+) others were read; it stays", longer.err)
    assert found is not None
    used, of_all, others = map(int, found.groups())
    assert of_all == stored
    assert used < stored < others
    assert f", {used} of them from the cache, " in longer.err
    talked = run("chat", "--max-tokens", "3", "--prompt-cache", str(file), stdin=f"{document}\n".encode())
    assert note in talked.err
    unasked = run("chat", "--max-tokens", "3", "--prompt-cache", str(file), stdin=b"/help\n")
    assert note not in unasked.err
    file.unlink()
    anew = run("generate", document, "--max-tokens", "3", "--prompt-cache", str(file))
    assert (note in anew.err, len(stored_ids(file)) > stored) == (False, True)


def test_what_is_wrong_with_a_file_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Engine, "load", load)
    text = tmp_path / "notes.txt"
    text.write_text("Notes of mine that matter.")
    for path, problem in (
        (text, "no safetensors file"),
        (tmp_path, "a folder, expected a file"),
        (tmp_path / "nowhere" / "file", "there is no folder"),
        (tmp_path / ("long" * 100), "cannot be read"),
        (tmp_path / os.fsdecode(b"\xff"), "--prompt-cache: found bytes that are not UTF-8"),
    ):
        for command in ("generate", "chat"):
            result = run(command, *([OTHER] if command == "generate" else []), "--prompt-cache", str(path))
            assert_error(result, problem, "")
    assert text.read_text() == "Notes of mine that matter."


def test_it_goes_with_neither_batches_nor_raw_text(tmp_path: Path) -> None:
    file, lines = str(tmp_path / "file"), tmp_path / "lines"
    lines.write_text('{"prompt": "Hello"}\n')
    result = run("generate", "--batch", str(lines), "--output", str(tmp_path / "out"), "--prompt-cache", file)
    assert (result.status, "--prompt-cache is for one conversation: leave out --batch" in result.err) == (2, True)
    result = run("generate", "Hello", "--raw", "--prompt-cache", file)
    assert (result.status, "leave out --raw" in result.err) == (2, True)


def failing_after_an_event(failure: BaseException) -> Any:
    reply = Engine.reply

    def failing(self: Engine, *args: Any, **options: Any) -> Any:
        yield next(iter(reply(self, *args, **options)))
        raise failure

    return failing


def test_a_run_that_fails_leaves_the_file_and_one_interrupted_adds_the_prompt_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, whole = tmp_path / "file", tmp_path / "whole"
    longer = tmp_path / "messages.json"
    longer.write_text(json.dumps([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "3."}]))
    arguments = ("generate", OTHER, "--messages", str(longer), *BRIEF, "--prompt-cache")
    for path in (file, whole):
        generate(QUESTION, file=path)
    assert run(*arguments, str(whole)).status == 0
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "reply", failing_after_an_event(GenerationError("logits: found NaN")))
        assert run(*arguments, str(file)).status == 1
    assert file.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "reply", failing_after_an_event(KeyboardInterrupt()))
        assert run(*arguments, str(file)).status == 130
    assert stored_ids(file) == stored_ids(whole)
    assert sorted(os.listdir(tmp_path)) == ["file", "messages.json", "whole"]
    again = run(*arguments, str(file), "--verbose")
    assert f"{len(stored_ids(file)) - 1} of them from the cache" in again.err
    assert again.out == run(*arguments, str(whole)).out


def test_a_prompt_that_was_not_read_to_its_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxqwen.cli.terminal import PrefillProgress

    def interrupt(self: PrefillProgress, done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    monkeypatch.setattr(PrefillProgress, "__call__", interrupt)
    result = run("generate", QUESTION, *BRIEF, "--prefill-chunk", "8", "--prompt-cache", str(tmp_path / "file"))
    assert result.status == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError()], ids=["Ctrl-C", "memory"])
def test_a_chat_that_is_ended_by_something_else_keeps_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    file = tmp_path / "file"
    handle = ChatSession.handle

    def failing(self: ChatSession, text: str) -> bool:
        if text == OTHER:
            raise failure
        return handle(self, text)

    monkeypatch.setattr(ChatSession, "handle", failing)
    ended = chat(QUESTION, OTHER, file=file)
    assert ended.status == {KeyboardInterrupt: 130, MemoryError: 1}[type(failure)]
    assert f"prompt cache: {file}: written, {len(stored_ids(file))} tokens\n" in ended.err


def test_a_file_that_cannot_be_written_is_an_error_behind_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxqwen.cache import KVCache

    def save(self: KVCache, path: Path, metadata: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KVCache, "save", save)
    result = run("generate", QUESTION, *BRIEF, "--prompt-cache", str(tmp_path / "file"))
    assert result.status == 1
    assert result.err.splitlines()[-2].endswith("file: cannot be written: No space left on device")
    assert result.out == run("generate", QUESTION, *BRIEF).out
    assert os.listdir(tmp_path) == []


def chat(*lines: str, file: Path) -> Result:
    typed = "".join(f"{line}\n" for line in lines).encode()
    return run("chat", *BRIEF, "--no-thinking", "--prompt-cache", str(file), "--verbose", stdin=typed)


def test_a_chat_goes_on_where_another_was(tmp_path: Path) -> None:
    file, saved = tmp_path / "file", tmp_path / "chat.json"
    first = chat(QUESTION, OTHER, f"/save {saved}", file=file)
    assert first.status == 0
    assert f"written, {len(stored_ids(file))} tokens" in first.err
    held = len(stored_ids(file))
    second = chat(f"/load {saved}", "Thanks.", file=file)
    assert f", {held} of them from the cache, " in second.err
    assert len(stored_ids(file)) > held
    made = file.read_bytes()
    third = chat("/clear", "Something else.", file=file)
    assert "stays as it is" in third.err
    assert "of them from the cache" in third.err
    assert file.read_bytes() == made


def test_a_chat_that_is_left_saves_also_what_was_stopped_in(tmp_path: Path) -> None:
    file = tmp_path / "file"
    arguments = ("--no-thinking", "--max-tokens", "400", "--temperature", "2", "--prompt-cache", str(file))
    chat = Chat(*arguments)
    try:
        chat.begin("How many letters are there in each of these words?")
        chat.send(INTERRUPT)
        chat.rest()
        assert not file.exists()
        assert chat.end() == 0
    finally:
        chat.child.close(force=True)
    assert stored_ids(file)
    again = Chat(*arguments, "--verbose")
    try:
        again.begin("How many letters are there in each of these words?")
        again.send(INTERRUPT)
        again.rest()
        assert again.end() == 0
    finally:
        again.child.close(force=True)
    assert f"prompt cache: {file}: " in again.child.before
