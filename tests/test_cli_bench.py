"""`mlxqwen bench`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pexpect
import pytest

import mlxqwen.engine.benchmark
from mlxqwen import load
from mlxqwen.cli import bench_plot
from mlxqwen.engine.benchmark import BenchmarkRun, Speed
from mlxqwen.errors import TokenizerError
from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import run
from tests.convert.checkpoints import make_demo
from tests.test_cli import assert_error

SHORT = ("--tokens", "4", "--repeat", "1")


def measured(*arguments: str) -> Any:
    result = run("bench", *arguments, "--json")
    assert (result.status, result.err) == (0, ""), result
    return json.loads(result.out)


def test_a_table() -> None:
    result = run("bench", "--context", "8,32", *SHORT)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "the demo model, float32"
    assert re.fullmatch(r"loaded in \d+\.\d\d s, weights 4\.3 MB", lines[2])
    assert re.split(r"\s{2,}", lines[4].strip()) == [
        "context",
        "first token",
        "prefill",
        "decode",
        "cache",
        "peak memory",
    ]
    number = r"[\d,]+\.\d"
    for line, context in zip(lines[5:7], ("8", "32"), strict=True):
        speeds = (
            rf"\s*{context}  \s*\d+\.\d{{3}} s  \s*{number} tokens/s  \s*{number} tokens/s  1\.0 MB  \s*{number} MB"
        )
        assert re.fullmatch(speeds, line), line
    assert lines[7:] == ["", "Medians of 1 run, 4 tokens decoded in each."]


def test_json_has_every_run_and_their_medians() -> None:
    facts = measured("--context", "8,32", "--tokens", "3", "--repeat", "2", "--kv-bits", "8", "--max-kv-size", "16")
    assert [(speed["context"], speed["runs"]) for speed in facts["speeds"]] == [(8, 2), (32, 2)]
    assert [(run["context"], run["tokens"]) for run in facts["runs"]] == [(8, 3), (32, 3)] * 2
    assert (facts["kv_bits"], facts["max_kv_size"], facts["dtype"]) == (8, 16, "float32")
    assert facts["interrupted"] is False
    first = [run["prefill_seconds"] for run in facts["runs"] if run["context"] == 8]
    assert facts["speeds"][0]["prefill_seconds"] == pytest.approx(sum(first) / 2)
    assert facts["speeds"][0]["prefill_tokens_per_second"] == pytest.approx(8 / (sum(first) / 2))
    assert facts["speeds"][1]["cache_bytes"] < measured("--context", "32", *SHORT)["speeds"][0]["cache_bytes"]


@pytest.mark.slow
def test_usual_contexts_and_longer_ones() -> None:
    assert [speed["context"] for speed in measured(*SHORT)["speeds"]] == [128, 507]
    facts = measured("--context", "508", "--yarn-factor", "2", *SHORT)
    assert [speed["context"] for speed in facts["speeds"]] == [508]
    assert_error(
        run("bench", "--context", "508", *SHORT), "--context: found 508, expected at most 507", "--yarn-factor"
    )


def test_foreign_formats_are_converted_and_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    source = make_demo(tmp_path / "model", "fp8").folder
    first = run("bench", str(source), "--context", "8", *SHORT)
    assert (first.status, " is converted once, " in first.err) == (0, True)
    facts = measured(str(source), "--context", "8", *SHORT)
    assert (facts["model"], len(facts["runs"])) == (str(source), 1)


def test_no_tokenizer_is_needed(tmp_path: Path) -> None:
    for path in DEMO_FOLDER.iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            shutil.copy(path, tmp_path)
    with pytest.raises(TokenizerError):
        load(tmp_path)
    facts = measured(str(tmp_path), "--context", "8", *SHORT)
    assert (facts["model"], len(facts["runs"])) == (str(tmp_path), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "8,x"), "--context: found '8,x', expected numbers of tokens"),
        (("--context", ""), "--context: found '', expected numbers of tokens"),
        (("--context", "-8"), "--context: found '-8', expected numbers of tokens"),
        (("--context", "0"), "--context: found 0, expected an integer from 1"),
        (("--tokens", "0"), "--tokens: found 0, expected an integer from 1"),
        (("--repeat", "0"), "--repeat: found 0, expected an integer from 1"),
        (("--max-kv-size", "2"), "--max-kv-size: found 2, expected more than the 4 tokens"),
        (("--plot", "speed.txt"), "--plot: found 'speed.txt', expected a name that ends in .png, .svg, .pdf"),
        (("--plot", "nowhere/speed.png"), "--plot: nowhere/speed.png cannot be written"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxqwen.engine.loading.locate_model", lambda *args, **options: pytest.fail("looked for"))
    assert_error(run("bench", *arguments), message)


@pytest.mark.slow
def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, magic in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")):
        assert run("bench", "--context", "8,16", *SHORT, "--plot", str(tmp_path / name)).status == 0
        assert (tmp_path / name).read_bytes().startswith(magic)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.svg", "c.PDF"]


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".png"])
def test_the_same_speeds_are_the_same_file(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    speeds = [Speed(8 * n, 1, 0.5, 16.0 * n, 4.0, 100, 1_000) for n in (1, 2)]
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        bench_plot.write_plot(file, speeds, title="a model")
    first, second = (file.read_bytes() for file in files)
    assert first == second
    for word in (b"date", b"Date", b"Matplotlib v"):
        assert word not in first


def test_a_plot_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object:
        return None if name == "matplotlib" else util.find_spec(name)

    monkeypatch.setattr(bench_plot, "find_spec", find_spec)
    monkeypatch.setattr("mlxqwen.engine.loading.locate_model", lambda *args, **options: pytest.fail("looked for"))
    result = run("bench", "--plot", str(tmp_path / "a.png"))
    assert_error(result, "--plot: matplotlib is not installed", '-m pip install "mlxqwen[plot]"')


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ctrl_c_shows_what_was_measured(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def benchmark(*_: object, **__: object) -> Iterator[BenchmarkRun]:
        for number in range(count):
            yield BenchmarkRun((128, 447)[number % 2], 64, 2.0, 4.0, 1_000, 2_000)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlxqwen.engine.benchmark, "benchmark", benchmark)
    result = run("bench")
    assert (result.status, result.err) == (130, "")
    assert ("Nothing was measured yet." in result.out) == (count == 0)
    assert bool(re.search(r"128 +2\.000 s +64\.0 tokens/s  16\.0 tokens/s", result.out)) == (count > 0)
    assert ("Medians of 1 to 2 runs" in result.out) == (count == 3)
    assert result.out.endswith(f"\nInterrupted when {count} of 6 runs were done.\n") == (count > 0)
    facts = json.loads(run("bench", "--json").out)
    assert (facts["interrupted"], len(facts["runs"]), facts["planned_runs"]) == (True, count, 6)


def test_ctrl_c_on_a_terminal() -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mlxqwen", "bench", "--context", "8", "--tokens", "4", "--repeat", "100000"],
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 100),
    )
    child.expect(r"Measuring: \d+ of 100000 runs done, next a prompt of 8 tokens")
    child.sendintr()
    child.expect(r"Medians of \d+ runs?, 4 tokens decoded in each\.\r\n")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_a_narrow_terminal_is_not_overrun() -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mlxqwen", "bench", "--context", "8", *SHORT],
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 64),
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    table = child.before.partition("weights")[2].partition("Medians")[0]
    assert "context  first token" in table
    assert "peak memory" not in table
    assert all(len(line) <= 64 for line in table.splitlines())
