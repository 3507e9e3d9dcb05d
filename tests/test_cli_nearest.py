"""What a misspelt word may have been meant as: options, commands, keys of the file with the user's defaults."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxqwen.cli.nearest import nearest
from tests.command_line import run


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("mode", ["node", "mode-l", "model"], ["model", "mode-l"]),  # begun is nearer than misspelt
        ("kv_bit", ["kv-keep", "kv-bits"], ["kv-bits"]),
        ("--TEM", ["system", "--temperature"], ["--temperature"]),
        ("tokens", ["trust-special-tokens", "max-tokens"], ["max-tokens", "trust-special-tokens"]),
        ("system-message", ["system", "stop"], ["system"]),
        ("foo", ["info", "force"], []),
        ("", ["info"], []),
        ("info", [], []),
    ],
)
def test_the_nearest_names_the_nearest_first(word: str, known: list[str], expected: list[str]) -> None:
    assert nearest(word, known) == expected


@pytest.mark.parametrize("known", [["alpha", "alphb", "beta"], ["gamma-ray", "gamma", "gammas"]])
def test_a_name_is_the_nearest_to_itself(known: list[str]) -> None:
    for name in known:
        assert nearest(name, known)[0] == name
        assert nearest(name, reversed(known)) == nearest(name, known)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--max-token", "5"], "Did you mean '--max-tokens'?"),
        (["generate", "--max", "5"], "Did you mean '--max-tokens' or '--max-kv-size'?"),
        (["generate", "--tem", "1"], "Did you mean '--temperature'?"),
        (["generate", "--no-thinkin"], "Did you mean '--no-thinking'?"),
        (["serve", "--ports", "1"], "Did you mean '--port'?"),
        (["serve", "--max-model-length", "1"], "Did you mean '--max-model-len'?"),
        (["info", "--modle", "x"], "Did you mean '--model'?"),
        (["cache", "prune", "--old", "5"], "Did you mean '--older-than'?"),
        (["convert", "--bit", "4"], "Did you mean '--bits'?"),
        (["generate", "--nothing-like-it"], "No such option '--nothing-like-it'."),
    ],
)
def test_options_that_may_have_been_meant(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.splitlines()[0].endswith(said)
    assert result.err.count("\n") == 2


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
    def write(text: bytes) -> Path:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        path = tmp_path / "mlxqwen" / "config.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "command", "problem", "hint"),
    [
        (
            b'a = 1\nmodel = "\xff"',
            "info",
            "not TOML: found byte 0xff in line 2, expected UTF-8 text",
            "Save it as UTF-8.",
        ),
        (b"a = " + b"[" * 5_000, "info", "not TOML: nested too deeply", 'A line is such as model = "qwen3:4b".'),
        (
            b"port = 1",
            "info",
            "found port, which is no setting there",
            "It is a setting of serve: put it below [serve].",
        ),
        (
            b"[generate]\ntokens = 1",
            "generate",
            "found tokens in [generate], which is no setting there",
            "It is a setting of bench: put it below [bench].",
        ),
        (b"prompt = 'a'", "info", "found prompt, which is no setting: it is given each time", "Remove it."),
        (
            b"[serve]\napi_key = 'a'",
            "serve",
            "found api_key in [serve], which is no setting: it is given each time, or by MLXQWEN_API_KEY",
            "Remove it.",
        ),
        (b"[server]\nport = 1", "info", "found [server], which is no command", "Did you mean [serve]?"),
    ],
)
def test_a_key_in_a_wrong_place_is_told_the_right_one(
    text: bytes, command: str, problem: str, hint: str, config: Callable[[bytes], Path]
) -> None:
    path = config(text)
    result = run(command, stdin=None)
    assert (result.status, result.out) == (1, "")
    assert result.err == f"error: {path}: {problem}\n       {hint}\n"


@pytest.mark.parametrize("text", [b"xyzzy = 1", b"[serve]\nxyzzy = 1", b"[xyzzy]\na = 1"])
def test_what_is_near_to_nothing_is_told_a_few_names(text: bytes, config: Callable[[bytes], Path]) -> None:
    config(text)
    result = run("serve")
    listed = re.search(r"(?:one of|name of a command:) ([\w, -]+) and \d+ more", result.err)
    assert listed is not None, result.err
    assert len(listed[1].split(", ")) == 8
    assert "Did you mean" not in result.err


def test_a_byte_order_mark_is_no_key(config: Callable[[bytes], Path]) -> None:
    path = config(b'\xef\xbb\xbfmodel = "/nope"')
    assert run("info").err.startswith(f"error: {path}: model: /nope: no such folder")


def test_a_wrong_model_among_several_of_the_file_is_told(config: Callable[[bytes], Path]) -> None:
    path = config(b"[serve]\nmodels = ['a=/nope', '/none']")
    assert run("serve", "--port", "0").err.startswith(f"error: {path}: models: ")
    assert run("serve", "--port", "0", "-m", "/typed").err.startswith("error: /typed: ")
