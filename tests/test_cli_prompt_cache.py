"""`--prompt-cache FOLDER` and `--prefix-cache SIZE` of `mlxqwen generate` and `mlxqwen chat`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.cache.blocks import BLOCK
from mlxqwen.cache.disk_tier import DiskTier
from mlxqwen.cli.chat_session import ChatSession
from mlxqwen.engine.engine import Engine
from mlxqwen.errors import GenerationError
from mlxqwen.files.checkpoint import save_safetensors
from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import Result, run
from tests.test_cli import assert_error
from tests.test_cli_chat import INTERRUPT, Chat

QUESTION, OTHER = "How many r's in strawberry?", "What is 2 + 2?"
BRIEF = ("--system", "You count letters and do nothing else.", "--max-tokens", "12", "--seed", "4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def generate(*arguments: str, folder: Path) -> Result:
    result = run("generate", *arguments, *BRIEF, "--prompt-cache", str(folder), "--verbose")
    assert result.status == 0, result
    return result


def usage(*arguments: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(generate(*arguments, "--json", folder=folder).out)["usage"]
    return found


def whole_blocks(tokens: int) -> int:
    """How many of a prompt's tokens a run finds that read the same prompt before: the last one is read again."""
    return (tokens - 1) // BLOCK * BLOCK


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_second_run_reads_what_is_new(folder: Path) -> None:
    plain = run("generate", QUESTION, *BRIEF)
    first = generate(QUESTION, folder=folder)
    assert first.out == plain.out
    assert "of them from the cache" not in first.err
    made = files_of(folder)
    again = generate(QUESTION, folder=folder)
    assert again.out == first.out
    counts = usage(QUESTION, folder=folder)
    prompt = counts["prompt_tokens"]
    assert counts["cached_tokens"] == whole_blocks(prompt) > 0
    assert f"prompt: {prompt} tokens, {whole_blocks(prompt)} of them from the cache, " in again.err
    assert files_of(folder) == made  # nothing was new
    # Another question shares the system message.
    assert 0 < usage(OTHER, folder=folder)["cached_tokens"] < whole_blocks(prompt)
    assert generate(OTHER, folder=folder).out == run("generate", OTHER, *BRIEF).out
    assert made.items() <= files_of(folder).items()


@pytest.mark.parametrize("options", [("--kv-bits", "8"), ("--yarn-factor", "2"), ("--max-kv-size", "64")])
def test_each_kind_of_cache_has_its_own(folder: Path, options: tuple[str, ...]) -> None:
    """A ring that is not full yet is read as a cache that keeps everything."""
    generate(QUESTION, folder=folder)
    first = usage(QUESTION, *options, folder=folder)
    is_ring = "--max-kv-size" in options
    assert first["cached_tokens"] == (whole_blocks(first["prompt_tokens"]) if is_ring else 0)
    second = usage(QUESTION, *options, folder=folder)
    assert second["cached_tokens"] == whole_blocks(second["prompt_tokens"])
    plain = run("generate", QUESTION, *BRIEF, *options)
    assert generate(QUESTION, *options, folder=folder).out == plain.out


@pytest.mark.parametrize(
    "options", [("--raw",), ("--speculative", "lookup"), ("--draft", str(DEMO_FOLDER)), ("--no-thinking",)], ids=str
)
def test_it_goes_with_other_options(folder: Path, options: tuple[str, ...]) -> None:
    system = () if "--raw" in options else ("--system", "You count letters and do nothing else.")
    arguments = (QUESTION * 4, "--max-tokens", "12", "--seed", "4", "--json", *system, *options)
    plain = json.loads(run("generate", *arguments).out)
    cached = []
    for _ in range(2):
        result = run("generate", *arguments, "--prompt-cache", str(folder))
        assert result.status == 0, result
        answer = json.loads(result.out)
        cached.append(answer["usage"].pop("cached_tokens"))
        assert {**answer, "timings": None, "usage": {**answer["usage"], "cached_tokens": 0}} == {
            **plain,
            "timings": None,
        }
    assert cached == [0, whole_blocks(plain["usage"]["prompt_tokens"])]


def test_a_batch_reads_and_writes_it(tmp_path: Path, folder: Path) -> None:
    lines, out = tmp_path / "lines", tmp_path / "out"
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (QUESTION, OTHER, QUESTION + " Sure?")))
    shared = ("--batch", str(lines), *BRIEF)

    def answers(path: Path, *arguments: str) -> list[dict[str, Any]]:
        assert run("generate", *shared, "--output", str(path), *arguments).status == 0
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return sorted(found, key=lambda answer: int(answer["index"]))

    plain = answers(out, "--prefix-cache", "off")
    for number in range(2):
        found = answers(tmp_path / f"{number}", "--prompt-cache", str(folder))
        for answer, expected in zip(found, plain, strict=True):
            assert answer["reasoning"] == expected["reasoning"]
            if number == 1:
                assert answer["usage"]["cached_tokens"] == whole_blocks(answer["usage"]["prompt_tokens"])
    assert usage(QUESTION, folder=folder)["cached_tokens"] > 0


def test_a_batch_reads_a_shared_front_once(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (QUESTION, OTHER)))

    def cached(*arguments: str) -> list[int]:
        out = tmp_path / f"out{len(os.listdir(tmp_path))}"
        assert run("generate", "--batch", str(lines), *BRIEF, "--output", str(out), *arguments).status == 0
        return sorted(json.loads(line)["usage"]["cached_tokens"] for line in out.read_text().splitlines())

    assert cached("--prefix-cache", "off") == [0, 0]
    nothing, shared = cached()
    assert nothing == 0 < shared
    assert cached("--prefix-cache", "1MB") == [nothing, shared]


def test_what_is_wrong_with_a_folder_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Engine, "load", load)
    text, old, shared, link = (tmp_path / name for name in ("notes.txt", "old", "shared", "link"))
    text.write_text("Notes of mine that matter.")
    save_safetensors(old, {"a": mx.zeros(1)}, {"user.prompt_cache": "mlxqwen-prompt-cache-2"})
    before = old.read_bytes()
    shared.mkdir()
    shared.chmod(0o777)
    link.symlink_to(tmp_path)
    wrong: list[tuple[Path | str, str, str]] = [
        (text, "notes.txt: a file, expected a folder", "a folder of your own"),
        (old, "a prompt cache of an earlier version, which was a file", "Remove the file, or give another name"),
        (shared, "others may write to it", "chmod 700"),
        (link, "a link, expected a folder", "it leads to"),
        (tmp_path / "nowhere" / "cache", "there is no folder", "Make it first"),
        (tmp_path / ("long" * 100), "cannot be written to", "another name"),
        (tmp_path / os.fsdecode(b"\xff"), "--prompt-cache: found bytes that are not UTF-8", ""),
        ("", "found an empty name", "a folder of your own"),
    ]
    for path, problem, hint in wrong:
        for command in ("generate", "chat"):
            result = run(command, *([OTHER] if command == "generate" else []), "--prompt-cache", str(path))
            assert_error(result, problem, hint)
    assert (text.read_text(), old.read_bytes()) == ("Notes of mine that matter.", before)


def test_a_file_that_the_last_version_wrote_is_told_as_such() -> None:
    """`data/old_prompt_cache.safetensors` is one that its `--prompt-cache FILE` made."""
    old = Path(__file__).parent / "data" / "old_prompt_cache.safetensors"
    before = old.read_bytes()
    for command in (("generate", QUESTION), ("chat",)):
        assert_error(
            run(*command, "--prompt-cache", str(old)),
            "a prompt cache of an earlier version, which was a file; expected a folder",
            "Remove the file, or give another name: what it holds is read anew.",
        )
    assert old.read_bytes() == before


@pytest.mark.parametrize("size", ["0", "-5", "-1GB", "huge", "", "1e9", "0.0000001KB", "2 parsecs"])
@pytest.mark.parametrize("command", [("generate", OTHER), ("chat",)], ids=lambda command: command[0])
def test_what_is_no_size_is_refused_before_the_model_is_loaded(
    command: tuple[str, ...], size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "load", None)
    refused = run(*command, "--prefix-cache", size)
    assert_error(
        refused,
        f"--prefix-cache: found {size!r}, expected a size above 0 in B, KB, MB, GB or TB",
        '"512MB", "2GB" or "off"',
    )


def test_a_size_beyond_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "load", None)
    refused = run("generate", OTHER, "--prefix-cache", "900TB")
    assert_error(refused, "--prefix-cache: found 900TB, expected at most the ", '"2GB", or "off"')


def test_the_help_tells_both_options() -> None:
    for command in ("generate", "chat"):
        told = " ".join(run(command, "--help").out.split())
        assert "--prompt-cache FOLDER Keep what was read of prompts and replies in this folder" in told
        assert "--prefix-cache SIZE Memory for what was read" in told


# Runs that end early


def failing_after_an_event(failure: BaseException) -> Any:
    stream = Engine.stream

    def failing(self: Engine, *args: Any, **options: Any) -> Iterator[Any]:
        events = stream(self, *args, **options)
        yield next(events)
        raise failure

    return failing


@pytest.mark.parametrize(
    ("failure", "status"),
    [(GenerationError("logits: found NaN"), 1), (KeyboardInterrupt(), 130)],
    ids=["NaN", "Ctrl-C"],
)
def test_what_a_run_has_read_is_kept_however_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, status: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "stream", failing_after_an_event(failure))
        assert run("generate", QUESTION, *BRIEF, "--prompt-cache", str(folder)).status == status
    counts = usage(QUESTION, folder=folder)
    assert counts["cached_tokens"] == whole_blocks(counts["prompt_tokens"])


def test_of_a_prompt_that_was_not_read_to_its_end_the_part_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxqwen.cli.terminal import PrefillProgress

    def interrupt(self: PrefillProgress, done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrefillProgress, "__call__", interrupt)
        result = run("generate", QUESTION, *BRIEF, "--prefill-chunk", "20", "--prompt-cache", str(folder))
        assert result.status == 130
    assert usage(QUESTION, folder=folder)["cached_tokens"] == BLOCK
    assert generate(QUESTION, folder=folder).out == run("generate", QUESTION, *BRIEF).out


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError()], ids=["Ctrl-C", "memory"])
def test_a_chat_that_is_ended_by_something_else_keeps_what_was_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    handle = ChatSession.handle

    def failing(self: ChatSession, text: str) -> bool:
        if text == OTHER:
            raise failure
        return handle(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(ChatSession, "handle", failing)
        ended = chat(QUESTION, OTHER, folder=folder)
        assert ended.status == {KeyboardInterrupt: 130, MemoryError: 1}[type(failure)]
    assert "of them from the cache, " in chat(QUESTION, folder=folder).err


def test_a_disk_that_is_full_is_noted_once_and_the_answer_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: DiskTier, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskTier, "_write_file", write)
    result = run("generate", QUESTION, *BRIEF, "--prompt-cache", str(folder))
    assert result.status == 0
    assert result.err.count("No space left on device") == 1
    assert result.out == run("generate", QUESTION, *BRIEF).out
    assert os.listdir(folder) == []


def test_a_run_that_is_killed_leaves_a_folder_that_serves(tmp_path: Path, folder: Path) -> None:
    """However far it came: its files are whole, and the next run answers as without it."""
    expected = run("generate", QUESTION, *BRIEF).out
    lines = tmp_path / "lines"
    for round_number in range(2):
        texts = [f"{round_number}{n:02}. {QUESTION}" for n in range(20)]  # each has a file of its own
        lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        command = [sys.executable, "-m", "mlxqwen", "generate", "--batch", str(lines), *BRIEF, "--batch-size", "8"]
        out, there = tmp_path / f"out{round_number}", len(os.listdir(folder)) if folder.exists() else 0
        child = subprocess.Popen([*command, "--output", str(out), "--prompt-cache", str(folder)])
        while not (folder.exists() and len(os.listdir(folder)) > there + 3):
            assert child.poll() is None or len(os.listdir(folder)) > there + 3
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        result = generate(texts[0], folder=folder)
        assert "damaged" not in result.err
        assert "of them from the cache" in result.err
        assert generate(QUESTION, folder=folder).out == expected


def test_a_damaged_file_is_noted_removed_and_read_anew(folder: Path) -> None:
    expected = generate(QUESTION, folder=folder)
    (file,) = folder.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # of three blocks, the one in the middle
    file.write_bytes(data)
    again = generate(QUESTION, folder=folder)
    assert (again.out, again.err.count("is damaged")) == (expected.out, 1)
    whole = f", {2 * BLOCK} of them from the cache, "
    assert whole not in again.err
    assert whole in generate(QUESTION, folder=folder).err


# Chats


def chat(*lines: str, folder: Path) -> Result:
    typed = "".join(f"{line}\n" for line in lines).encode()
    return run("chat", *BRIEF, "--no-thinking", "--prompt-cache", str(folder), "--verbose", stdin=typed)


def cached_of(result: Result) -> list[int]:
    """Of each answer, the tokens that were not read."""
    told = [line for line in result.err.splitlines() if line.startswith("prompt: ")]
    return [int(line.split(", ")[1].split()[0]) if "of them from" in line else 0 for line in told]


def test_a_chat_goes_on_where_another_was(tmp_path: Path, folder: Path) -> None:
    saved = tmp_path / "chat.json"
    first = chat(QUESTION, OTHER, f"/save {saved}", folder=folder)
    assert first.status == 0
    assert cached_of(first)[0] == 0
    again = chat(QUESTION, OTHER, folder=folder)
    assert again.out == first.out
    assert cached_of(again)[0] > 0
    second = chat(f"/load {saved}", "Thanks.", folder=folder)
    assert cached_of(second)[-1] >= cached_of(again)[-1] > 0
    plain = run("chat", *BRIEF, "--no-thinking", stdin=f"/load {saved}\nThanks.\n".encode())
    assert second.out == plain.out
    third = chat("/clear", "Something else.", folder=folder)
    assert cached_of(third)[0] > 0


def test_a_chat_that_is_left_keeps_also_what_was_stopped_in(folder: Path) -> None:
    arguments = ("--no-thinking", "--max-tokens", "400", "--temperature", "2", "--prompt-cache", str(folder))
    question = "How many letters are there in each of these words?"
    chat = Chat(*arguments)
    try:
        chat.begin(question)
        chat.send(INTERRUPT)
        chat.rest()
        assert chat.end() == 0
    finally:
        chat.child.close(force=True)
    counts = json.loads(run("generate", question, "--json", *arguments).out)["usage"]
    assert counts["cached_tokens"] == whole_blocks(counts["prompt_tokens"]) > 0
