"""The command line of the demo model's scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from demo import __main__ as commands

DEMO = Path(__file__).parents[1] / "scripts" / "demo"


@pytest.mark.parametrize("command", ["plot_budget", "plot_stream"])
def test_a_command_tells_its_options(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["demo"])
    with pytest.raises(SystemExit) as left:
        commands.main([command, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: demo {command} ")


def test_every_command_has_a_module() -> None:
    for command in commands.COMMANDS:
        assert "\ndef main() -> None:\n" in (DEMO / f"{command}.py").read_text(encoding="utf-8")


def test_other_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["nothing"]) == 2
    assert capsys.readouterr().err == f"demo: nothing: no such command; there are {', '.join(commands.COMMANDS)}\n"


def test_the_scripts_find_the_packages_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run([sys.executable, DEMO, "evaluate", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: demo evaluate ")
