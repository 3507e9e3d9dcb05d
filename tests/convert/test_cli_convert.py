"""`mlxqwen convert` as a user meets it: what is printed where, exit codes, the bar on a terminal only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from mlxqwen.cli.terminal import progress_line
from tests.convert.checkpoints import DENSE, MOE, make_source

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "convert")])}


def mlxqwen(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxqwen", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def test_a_table_and_nothing_else_in_a_pipe(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8", MOE).write()
    done = mlxqwen("convert", source.folder, tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "kind",
        "modules",
        "weights",
        "from",
        "to",
        "how",
        "before",
        "after",
        "bits/w",
        "error",
        "largest",
    ]
    assert [line.split()[0] for line in lines[1:-1]] == [
        "embeddings",
        "attention",
        "router",
        "experts",
        "lm_head",
        "norms",
    ]
    assert "verified" in lines[-1]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--dry-run", "--bits", "6")
    assert done.returncode == 0
    assert "6-bit g64" in done.stdout
    assert "expected peak memory" in done.stdout
    assert list(tmp_path.iterdir()) == [source.folder]


def test_json_for_scripts(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq").write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--json")
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert report["output"] == str(tmp_path / "out")
    kept = {row["kind"]: row["codes_kept"] for row in report["kinds"] if row["method"] == "repack"}
    assert kept == {"attention": 2 * 3 * 128 * 128, "mlp": 2 * 3 * 256 * 128}
    lasting = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert {key: report[key] for key in lasting} == lasting


def test_the_offer_for_heads_of_integer_checkpoints(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq").write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--dry-run")
    assert "--embed-bits 8 --lm-head-bits 8" in done.stdout
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--embed-bits", "8", "--lm-head-bits", "8")
    assert "note" not in done.stdout
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert section["lm_head"] == {"group_size": 64, "bits": 8}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bits", "7"], 2, "--bits"),
        (["--keep", "down_proj"], 1, "GLOB=BITS"),
        (["--keep", "*.down_proj=many"], 1, "GLOB=BITS"),
        (["--keep", "*.no_such=8"], 1, "matches no module"),
        (["--strict", "--group-size", "128"], 1, "do not divide"),
        (["--lm-head-bits", "1"], 2, "--lm-head-bits"),
    ],
)
def test_bad_options_end_in_a_line_or_two(tmp_path: Path, options: list[str], code: int, words: str) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "intermediate_size": 192}).write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", *options)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [source.folder]
    if code == 1:
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") <= 2


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    arguments = ["-m", "mlxqwen", "convert", str(source.folder), str(tmp_path / "out")]
    output = pexpect.run(f"{sys.executable} {' '.join(arguments)}", env=ENVIRONMENT, timeout=60).decode()
    assert "converting" in output
    assert "verifying" in output
    assert "100 %" in output
    assert "verified, in " in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("converting", 0, 1000, 0, 0.0), "converting   0 %  |                    |"),
        (("converting", 500, 1000, 500, 0.1), "converting  50 %  |##########          |"),
        (
            ("verifying", 50_000_000, 200_000_000, 40_000_000, 2.0),
            "verifying   25 %  |#####               |  20 M weights/s  0:08 left",
        ),
        (
            ("converting", 10**9, 10**11, 10**9, 10.0),
            "converting   1 %  |                    |  100 M weights/s  16:30 left",
        ),
    ],
)
def test_the_bars_words(arguments: tuple[str, int, int, int, float], expected: str) -> None:
    assert progress_line(*arguments) == expected


def test_the_library_is_not_loaded_for_other_commands() -> None:
    code = "import sys, mlxqwen.cli.commands, mlxqwen.engine; print([m for m in sys.modules if 'mlxqwen_convert' in m])"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
