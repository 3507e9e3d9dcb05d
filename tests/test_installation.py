"""The command that adds an extra, in the environments that pip, uv and pipx make."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from mlxqwen.installation import install_command
from tests.command_line import run

PYTHON = shlex.quote(sys.executable)
OF_UV = "home = /usr/bin\nimplementation = CPython\nuv = 0.9.5\nversion_info = 3.12.3\n"
OF_VENV = "home = /usr/bin\nversion = 3.12.3\ncommand = /home/uv = me/python -m venv /home/uv = me/.venv\n"


@pytest.mark.parametrize(
    ("place", "files", "expected"),
    [
        (".venv", {"pyvenv.cfg": OF_VENV}, f'{PYTHON} -m pip install "mlxqwen[plot]"'),
        ("usr", {}, f'{PYTHON} -m pip install "mlxqwen[plot]"'),
        (".venv", {"pyvenv.cfg": OF_UV}, f'uv pip install --python {PYTHON} "mlxqwen[plot]"'),
        (
            "uv/tools/mlxqwen",
            {"pyvenv.cfg": OF_UV, "uv-receipt.toml": "[tool]\n"},
            f'uv pip install --python {PYTHON} "mlxqwen[plot]"',
        ),
        ("uv/archive-v0/MrvgaYHhK2", {"pyvenv.cfg": OF_UV}, 'uvx --from "mlxqwen[plot]" mlxqwen …'),
        (
            "pipx/venvs/mlxqwen",
            {"pyvenv.cfg": OF_VENV, "pipx_metadata.json": "{}"},
            'pipx runpip mlxqwen install "mlxqwen[plot]"',
        ),
        (
            "pipx/venvs/mlxqwen-my next",
            {"pyvenv.cfg": OF_UV, "pipx_metadata.json": "{}"},
            "pipx runpip 'mlxqwen-my next' install \"mlxqwen[plot]\"",
        ),
        (
            ".cache/pipx/d99db30c",
            {"pyvenv.cfg": OF_UV, "pipx_metadata.json": "{}"},
            'pipx run --spec "mlxqwen[plot]" mlxqwen …',
        ),
    ],
)
def test_each_environment_has_its_command(tmp_path: Path, place: str, files: dict[str, str], expected: str) -> None:
    prefix = tmp_path / place
    prefix.mkdir(parents=True)
    for name, text in files.items():
        (prefix / name).write_text(text)
    assert install_command("plot", prefix=prefix) == expected


def test_hints_have_the_command_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyvenv.cfg").write_text(OF_UV)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("mlxqwen.cli.serve.find_spec", lambda name: None)
    hint = run("serve").err.splitlines()[1]
    assert hint == f'       Install them: uv pip install --python {PYTHON} "mlxqwen[server]"'
