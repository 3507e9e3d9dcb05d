"""`mlxqwen cache` as a user meets it, and what is said of conversions at load time."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pexpect
import pytest
from mlx.utils import tree_flatten

from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import run
from tests.convert.checkpoints import make_demo, make_source
from tests.convert.test_cli_convert import ENVIRONMENT


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(tmp_path: Path) -> tuple[Path, Path]:
    from mlxqwen_convert.cached import converted

    sources = make_source(tmp_path / "one", "fp8").write().folder, make_source(tmp_path / "two", "awq").write().folder
    for source in sources:
        converted(source)
    return sources


def test_an_empty_cache(own_cache: Path) -> None:
    assert run("cache", "list").out == f"{own_cache} is empty\n"
    assert json.loads(run("cache", "list", "--json").out) == {"cache": str(own_cache), "models": []}
    assert run("cache", "prune").out == "nothing to remove\n"
    assert not own_cache.exists()


def test_the_list(tmp_path: Path, own_cache: Path) -> None:
    one, two = fill(tmp_path)
    shutil.rmtree(one)
    head, *rows, total = run("cache", "list").out.splitlines()
    assert head.split("  ")[0] == "source"
    assert {row.split()[0]: row.endswith("ready") for row in rows} == {str(one): False, str(two): True}
    assert any("source gone" in row and "FP8" in row and "MLX 8-bit" in row for row in rows)
    assert total.endswith(f" in {own_cache / 'converted'}")
    result = run("cache", "list", "--json")
    assert result.out.count("\n") == 1
    facts = {model["source"]: model for model in json.loads(result.out)["models"]}
    assert {source: fact["source_exists"] for source, fact in facts.items()} == {str(one): False, str(two): True}
    assert facts[str(two)]["state"] == "ready"
    assert facts[str(two)]["bytes"] == sum(
        os.lstat(path).st_blocks * 512 for path in Path(facts[str(two)]["model"]).parent.rglob("*") if path.is_file()
    )
    assert datetime.fromisoformat(facts[str(two)]["last_used"]).tzinfo is not None


def test_pruning(tmp_path: Path) -> None:
    one, two = fill(tmp_path)
    shutil.rmtree(one)
    told = run("cache", "prune", "--dry-run").out
    assert told.startswith(f"would remove the conversion of {one} (MLX 8-bit, groups of 64, ")
    assert told.endswith(" would be freed\n")
    done = run("cache", "prune").out.splitlines()
    assert done[0].startswith(f"removed the conversion of {one} (")
    assert done[0].endswith(": source gone")
    assert done[1].endswith(" freed")
    assert len(done) == 2
    assert run("cache", "prune", "--older-than", "1").out == "nothing to remove\n"
    facts = json.loads(run("cache", "prune", "--older-than", "0", "--json").out)
    assert [model["source"] for model in facts["removed"]] == [str(two)]
    assert facts["freed_bytes"] == facts["removed"][0]["bytes"] > 0
    assert run("cache", "list").out.endswith("is empty\n")


@pytest.mark.parametrize(
    "options", [["--all", "--older-than", "3"], ["--older-than", "-1"], ["--older-than", "x"], ["--older-than", "nan"]]
)
def test_usage(options: list[str]) -> None:
    result = run("cache", "prune", *options)
    assert (result.status, result.out) == (2, "")
    assert "older-than" in result.err


def test_sources_cannot_forge_the_table(tmp_path: Path) -> None:
    from mlxqwen_convert.cached import converted

    converted(make_source(tmp_path / "a\x1b[2J\nb", "fp8").write().folder)
    for command in (["list"], ["prune", "--all"]):
        out = run("cache", *command).out
        assert "\x1b" not in out
        assert "a\\x1b[2J\\nb" in out


def test_on_a_terminal(tmp_path: Path) -> None:
    """A line of notice, a bar that is wiped, and the answer; the second time the answer alone."""
    source = make_demo(tmp_path / "demo-FP8", "fp8").folder
    options = ["--temperature", "0", "--max-tokens", "4", "--no-thinking"]
    command = [sys.executable, "-m", "mlxqwen", "generate", "Hello", "--model", str(source), *options]
    environment = {**ENVIRONMENT, "MLXQWEN_CACHE": str(tmp_path / "cache")}
    wide = {"timeout": 60, "encoding": "utf-8", "dimensions": (24, 300)}  # no path is wrapped
    shown = [pexpect.run(" ".join(command), env=environment, **wide) for _ in range(2)]
    first, second = (re.sub(r"\rLoading [^\r]*\r\x1b\[K", "", text) for text in shown)  # on a slow machine
    notice, _, rest = first.partition("\r\n")
    assert notice.startswith(f"note: {source} (FP8")
    bars, wiped, answer = rest.rpartition("\r\x1b[K")
    assert "converting" in bars
    assert "verifying  100 %" in bars
    assert wiped
    assert _without_speed(answer) == _without_speed(second)


def _without_speed(shown: str) -> str:
    return re.sub(r"[\d.,]+ tokens/s", "", shown)


def test_a_conversion_that_begins_at_this_moment(own_cache: Path) -> None:
    """Its folder is locked and empty as yet."""
    entry = own_cache / "converted" / ("0" * 16)
    entry.mkdir(parents=True)
    with (entry / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        row = run("cache", "list").out.splitlines()[1]
        assert row.split() == ["-", "-", "-", "0", "bytes", "-", "converting"]
        assert json.loads(run("cache", "list", "--json").out)["models"][0]["last_used"] is None


def test_the_list_fits_the_terminal(tmp_path: Path) -> None:
    _, two = fill(tmp_path)
    lines = run("cache", "list", on_terminal=True).out.replace("\r\n", "\n").splitlines()[:-1]
    assert max(map(len, lines)) <= 80
    assert {"source", "size", "state"} <= set(lines[0].split())
    assert any(line.split()[0].startswith("…") and line.split()[0].endswith("two") for line in lines)
    assert str(two) in run("cache", "list").out


def test_info_of_a_checkpoint_that_cannot_be_converted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write()
    config = source.folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    result = run("info", str(source.folder))
    assert (result.status, result.out) == (1, "")
    assert "model.layers.2." in result.err
    assert result.err == run("convert", str(source.folder), str(tmp_path / "out")).err


def test_the_tokenizer_of_another_model_is_found_before_the_conversion(tmp_path: Path, own_cache: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write().folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / name, source / name)
    result = run("generate", "Hello", "--model", str(source))
    assert (result.status, result.out) == (1, "")
    problem, hint = result.err.splitlines()
    assert problem.startswith(f"error: {source / 'tokenizer.json'}: ")
    assert problem.endswith("expected ids below 192, the model's vocab_size")
    assert "another model" in hint
    assert not own_cache.exists()


def test_info_tells_of_the_conversion_and_does_not_do_it(tmp_path: Path, own_cache: Path) -> None:
    from mlxqwen.model.loading import load_model
    from mlxqwen_convert.cached import converted

    source = make_source(tmp_path / "in", "fp8").write().folder
    facts = json.loads(run("info", str(source), "--json").out)
    assert (facts["runs"], facts["converts"], facts["fits"]) == (False, True, True)
    table = run("info", str(source)).out
    assert "(converted once, when it is first loaded)" in table
    assert not own_cache.exists()
    arrays = dict(tree_flatten(load_model(converted(source)).parameters()))
    assert facts["weight_bytes"] == sum(array.nbytes for array in arrays.values())
