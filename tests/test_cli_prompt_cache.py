"""`--prompt-cache` of `mlxqwen generate` and `mlxqwen chat`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.engine import Engine
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
    assert "it stays as it is\n" in result.err


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


def test_a_run_that_fails_or_is_interrupted_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    generate(QUESTION, file=file)
    before = file.read_bytes()
    reply = Engine.reply
    longer = tmp_path / "messages.json"
    longer.write_text(json.dumps([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "3."}]))
    arguments = ("generate", OTHER, "--messages", str(longer), *BRIEF, "--prompt-cache", str(file))
    for failure, status in ((GenerationError("logits: found NaN"), 1), (KeyboardInterrupt(), 130)):

        def failing(self: Engine, *args: Any, failure: BaseException = failure, **options: Any) -> Any:
            yield next(iter(reply(self, *args, **options)))
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "reply", failing)
            assert run(*arguments).status == status
        assert file.read_bytes() == before
        assert os.listdir(tmp_path) in (["file", "messages.json"], ["messages.json", "file"])
    assert run(*arguments).status == 0
    assert len(file.read_bytes()) > len(before)


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
