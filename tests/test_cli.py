"""`mlxqwen generate`: options, streams, exit codes, and one clear error for bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest

from mlxqwen import __version__
from mlxqwen.chat.reply import Delta
from mlxqwen.cli.commands import _COMMANDS, mlxqwen
from mlxqwen.engine.engine import Done, Engine
from mlxqwen.errors import GenerationError
from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import Result, run

LONG = "How many r's in strawberry? " * 45
OPTIONS = """
    --model --revision --system --prompt-file --thinking --no-thinking --raw --max-tokens --temperature --top-p --top-k
    --min-p --presence-penalty --frequency-penalty --repetition-penalty --seed --stop --max-kv-size --kv-keep --kv-bits
    --prefill-chunk --yarn-factor --yarn --rope-scaling --dtype --force --ignore-adapter --json --verbose --messages
    --tools --batch --output --batch-size --drop-oldest --thinking-budget --early-stop-text --stop-on-loop
    --trust-special-tokens
    --speculative --draft --draft-tokens --prompt-cache --prefix-cache --quiet --json-schema -m -s -q
"""

DEMO = str(DEMO_FOLDER)
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A copy of the demo model; keyword arguments replace values of its `config.json`."""

    def make(**config: Any) -> Path:
        copy = tmp_path / "model"
        shutil.copytree(DEMO_FOLDER, copy)
        values = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**values, **config}))
        return copy

    return make


def replies(monkeypatch: pytest.MonkeyPatch, *events: Delta | BaseException) -> None:
    """Let the model say `events`, whatever it is asked; an exception among them is raised."""

    def stream(self: Engine, *args: object, **options: object) -> Iterator[Delta]:
        for event in events:
            if isinstance(event, BaseException):
                raise event
            yield event

    monkeypatch.setattr(Engine, "stream", stream)


def assert_error(result: Result, *words: str, status: int = 1) -> None:
    """One line of error, perhaps a hint, nothing else; and nothing that steers a terminal."""
    assert result.status == status, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert all(line.startswith("       ") for line in lines[1:])
    assert all(line.isprintable() for line in lines)
    for word in words:
        assert word in result.err


# Answers


def test_answer_on_stdout_reasoning_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch, Delta(reasoning="so"), Delta(reasoning=" so"), Delta(content="It is"), Delta(content=" 3."))
    assert run("generate", "hello") == Result(0, "It is 3.\n", "so so\n")


def test_demo_answers() -> None:
    result = run("generate", "How many r's in strawberry?", "--seed", "1")
    assert result.status == 0
    assert result.out.strip()
    assert result.err.strip()
    assert "\x1b" not in result.err


def test_no_thinking_leaves_stderr_empty() -> None:
    result = run("generate", "How many r's in strawberry?", "--no-thinking")
    assert (result.status, result.err) == (0, "")
    assert result.out


def test_an_answer_cut_off_says_so() -> None:
    result = run("generate", "How many r's in strawberry?", "--max-tokens", "5", "--temperature", "0")
    assert (result.status, result.out) == (0, "")
    note = "note: stopped after 5 tokens, before the answer: raise --max-tokens\n"
    assert result.err.endswith(f"\n{note}")
    raw = ["generate", "<think>\nSpell it and count", "--raw", "--temperature", "0", "--max-tokens", "5"]
    assert run(*raw).err == note.replace("before", "in the middle of")
    assert run(*raw, "--json").err == ""


def test_a_byte_order_mark_is_no_text() -> None:
    plain, marked = (run("generate", "-", "--seed", "3", stdin=start + b"12 + 39?") for start in (b"", b"\xef\xbb\xbf"))
    assert plain == marked


def test_a_prompt_that_begins_with_a_dash() -> None:
    assert_error(run("generate", "-5 + 3?"), "Put -- before a prompt that begins with a dash", status=2)
    assert run("generate", "--max-tokens", "1", "--", "-5 + 3?").status == 0


def test_a_gguf_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    assert_error(run("generate", "hi", "--model", str(tmp_path)), "GGUF")


@pytest.mark.parametrize(
    "command", [["generate", "hi", "-m"], ["chat"], ["info"], ["bench"], ["convert"]], ids=" ".join
)
def test_gguf_is_named_everywhere(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path, what in ((tmp_path, "GGUF files (model.gguf)"), (tmp_path / "model.gguf", "a GGUF file")):
        assert_error(run(*command, str(path)), f"{path}: ", what, "safetensors, such as")


def test_a_web_address_is_no_model() -> None:
    assert_error(run("generate", "hi", "--model", "https://github.com/Qwen/Qwen3"), "web address", "Qwen/")


def test_json_is_one_object() -> None:
    result = run("generate", "What is 2 + 3?", "--json", "--seed", "1")
    said = json.loads(result.out)
    assert (result.status, result.err) == (0, "")
    assert result.out.count("\n") == 1
    answer = ["reasoning", "content", "tool_calls", "finish_reason", "usage", "timings", "stop_string"]
    assert list(said) == [*answer, "model", "seed"]
    assert (said["model"], said["seed"], said["stop_string"]) == ("the demo model", 1, None)
    assert all(len(f"{value:.10g}".strip("0.").replace(".", "")) <= 4 for value in said["timings"].values())
    assert said["finish_reason"] in ("stop", "length")
    assert said["usage"]["completion_tokens"] > said["usage"]["reasoning_tokens"]
    assert said["timings"]["decode_seconds"] > 0


def test_a_seed_that_was_drawn_draws_the_same_again() -> None:
    options = ("What is 2 + 3?", "--temperature", "2", "--max-tokens", "20", "--json")
    first = json.loads(run("generate", *options).out)
    told = run("generate", *options, "--verbose", "--seed", str(first["seed"]))
    again = json.loads(told.out)
    assert (again["content"], again["reasoning"]) == (first["content"], first["reasoning"])
    assert f"seed {first['seed']}" in told.err
    drawn = run("generate", *options, "--verbose")
    assert f"seed {json.loads(drawn.out)['seed']}" in drawn.err
    assert json.loads(drawn.out)["seed"] != first["seed"]


def test_the_string_that_ended_an_answer_is_told() -> None:
    whole = json.loads(run("generate", "What is 2 + 3?", "--temperature", "0", "--no-thinking", "--json").out)
    stop = whole["content"][3:6]
    cut = run("generate", "What is 2 + 3?", "--temperature", "0", "--no-thinking", "--json", "--stop", stop, "-m", DEMO)
    assert json.loads(cut.out)["stop_string"] == stop
    assert json.loads(cut.out)["model"] == DEMO


def test_json_says_what_the_text_says() -> None:
    plain = run("generate", "What is 2 + 3?", "--seed", "5")
    said = json.loads(run("generate", "What is 2 + 3?", "--seed", "5", "--json").out)
    assert (plain.out, plain.err) == (said["content"] + "\n", (said["reasoning"] or "") + "\n")


def test_max_tokens_and_its_reason() -> None:
    said = json.loads(run("generate", "Hello", "--max-tokens", "3", "--json").out)
    assert said["finish_reason"] == "length"
    assert said["usage"]["completion_tokens"] == 3


def test_raw_knows_no_template() -> None:
    told = json.loads(run("generate", "Hello", "--json", "--max-tokens", "1").out)["usage"]["prompt_tokens"]
    said = json.loads(run("generate", "Hello", "--raw", "--json", "--max-tokens", "1").out)
    assert said["usage"]["prompt_tokens"] < told
    assert said["reasoning"] is None


def test_system_message_lengthens_the_prompt() -> None:
    counts = [
        json.loads(run("generate", "Hello", *more, "--json", "--max-tokens", "1").out)["usage"]["prompt_tokens"]
        for more in ((), ("--system", "Be brief."))
    ]
    assert counts[0] < counts[1]


def test_every_sampling_option_is_told_by_verbose() -> None:
    values = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.125,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "seed": 3,
    }
    arguments = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = run("generate", "Hello", "--max-tokens", "2", "--no-thinking", "--verbose", *arguments)
    for name, value in values.items():
        assert f"{name} {value}" in result.err
    assert "ended by length" in result.err
    assert result.status == 0


@pytest.mark.parametrize(("switch", "temperature"), [("--thinking", 0.6), ("--no-thinking", 0.7)])
def test_profile_of_the_mode(folder: Folder, switch: str, temperature: float) -> None:
    path = folder()
    (path / "generation_config.json").unlink()
    result = run("generate", "Hello", "--model", str(path), "--max-tokens", "1", "--verbose", switch)
    assert f"temperature {temperature}, top_k 20" in result.err


def test_verbose_tells_of_cache_scaling_and_dtype() -> None:
    window = ["--max-kv-size", "64", "--kv-keep", "8", "--kv-bits", "8", "--prefill-chunk", "16"]
    result = run(
        "generate", "Hello", "--max-tokens", "2", "--verbose", "--yarn-factor", "2", "--dtype", "bfloat16", *window
    )
    assert result.status == 0
    first = result.err.splitlines()[0]
    assert first == "context 1,024, window 64 with 8 kept, 8-bit cache, YaRN factor 2, dtype bfloat16"


def test_rope_scaling_as_in_config() -> None:
    scaling = json.dumps({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    result = run("generate", "Hello", "--max-tokens", "1", "--verbose", "--rope-scaling", scaling)
    assert result.err.startswith("context 1,024, YaRN factor 4,")


def test_seed_repeats_itself() -> None:
    first, second = (run("generate", "Hello", "--seed", "7", "--temperature", "2") for _ in range(2))
    assert first == second


def test_stop_ends_before_its_text() -> None:
    whole = run("generate", "What is 2 + 3?", "--temperature", "0").out.strip()
    middle = whole[len(whole) // 2 :][:2]
    cut = run("generate", "What is 2 + 3?", "--temperature", "0", "--stop", middle)
    # the text may come up in the reasoning as well, and ends the reply there
    assert cut.status == 0
    assert middle not in cut.out
    assert whole.startswith(cut.out.strip())


@pytest.mark.parametrize("on_terminal", [False, True])
def test_no_command_prints_the_help(on_terminal: bool) -> None:
    asked = run("--help", on_terminal=on_terminal)
    assert (asked.status, asked.err) == (0, "")
    assert run(on_terminal=on_terminal) == Result(2, "", asked.out)


# Prompts


def prompt_tokens(*arguments: str, stdin: bytes | None = b"") -> int:
    result = run("generate", *arguments, "--json", "--max-tokens", "1", stdin=stdin)
    assert result.status == 0, result
    return int(json.loads(result.out)["usage"]["prompt_tokens"])


def test_all_ways_to_say_a_prompt_are_one(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("Grüße, 世界!\n".encode())
    told = prompt_tokens("Grüße, 世界!", stdin=None)
    assert prompt_tokens("--prompt-file", str(file), stdin=None) == told
    assert prompt_tokens("-", stdin=file.read_bytes()) == told
    assert prompt_tokens(stdin=file.read_bytes()) == told
    assert prompt_tokens("--raw", "-", stdin=b"ab\n") == prompt_tokens("--raw", "ab\n") != prompt_tokens("--raw", "ab")


def test_prompt_longer_than_the_context_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.engine.prefill.Prefill.read", lambda *arguments: pytest.fail("prefilled"))
    tokens = prompt_tokens_of(LONG)
    assert_error(run("generate", LONG), f"{tokens:,} tokens", "context of 512", "--yarn-factor", "--max-kv-size")


def prompt_tokens_of(text: str) -> int:
    engine = Engine.load()
    return len(engine.prompt([{"role": "user", "content": text}]))


def test_ways_out_of_a_long_prompt() -> None:
    tokens = prompt_tokens_of(LONG)
    assert prompt_tokens(LONG, "--max-kv-size", "64") == tokens
    assert prompt_tokens(LONG, "--yarn-factor", "2") == tokens


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "no text"),
        (["  \n\t "], "no text"),
        (["a\udcff"], "prompt: not-utf8"),
        (["hi", "--system", "\udcff"], "system"),
        (["hi", "--model", "/\udcff"], "model"),
        (["hi", "--stop", "\udcff"], "stop"),
        (["hi", "--temperature", "nan"], "temperature"),
        (["hi", "--temperature", "-1"], "temperature"),
        (["hi", "--temperature", "inf"], "temperature"),
        (["hi", "--top-p", "1.5"], "--top-p: found"),
        (["hi", "--top-p", "nan"], "--top-p: found"),
        (["hi", "--top-k", "-2"], "--top-k: found"),
        (["hi", "--min-p", "2"], "--min-p: found"),
        (["hi", "--presence-penalty", "3"], "--presence-penalty: found"),
        (["hi", "--frequency-penalty", "nan"], "--frequency-penalty: found"),
        (["hi", "--repetition-penalty", "0"], "--repetition-penalty: found"),
        (["hi", "--seed", "-1"], "seed"),
        (["hi", "--seed", "9" * 40], "seed"),
        (["hi", "--stop", ""], "stop"),
        (["hi", "--max-tokens", "0"], "--max-tokens: found"),
        (["hi", "--prefill-chunk", "0"], "--prefill-chunk: found"),
        (["hi", "--max-kv-size", "4", "--kv-keep", "4"], "--max-kv-size: found"),
        (["hi", "--max-kv-size", "0"], "--max-kv-size: found"),
        (["hi", "--max-kv-size", "9" * 30], "--max-kv-size: found"),
        (["hi", "--max-kv-size", "9", "--kv-keep", "-1"], "--kv-keep: found -1"),
        (["hi", "--yarn-factor", "nan"], "factor"),
        (["hi", "--yarn-factor", "0.5"], "factor"),
        (["hi", "--rope-scaling", "{"], "not JSON"),
        (["hi", "--rope-scaling", "[" * 100_000], "not JSON"),
        (["hi", "--rope-scaling", "[1]"], "expected a JSON object"),
        (["hi", "--rope-scaling", '{"rope_type": "llama3", "factor": 2}'], "llama3"),
        (["hi", "--rope-scaling", '{"rope_type": "yarn", "factor": NaN}'], "NaN"),
        (["hi", "--model", "/no/such/folder"], "no such folder"),
        (["hi", "--model", __file__], "a file"),
        (["hi", "--model", "not a name"], "neither"),
        (["hi", "--model", "\x1b]0;title\x07"], "\\x1b"),
        (["hi", "--revision", "main"], "demo"),
    ],
)
def test_bad_values(arguments: list[str], words: str) -> None:
    assert_error(run("generate", *arguments), *words.removesuffix("not-utf8").split("  "))


@pytest.mark.parametrize(
    "arguments",
    [
        ["answer"],
        ["generate", "hi", "--no-such-option"],
        ["generate", "hi", "--\x1b[31m"],
        ["generate", "hi", "--kv-bits", "3"],
        ["generate", "hi", "--dtype", "int8"],
        ["generate", "hi", "--temperature", "warm"],
        ["generate", "hi", "--max-tokens", "1e3"],
        ["generate", "hi", "there"],
        ["generate", "hi", "--prompt-file", __file__],
        ["generate", "--prompt-file", "/no/such/file"],
        ["generate", "--prompt-file", "/"],
        ["generate", "hi", "--kv-keep", "2"],
        ["generate", "hi", "--rope-scaling", '{"rope_type": "yarn", "factor": 2}', "--yarn-factor", "2"],
        ["serve", "--draft", DEMO, "--speculative", "lookup"],
        ["serve", "--draft-tokens", "3"],
        ["generate", "hi", "--raw", "--system", "x"],
        ["generate", "hi", "--raw", "--thinking"],
        ["generate"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert_error(run(*arguments, stdin=None), "--help'.", status=2)


@pytest.mark.parametrize(("typed", "meant"), [("convrt", "convert"), ("generat", "generate"), ("infos", "info")])
def test_a_misspelt_command(typed: str, meant: str) -> None:
    assert_error(run(typed, "x"), f"No such command '{typed}'. Did you mean '{meant}'?", status=2)


def test_an_option_before_the_command_is_told_where_it_belongs() -> None:
    said = "before a command: a command's options stand behind it, as in mlxqwen generate --model …."
    assert_error(run("--model", "x", "generate", "Hello"), f"No such option '--model' {said}", status=2)
    assert_error(run("--vesion"), "No such option '--vesion'. Did you mean '--version'?", status=2)


def test_only_commands_with_a_prompt_tell_of_dashes() -> None:
    assert "--" in run("generate", "--modle", "x").err.partition("Put ")[2]
    assert "prompt" not in run("convert", "a", "b", "--bit", "4").err


def test_an_option_without_its_value_is_told_of_by_its_command() -> None:
    assert_error(run("generate", "--seed"), "'--seed' requires an argument", "Try 'mlxqwen generate --help'.", status=2)


def test_the_list_of_commands_is_not_cut_short() -> None:
    listed = " ".join(run("--help").out.partition("Commands:")[2].split())
    assert "..." not in listed
    assert "into OUTPUT, a folder that MLX's loaders read." in listed


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "-"]])
@pytest.mark.parametrize(("data", "word"), [(b"", "no text"), (b" \n", "no text"), (b"ab\xff", "byte 0xff at 2")])
def test_bad_stdin(arguments: list[str], data: bytes, word: str) -> None:
    assert_error(run(*arguments, stdin=data), word)


def test_prompt_file_too_large(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * 1024 * 1024 + 1)
    assert_error(run("generate", "--prompt-file", str(tmp_path / "large")), "large", "67,108,864 bytes")


def gguf(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"GGUF" + bytes(100))


def truncated(path: Path) -> None:
    os.truncate(path / "model.safetensors", 1_000_000)


def looping_template(path: Path) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (path / "chat_template.jinja").write_text(loop)


def unknown_format(path: Path) -> None:
    as_codes(path / "model.safetensors")
    edit(path / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def as_codes(path: Path) -> None:
    """Call the first tensor's dtype one of codes."""
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"I16" ', 1))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (gguf, "GGUF"),
        (truncated, "model.safetensors"),
        (looping_template, "template"),
        (unknown_format, "bitsandbytes"),
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "config.json").write_text("{"), "config.json"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda path: (path / "tokenizer.json").write_text('{"model": 1}'), "tokenizer.json"),
        (lambda path: (path / "chat_template.jinja").write_text("{% if %}"), "template"),
        (lambda path: (path / "chat_template.jinja").write_text(""), "the chat template renders no text"),
        (lambda path: (path / "chat_template.jinja").unlink(), "--raw"),
        (lambda path: edit(path / "config.json", num_hidden_layers=5), "model.layers.4."),
    ],
)
def test_bad_folders(folder: Folder, damage: Callable[[Path], object], word: str) -> None:
    path = folder()
    damage(path)
    assert_error(run("generate", "hi", "--model", str(path)), word)


def test_junk_generation_config_is_a_note(folder: Folder) -> None:
    path = folder()
    (path / "generation_config.json").write_text('{"temperature": "\x07hot"')
    result = run("generate", "hi", "--no-thinking", "--max-tokens", "1", "--model", str(path))
    assert result.status == 0
    first, cut_off = result.err.splitlines()
    assert first.startswith("note: ")
    assert "generation_config.json" in first
    assert "--max-tokens" in cut_off


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = started("generate", "hi", "--model", "Qwen/Qwen3-0.6B", env=environment)
    assert_error(Result(result.returncode, result.stdout, result.stderr), "HF_HUB_OFFLINE")


def test_error_in_the_middle_begins_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch, Delta(content="It is"), GenerationError("logits: found NaN"))
    assert run("generate", "hi") == Result(1, "It is\n", "error: logits: found NaN\n")
    replies(monkeypatch, Delta(reasoning="so"), GenerationError("logits: found NaN"))
    assert run("generate", "hi") == Result(1, "", "so\nerror: logits: found NaN\n")
    assert run("generate", "hi", "--json").out == ""


def test_memory_error_has_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("[malloc] Unable to allocate 123 bytes.")):
        replies(monkeypatch, error)
        assert_error(run("generate", "hi"), "out of memory", "--kv-bits")
    replies(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run("generate", "hi")


def prefilling(monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    """Let an answer fail in the midst of its prompt."""

    def stream(self: Engine, *args: object, on_prefill: Callable[[int, int], None], **options: object) -> NoReturn:
        on_prefill(0, 2048)
        on_prefill(512, 2048)
        raise end

    monkeypatch.setattr(Engine, "stream", stream)


PROGRESS = "\rReading the prompt: 0 of 2,048 tokens\rReading the prompt: 512 of 2,048 tokens\r\x1b[K"


@pytest.mark.parametrize("error", [GenerationError("logits: found NaN"), MemoryError()])
def test_error_while_prefilling_wipes_the_progress(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    prefilling(monkeypatch, error)
    result = run("generate", "hi", on_terminal=True)
    assert result.err.startswith(PROGRESS + "error: ")
    assert "Reading" not in run("generate", "hi").err


def test_interrupt_while_prefilling_wipes_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    prefilling(monkeypatch, KeyboardInterrupt())
    assert run("generate", "hi", on_terminal=True) == Result(130, "", PROGRESS + "\n")


# Interrupts


def test_interrupt_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch, Delta(reasoning="so"), Delta(content="It is"), KeyboardInterrupt())
    assert run("generate", "hi") == Result(130, "It is\n", "so\n")
    result = run("generate", "hi", "--json", "--seed", "3")
    assert (result.status, result.err) == (130, "")
    assert json.loads(result.out) == {
        "reasoning": "so",
        "content": "It is",
        "tool_calls": [],
        "finish_reason": "interrupted",
        "usage": None,
        "timings": None,
        "stop_string": None,
        "model": "the demo model",
        "seed": 3,
    }


def test_interrupt_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxqwen.engine.loading.prepare_model", interrupted)
    assert run("generate", "hi") == Result(130, "", "")
    assert run("generate", "hi", on_terminal=True) == Result(130, "", "\n")  # the shell's prompt after ^C
    assert json.loads(run("generate", "hi", "--json").out)["content"] == ""


# Terminals and encodings

NASTY = "a\x1b[2Jb\x07\x9b31mc\rd\x7f\x00\te\n👩‍💻 你好 \u202eabc\u202c\u2066d\u2069e\xadf"


def test_escapes_are_neutralised_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch, Delta(reasoning=NASTY), Delta(content=NASTY))
    shown = "a\\x1b[2Jb\\x07\\x9b31mc\\x0dd\\x7f\\x00\te\n👩‍💻 你好 \\u202eabc\\u202c\\u2066d\\u2069e\\u00adf"
    result = run("generate", "hi", on_terminal=True)
    assert result.out == shown + "\n"
    assert "".join(result.err.split("\x1b[2m")).replace("\x1b[22m", "") == shown + "\n"


def test_pipes_get_the_text_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch, Delta(reasoning=NASTY), Delta(content=NASTY))
    assert run("generate", "hi") == Result(0, NASTY + "\n", NASTY + "\n")
    assert json.loads(run("generate", "hi", "--json").out)["content"] == NASTY


@pytest.mark.parametrize(
    ("name", "value", "dim"), [("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("TERM", "dumb", False)]
)
def test_reasoning_is_dim_on_a_terminal(monkeypatch: pytest.MonkeyPatch, name: str, value: str, dim: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    replies(monkeypatch, Delta(reasoning="so"), Delta(content="It is"))
    result = run("generate", "hi", on_terminal=True)
    assert result.out == "It is\n"
    assert result.err == ("\x1b[2mso\x1b[22m\n" if dim else "so\n")


def test_narrow_encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch, Delta(reasoning="想"), Delta(content="é你\u20ac"))
    assert run("generate", "你好", encoding="ascii") == Result(0, "???\n", "?\n")
    assert run("generate", "你好", encoding="latin-1").out == "é??\n"
    assert json.loads(run("generate", "你好", "--json", encoding="ascii").out)["content"] == "é你\u20ac"
    assert_error(run("generate", "hi", "--model", "./你好", encoding="ascii"), "\\u4f60")


# Processes


def started(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxqwen", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, timeout=60, check=False, **options
    )


def shell(script: str) -> subprocess.CompletedProcess[str]:
    script = script.replace("mlxqwen", f"'{sys.executable}' -m mlxqwen")
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mlxqwen.cli import main\n"
        "for arguments in (['--version'], ['--help'], ['generate', '--help'], ['info', '--help'], ['nonsense']):\n"
        "    sys.argv = ['mlxqwen', *arguments]\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "heavy = {'mlx', 'tokenizers', 'jinja2', 'huggingface_hub', 'numpy', 'asyncio', 'concurrent', 'email'}\n"
        "sys.exit(' '.join(heavy & {name.partition('.')[0] for name in sys.modules}) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr.count("error:")) == (0, 1), result.stderr
    assert __version__ in result.stdout


def test_the_list_of_commands_has_the_first_sentence_of_each() -> None:
    with click.Context(mlxqwen) as context:
        helps = {name: mlxqwen.get_command(context, name) for name in mlxqwen.list_commands(context)}
    sentences = {name: command.get_short_help_str(200) for name, command in helps.items() if command is not None}
    assert sentences == _COMMANDS


@pytest.mark.parametrize("arguments", ["--help", "--version", "generate --help", "2>&1"])
def test_help_into_a_closed_pipe_is_quiet(arguments: str) -> None:
    result = shell(f"(sleep 0.1; mlxqwen {arguments}) | true; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stdout, result.stderr) == (141, "", "")


def test_closed_pipe_is_quiet() -> None:
    # `true` has left long before the answer; a reader of one byte may leave after the last one is written
    result = shell("(sleep 0.1; mlxqwen generate --seed 1 --no-thinking '2 + 3?') | true; exit ${PIPESTATUS[0]}")
    assert (result.returncode, result.stdout, result.stderr) == (141, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "status"), [(">&-", 1), ("2>&-", 0), ("<&- >&- 2>&-", 1), (">/dev/full", 1), ("2>/dev/full", 1)]
)
def test_streams_that_cannot_be_used(redirection: str, status: int) -> None:
    result = shell(f"mlxqwen generate --seed 1 'What is 25 + 48?' {redirection}")
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


@pytest.mark.slow
def test_c_locale() -> None:
    result = shell("LC_ALL=C PYTHONIOENCODING=ascii mlxqwen generate 你好 --verbose")
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


# Help


def test_every_option_has_help() -> None:
    from mlxqwen.cli.generate import generate

    shown = [param for param in generate.params if not getattr(param, "hidden", False)]
    documented = {name for option in shown for name in (*option.opts, *option.secondary_opts)}
    assert documented == {*OPTIONS.split(), "prompt"}
    assert all(option.help for option in shown if isinstance(option, click.Option))


def test_documentation_is_current() -> None:
    from make_cli_docs import PATH, document

    assert PATH.read_text(encoding="utf-8") == document(), "run scripts/make_cli_docs.py"


def test_done_event_ends_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Done] = []
    original = Engine.stream

    def stream(self: Engine, *args: Any, **options: Any) -> Iterator[Delta | Done]:
        for event in original(self, *args, **options):
            if isinstance(event, Done):
                seen.append(event)
            yield event

    monkeypatch.setattr(Engine, "stream", stream)
    said = json.loads(run("generate", "What is 2 + 3?", "--json").out)
    assert [(done.reply.content, done.reply.reasoning) for done in seen] == [(said["content"], said["reasoning"])]
