"""Names that users bring from other tools, and defaults of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mlxqwen.chat.reply import Delta
from mlxqwen.cli.generate import generate
from mlxqwen.cli.option_list import generate_options
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Event
from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import Result, run

DEMO = str(DEMO_FOLDER)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the engine is asked, instead of an answer."""
    asked: list[dict[str, Any]] = []

    def stream(self: Engine, messages: Any, **options: Any) -> Iterator[Event]:
        asked.append({"messages": list(messages), **options})
        yield Delta(reasoning="hm")
        yield Delta(content="so")

    monkeypatch.setattr(Engine, "stream", stream)
    return asked


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the user's defaults."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def write(text: str) -> Path:
        path = tmp_path / "mlxqwen" / "config.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


# Options


def parsed(*arguments: str) -> dict[str, Any]:
    return generate.make_context("generate", list(arguments), help_option_names=["-h", "--help"]).params


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["-m", "x", "-s", "y"], ["--model", "x", "--system", "y"]),
        (["--system-prompt", "y"], ["--system", "y"]),
        (["--temp", "0.5"], ["--temperature", "0.5"]),
        (["--max-new-tokens", "5"], ["--max-tokens", "5"]),
        (["--num-predict", "5"], ["--max-tokens", "5"]),
        (["--draft-model", "x", "--num-draft-tokens", "3"], ["--draft", "x", "--draft-tokens", "3"]),
        (["--ignore-chat-template"], ["--raw"]),
        (["--think"], ["--thinking"]),
        (["--no-think"], ["--no-thinking"]),
        (["-q"], ["--quiet"]),
    ],
)
def test_other_names_are_the_same_options(given: list[str], meant: list[str]) -> None:
    assert parsed(*given) == parsed(*meant)


def test_a_prompt_may_be_an_option(seen: list[dict[str, Any]]) -> None:
    for arguments in (["--prompt", "a"], ["-p", "a"], ["a"]):
        run("generate", *arguments)
        assert seen.pop()["messages"] == [{"role": "user", "content": "a"}]
    run("generate", "--prompt", "-", stdin=b"b")
    assert seen.pop()["messages"] == [{"role": "user", "content": "b"}]
    assert run("generate", "--prompt", "a", "b").status == 2


def test_other_names_are_not_in_the_help() -> None:
    text = run("generate", "--help").out
    for name in ("--temp ", "--prompt ", "--draft-model", "--system-prompt", "--prompt-cache-file", "--max-new-tokens"):
        assert name not in text
    assert "-m, --model" in text


def test_the_help_is_in_groups_and_everyday_options_first() -> None:
    lines = run("generate", "--help").out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ") and line != "Usage:"]
    assert headings == ["Input:", "Thinking:", "Sampling:", "Memory:", "Speed:", "Output:", "Other:"]
    first = {heading: lines[lines.index(heading) + 1].split()[0].rstrip(",") for heading in headings}
    assert [first[heading] for heading in headings[:3]] == ["-m", "--thinking", "--max-tokens"]
    grouped = [param for param in generate.params if isinstance(param, click.Option)]
    assert all(hasattr(param, "group") for param in grouped)
    assert generate_options is not None


def test_the_help_says_the_number_that_counts() -> None:
    from mlxqwen.engine.request import DEFAULT_MAX_TOKENS

    assert f"Longest answer; {DEFAULT_MAX_TOKENS} by default" in " ".join(run("generate", "--help").out.split())


def test_a_cache_file_of_mlx_lm_is_explained() -> None:
    for command in ("generate", "chat"):
        result = run(command, "--prompt-cache-file", "x")
        assert result.status == 2
        assert "a folder that serves all models and prompts: --prompt-cache FOLDER" in result.err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--tempp", "--temperature"),
        ("--draft-modl", "--draft"),
        ("--top_p", "--top-p"),
        ("--max-newtokens", "--max-tokens"),
    ],
)
def test_suggestions_know_the_other_names(given: str, meant: str) -> None:
    result = run("generate", "a", given, "1")
    assert result.status == 2
    assert f"{meant}'" in result.err


def test_quiet_prints_the_answer_alone(seen: list[dict[str, Any]], tmp_path: Path) -> None:
    assert run("generate", "a", "-q", on_terminal=True) == Result(0, "so\n", "")
    assert run("generate", "a", "-q", "--verbose").status == 2
    cut = run("generate", "Hello", "--max-tokens", "1", "--quiet")
    assert cut.err == ""
    assert run("convert", DEMO, str(tmp_path / "out"), "-q", "--no-verify") == Result(0, "", "")
    assert (tmp_path / "out" / "config.json").exists()
    error = run("convert", DEMO, str(tmp_path / "out"), "-q")
    assert (error.status, error.out) == (1, "")
    assert error.err.startswith("error: ")


def test_version() -> None:
    assert run("-V") == run("--version")


# Commands


@pytest.mark.parametrize(
    ("words", "way"),
    [
        (["qwen3:4b"], "mlxqwen chat qwen3:4b"),
        (["Qwen/Qwen3-4B"], "mlxqwen generate --model Qwen/Qwen3-4B TEXT"),
        ([DEMO], f"mlxqwen chat {DEMO}"),
        (["How are you?"], "mlxqwen generate 'How are you?'"),
        (["genrate"], "Did you mean 'generate'?"),
        (["run", "qwen3:4b"], "Did you mean 'chat'?"),
        (["hello"], "mlxqwen chat MODEL"),
        (["push", "me/mine"], "Did you mean 'convert'?"),
        (["ps"], "A server tells at /v1/models which models are loaded."),
        (["stop", "qwen3:4b"], "Ctrl-C ends a server"),
    ],
)
def test_what_is_no_command_points_the_way(words: list[str], way: str) -> None:
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"error: No such command {words[0]!r}. ")
    assert way in result.err


def test_help_is_a_command_too() -> None:
    assert run("help") == run("--help")
    assert run("help", "generate") == run("generate", "--help")
    assert run("help", "genrate").status == 2


# Conversions


def test_a_conversion_is_named_after_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Little-FP8").symlink_to(DEMO_FOLDER)
    names = []
    for options in (["--q-bits", "8"], ["--bits", "16", "--dtype", "float16"], []):
        result = run("convert", "Little-FP8", *options, "--dry-run", "--json")
        names.append(result.err.splitlines()[0])
    expected = ["Little-8bit", "Little-fp16", "Little-4bit"]
    assert names == [f"note: no OUTPUT was given: {name}" for name in expected]
    assert run("convert", "--hf-path", DEMO, "--mlx-path", "out", "--q-group-size", "32", "--no-verify").status == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (written["bits"], written["group_size"]) == (4, 32)
    assert run("convert", DEMO, "--hf-path", DEMO).status == 2
    assert run("convert").status == 2
    assert run("convert", DEMO, "--no-verify").status == 0
    assert (tmp_path / "demo-4bit" / "config.json").exists()
    again = run("convert", DEMO, "--no-verify")
    assert (again.status, "demo-4bit" in again.err) == (1, True)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--Qwen--Qwen3-4B-FP8/snapshots/abc", "Qwen3-4B-4bit"),
        ("models--Qwen--Qwen3-30B-A3B-GPTQ-Int4/snapshots/abc", "Qwen3-30B-A3B-4bit"),
        ("Qwen3-0.6B-MLX-bf16", "Qwen3-0.6B-4bit"),
        ("mine.w4a16", "mine-4bit"),
        ("fp8", "fp8-4bit"),
    ],
)
def test_the_old_form_is_left_out_of_the_name(folder: str, name: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from mlxqwen_convert.output_name import output_name
    from mlxqwen_convert.plan import Options, make_plan

    assert output_name(replace(make_plan(DEMO_FOLDER, Options(bits=4)), folder=tmp_path / folder)) == name


# Defaults


def test_the_model_of_the_environment(monkeypatch: pytest.MonkeyPatch, config: Callable[[str], Path]) -> None:
    config('model = "/not/this"')
    monkeypatch.setenv("MLXQWEN_MODEL", "/of/environment")
    for command in (["generate", "a"], ["chat"], ["info"], ["bench"]):
        assert "/of/environment: no such folder" in run(*command).err
    assert "/of/option: no such folder" in run("generate", "a", "-m", "/of/option").err
    assert "/of/argument: no such folder" in run("info", "/of/argument").err


def test_defaults_of_the_file(seen: list[dict[str, Any]], config: Callable[[str], Path]) -> None:
    path = config(
        'temperature = 0.5\nmax-tokens = 7\nstop = "x"\nthinking = false\n'
        "[chat]\nhistory = false\n[generate]\nkv_bits = 8\n"
    )
    result = run("generate", "a", "--verbose", "--max-tokens", "9")
    asked = seen.pop()
    assert (asked["sampling"], asked["max_tokens"], asked["stop"]) == (
        {"temperature": 0.5, "seed": asked["sampling"]["seed"]},
        9,
        ("x",),
    )
    assert (asked["thinking"], asked["kv_bits"]) == (False, 8)
    assert f"default: --temperature 0.5 by {path}\n" in result.err
    assert "default: --max-tokens" not in result.err
    assert run("info").status == 0


def test_the_command_line_is_not_contradicted(seen: list[dict[str, Any]], config: Callable[[str], Path]) -> None:
    config('thinking = false\nsystem = "Be brief."\nverbose = true')
    assert run("generate", "a", "--thinking-budget", "5", "-q").status == 0
    asked = seen.pop()
    assert (asked["thinking"], asked["thinking_budget"]) == (None, 5)
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert run("generate", "a", "--raw", "--max-tokens", "1").status == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = ", ["not TOML"]),
        ("\0", ["not TOML"]),
        ("x" * 70_000, ["not TOML", "more than"]),
        ("temprature = 1", ["found temprature", "temperature"]),
        ('prompt = "a"', ["found prompt"]),
        ("trust-special-tokens = true", ["found trust-special-tokens"]),
        ("[generat]\nx = 1", ["found [generat]", "generate"]),
        ("[generate]\nport = 1", ["found port in [generate]"]),
    ],
)
def test_a_wrong_file_is_told(text: str, words: list[str], config: Callable[[str], Path]) -> None:
    path = config(text)
    result = run("generate", "a")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {path}: ")
    assert all(word in result.err for word in words)


@pytest.mark.parametrize(
    ("text", "command", "message"),
    [
        ('temperature = "warm"', ["generate", "a"], "temperature: 'warm' is not a valid float"),
        ("temperature = 300", ["generate", "a"], "temperature: found 300.0, expected a number"),
        ("temperature = [1]", ["generate", "a"], "temperature: found list, expected text"),
        ("model = 3", ["info"], "model: found 3, expected text"),
        ("model = true", ["generate", "a"], "model: found true, expected text"),
        ("[chat]\nsystem = 1.5", ["chat"], "system: found 1.5, expected text"),
        ("stop = ['a', 1]", ["generate", "a"], "stop: found 1, expected text"),
        ("max-tokens = 5.5", ["generate", "a"], "max-tokens: found 5.5, expected a whole number"),
        ("max-tokens = true", ["generate", "a"], "max-tokens: found true, expected a whole number"),
        ("temperature = false", ["generate", "a"], "temperature: found false, expected a number"),
        ("thinking = 1", ["generate", "a"], "thinking: found 1, expected true or false"),
        ("verbose = 'loud'", ["generate", "a"], "verbose: 'loud' is not a valid boolean"),
        ("kv-bits = true", ["generate", "a"], "kv-bits: found true, expected one of 8, 4"),
        ("dtype = 16", ["info"], "dtype: found 16, expected one of bfloat16, float16, float32, as text"),
        ("prompt-cache = 3", ["generate", "a"], "prompt-cache: found 3, expected text"),
        ("rope-scaling = 4", ["generate", "a"], "rope-scaling: found 4, expected text"),
        ("prefix-cache = false", ["generate", "a"], "prefix-cache: found false, expected a number or text"),
        ("[generate]\nmax-tokens = 1979-01-01", ["generate", "a"], "max-tokens: found date, expected text"),
        ('model = "/nope"', ["info"], "model: /nope: no such folder"),
        ("[serve]\nport = 99999", ["serve"], "port: found 99999"),
    ],
)
def test_a_wrong_value_of_the_file_is_told(
    text: str, command: list[str], message: str, config: Callable[[str], Path]
) -> None:
    path = config(text)
    result = run(*command)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {path}: {message}")


def test_a_default_that_does_not_go_with_others_is_told(config: Callable[[str], Path]) -> None:
    path = config("kv-keep = 3")
    result = run("generate", "a")
    assert result.status == 2
    assert f"--kv-keep is set by {path}: kv-keep." in result.err
    assert str(path) not in run("generate", "a", "--kv-keep", "2").err


def test_a_wrong_model_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQWEN_MODEL", "/of/environment")
    assert run("generate", "a").err.startswith("error: MLXQWEN_MODEL: /of/environment: no such folder")
    assert run("generate", "a", "-m", "/of/option").err.startswith("error: /of/option: no such folder")


@pytest.mark.parametrize(
    ("key", "meant"), [("temprature", "temperature"), ("num-predict", "max-tokens"), ("as-json", "json")]
)
def test_a_key_that_is_spelled_otherwise_is_suggested(key: str, meant: str, config: Callable[[str], Path]) -> None:
    path = config(f"{key} = 1")
    result = run("generate", "a")
    assert result.status == 1
    assert result.err == f"error: {path}: found {key}, which is no setting\n       Did you mean {meant}?\n"


def test_the_model_may_be_an_option_of_every_command(config: Callable[[str], Path]) -> None:
    config("")
    for command in ("serve", "info", "bench", "convert"):
        for flag in ("--model", "-m"):
            assert run(command, flag, "/nope").err.startswith("error: /nope: no such folder")
        if command != "serve":  # which takes several models
            both = run(command, "/a", "--model", "/b")
            assert (both.status, "or --model, not both" in both.err) == (2, True)


def test_a_folder_beside_the_model_of_a_chat_is_no_message(tmp_path: Path) -> None:
    result = run("chat", "--model", DEMO, str(tmp_path))
    assert result.status == 2
    assert f"'{tmp_path}' is a folder, expected a message" in result.err


def test_a_factor_of_yarn_names_its_option() -> None:
    result = run("generate", "a", "--yarn-factor", "0.5")
    assert (result.status, result.err) == (1, "error: --yarn-factor: found 0.5, expected a number in [1, 1024]\n")


@pytest.mark.parametrize(("spelled", "dtype"), [("auto", "float32"), ("half", "float16"), ("float", "float32")])
def test_dtypes_as_vllm_spells_them(spelled: str, dtype: str) -> None:
    assert json.loads(run("info", "--dtype", spelled, "--json").out)["dtype"] == dtype
