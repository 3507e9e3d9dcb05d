"""`mlxqwen completion`: the scripts, and what they complete in a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from tests.command_line import run

SHELLS = ("bash", "zsh", "fish")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with this very program on it."""
    program = tmp_path / "bin" / "mlxqwen"
    program.parent.mkdir()
    folders = f"{ROOT}:{ROOT / 'convert'}"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{folders}" exec "{sys.executable}" -m mlxqwen "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def completed(path: str, *words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last of `words`, by the function that the script has registered."""
    script = (
        'eval "$(mlxqwen completion bash)"; compopt() { echo "$@"; }; '
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mlxqwen_completion mlxqwen; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", script, "bash", "mlxqwen", *words]
    result = subprocess.run(
        command, env={**os.environ, "PATH": path}, cwd=cwd, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_sound(shell: str, tmp_path: Path) -> None:
    result = run("completion", shell)
    assert (result.status, result.err) == (0, "")
    assert "_MLXQWEN_COMPLETE" in result.out
    assert f"{shell}_complete" in result.out
    if shutil.which(shell) is not None:
        script = tmp_path / "script"
        script.write_text(result.out)
        checked = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=60, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_other_shells_are_refused() -> None:
    for arguments in ((), ("tcsh",), ("bash", "zsh")):
        result = run("completion", *arguments)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("error: ")


def test_the_shells_to_choose_from_are_on_one_line() -> None:
    assert "Choose from: bash, zsh, fish\n" in run("completion").err


def test_help_says_where_the_script_goes() -> None:
    text = run("completion", "--help").out
    for shell, file in (("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", "config.fish")):
        assert f"mlxqwen completion {shell}" in text
        assert file in text


def test_bash_completes_commands_options_and_values(path: str) -> None:
    assert completed(path, "ch") == ["chat"]
    assert completed(path, "generate", "--kv-b") == ["--kv-bits"]
    assert completed(path, "chat", "--dtype", "") == ["bfloat16", "float16", "float32"]
    assert completed(path, "completion", "z") == ["zsh"]
    assert completed(path, "cache", "") == ["list", "prune"]


@pytest.mark.parametrize("words", [("chat", "--model"), ("generate", "--model"), ("info",), ("convert",)], ids=" ".join)
def test_models_are_folders(path: str, words: tuple[str, ...]) -> None:
    assert completed(path, *words, "mod") == ["-o", "dirnames"]


def test_bash_completes_on_tab(path: str, tmp_path: Path) -> None:
    (tmp_path / "model-folder").mkdir()
    (tmp_path / "model-file").write_text("")
    child = pexpect.spawn(
        "bash",
        ["--norc", "--noprofile"],
        env={**os.environ, "PATH": path, "PS1": "ready> ", "TERM": "dumb"},
        encoding="utf-8",
        timeout=30,
        dimensions=(24, 200),
        cwd=str(tmp_path),
    )
    try:
        child.expect_exact("ready> ")
        child.sendline('eval "$(mlxqwen completion bash)"')
        child.expect_exact("ready> ")
        child.send("mlxqwen gen\t")
        child.expect_exact("mlxqwen generate ")
        child.send("--mod\t")
        child.expect_exact("--model ")
        child.send("mod\t")
        child.expect_exact("model-folder/")
    finally:
        child.close(force=True)
