"""The benchmark's arithmetic, its command line, and the counts that are held to a baseline; no times."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bench
import mlx.core as mx
import pytest
from benchmarks import baseline, batches, conversion_counts, counts, graph, parts, sampling, starting, steps
from benchmarks.baseline import Baseline, Change, changes, report
from benchmarks.comparison import FLOAT32, HEAD, Comparison, Table, compared, quartiles, take_turns
from benchmarks.machine import Machine, describe
from benchmarks.primitives import KINDS, uncompiled
from benchmarks.processes import ROOT, ProcessError, Run, own_cache, python, timed
from benchmarks.settings import Settings
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.device import current_device
from mlxqwen.files.hub import DEMO_FOLDER


def iter_of(lines: list[Comparison | Table]) -> Iterator[Comparison | Table]:
    """Lines as a part gives them."""
    yield from lines


costs = st.floats(1e-6, 1e6)


def test_a_line_of_the_table_by_hand() -> None:
    row = Comparison("load", "mlx-lm", "s", [1.0, 2.0, 4.0], [2.0, 6.0, 16.0])
    assert row.ratios == [2.0, 3.0, 4.0]
    assert row.ratio == 3.0
    assert row.markdown() == "| load | mlx-lm | 2.00 s | 6.00 s | 3.00 × | 2.50–3.50 | 3 |"
    assert row.markdown().count("|") == HEAD.splitlines()[0].count("|")


def test_of_rates_more_is_better() -> None:
    row = Comparison("batch", "mlx-lm", "tokens/s", [30.0], [10.0], more_is_better=True)
    assert row.ratio == 3.0
    assert row.markdown() == "| batch | mlx-lm | 30.0 tokens/s | 10.0 tokens/s | 3.00 × |  | 1 |"


def test_counts_have_no_unit_and_no_blank_for_it() -> None:
    row = Comparison("primitives", "mlx-lm", "", [625], [1250])
    assert row.markdown() == "| primitives | mlx-lm | 625 | 1,250 | 2.00 × |  | 1 |"


def test_a_table_of_its_own_by_hand() -> None:
    assert Table("Costs", ("what", "how", "bytes"), [("load", "cold", "12")], texts=2).markdown().splitlines() == [
        "",
        "Costs:",
        "",
        "| what | how | bytes |",
        "| --- | --- | ---: |",
        "| load | cold | 12 |",
    ]


def test_nothing_beside_nothing_is_a_draw() -> None:
    assert Comparison("memory", "mlx-lm", "MiB", [0.0], [0.0]).ratio == 1.0
    some = Comparison("memory", "mlx-lm", "MiB", [0.0], [5.0])
    assert some.markdown() == "| memory | mlx-lm | 0 MiB | 5.00 MiB | inf × |  | 1 |"


@given(st.lists(st.tuples(costs, costs), min_size=1, max_size=20), st.floats(0.1, 10))
def test_a_turn_that_is_slower_for_both_changes_no_ratio(pairs: list[tuple[float, float]], slower: float) -> None:
    ours, theirs = zip(*pairs, strict=True)
    calm = Comparison("", "", "s", ours, theirs)
    busy = Comparison("", "", "s", [slower * ours[0], *ours[1:]], [slower * theirs[0], *theirs[1:]])
    assert busy.ratios == pytest.approx(calm.ratios)
    low, high = quartiles(calm.ratios)
    assert min(calm.ratios) <= low <= calm.ratio <= high <= max(calm.ratios)


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def side(name: str) -> float:
        called.append(name)
        return float(len(called))

    told: list[int] = []
    numbers = take_turns([lambda: side("ours"), lambda: side("theirs")], 2, told.append)
    assert called == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert numbers == [[3.0, 6.0], [4.0, 5.0]]
    assert told == [0, 1, 2]
    called.clear()
    assert take_turns([lambda: side("ours"), lambda: side("theirs")], 1, is_warm=True) == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: no such part; there are import"),
        (["import", "--runs", "0"], "--runs: at least 1"),
        (["decode", "--layers", "-1"], "--layers: at least 1"),
        (["load", "--folder", "/no/such/folder"], "--folder: /no/such/folder is no folder"),
        (["import", "--check"], "leave out the parts"),
        (["decode", "--shape", "Qwen3-9B"], "--shape: Qwen3-9B: no such release; there are Qwen3-0.6B, "),
    ],
)
def test_what_cannot_be_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_without_mlx_lm_mlxqwen_is_measured_alone_and_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "missing_packages", lambda: ["mlx-lm"])
    monkeypatch.setattr(bench, "run_part", lambda *_: iter_of([]))
    monkeypatch.setattr(bench, "describe", lambda machine: "here")
    assert bench.main(["import"]) == 0
    told = "mlx-lm not installed: rows that need it are missing, or stand alone: pip install -e '.[dev]'"
    assert told in capsys.readouterr().err
    monkeypatch.setattr(sampling, "has_mlx_lm", lambda: False)
    (drawn, greedy) = sampling.sample(Settings(Path(), runs=2, quick=True))
    assert [drawn.is_alone, greedy.is_alone] == [True, True]
    assert len(drawn.ours) == 2
    monkeypatch.setattr(graph, "has_mlx_lm", lambda: False)
    monkeypatch.setattr(graph, "KINDS", {"dense, BF16": KINDS["dense, BF16"]})
    primitives, _ = graph.graph(Settings(Path(), runs=1, quick=True))
    assert primitives.markdown().endswith("| 625 |  |  |  | 1 |")


def test_settings_give_turns() -> None:
    plain, quick, three = (Settings(Path(), **more) for more in ({}, {"quick": True}, {"runs": 4, "quick": True}))
    assert [one.turns(15) for one in (plain, quick, three)] == [15, 3, 4]
    assert quick.turns(2) == 2


def test_the_processors_time_counts_if_asked_for() -> None:
    run = Run(seconds=3.0, processor_seconds=0.5, peak_bytes=0)
    assert [run.time(Settings(Path(), processor_time=choice)) for choice in (False, True)] == [3.0, 0.5]


def test_every_part_is_there() -> None:
    modules = {path.stem for path in (ROOT / "scripts" / "benchmarks").glob("*.py")}
    for part in parts.PARTS.values():
        assert part.module in modules
        source = (ROOT / "scripts" / "benchmarks" / f"{part.module}.py").read_text()
        result = "Table" if part.has_table else "Iterator[Comparison]"
        assert f"def {part.function}(settings: Settings) -> {result}:" in source


def test_a_part_that_fails_is_named_and_leaves_the_others_their_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = parts.Part("checkpoints", "layers_of", "a folder that is no path", 0)
    monkeypatch.setitem(parts.PARTS, "broken", broken)
    monkeypatch.setattr(bench, "describe", lambda machine: "here")

    figures: dict[str, list[Comparison | Table]] = {
        "draws": [Table("Draws", ("what", "number"), [("one", "1")])],
        "import": [Comparison("import", "import mlx_lm", "s", [1.0], [2.0])],
    }

    def run_part(name: str, settings: Settings, deadline: float | None) -> Iterator[Comparison | Table]:
        yield from figures.get(name) or parts.run_part(name, settings, deadline)

    monkeypatch.setattr(bench, "run_part", run_part)
    assert bench.main(["draws", "broken", "import"]) == 1
    told = capsys.readouterr()
    assert "bench: broken: TypeError: " in told.err
    assert "bench: import" in told.err
    heading, *lines = told.out.splitlines()
    assert heading == "here"
    assert lines[-7].startswith("| import | import mlx_lm | 1.00 s |")
    assert lines[-6:] == ["", "Draws:", "", "| what | number |", "| --- | ---: |", "| one | 1 |"]  # tables come last


def test_imports_are_lines_beside_mlx_lm_and_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"import mlxqwen": 1.0, "import mlx_lm": 3.0, "import mlx.core": 2.0}
    monkeypatch.setattr(starting, "timed", lambda command: Run(seconds[command[-1]], 0.0, 0))
    rows = [*starting.imports(Settings(Path(), runs=2))]
    assert [(row.beside, row.ours, row.theirs) for row in rows] == [
        ("import mlx_lm", [1.0, 1.0], [3.0, 3.0]),
        ("import mlx.core", [1.0, 1.0], [2.0, 2.0]),
    ]


def test_parts_with_tables_alone_print_no_head_of_the_common_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "describe", lambda machine: "here")
    table = Table("draws", ("what", "number"), [("one", "1")])
    monkeypatch.setattr(bench, "run_part", lambda *_: iter_of([table]))
    assert bench.main(["draws"]) == 0
    assert capsys.readouterr().out == "here\n\ndraws:\n\n| what | number |\n| --- | ---: |\n| one | 1 |\n"


def test_the_machine_in_a_line() -> None:
    line = r"mlx [\d.]+, mlx-lm [\d.]+, tokenizers [\d.]+; Python .*; load at the start [\d./]+"
    assert re.fullmatch(line, describe(Machine.of_this()))


def test_a_command_that_fails_is_told_with_what_it_wrote() -> None:
    with pytest.raises(ProcessError, match="the reason"):
        timed(python("-c", "raise SystemExit('the reason')"))


def test_nothing_is_written_into_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "user"))
    with own_cache(tmp_path / "own"):
        timed(python("-c", f"import os; assert os.environ['MLXQWEN_CACHE'] == {str(tmp_path / 'own')!r}"))
    assert os.environ["MLXQWEN_CACHE"] == str(tmp_path / "user")


def test_the_script_finds_the_packages_beside_it() -> None:
    found = subprocess.run(
        [sys.executable, "scripts/bench.py", "--shape", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert "--shape: x: no such release" in found.stderr


OLD = Baseline(
    {
        "model calls": 10,
        "modules, start: libraries": 100,
        "modules, import: libraries": 0,
        "modules, start: standard library": 100,
        "modules, import: standard library": 1,
        "primitives per token": 200,
    },
    "0.32.4",
    "3.11.7",
)


@pytest.mark.parametrize(
    ("name", "count", "mlx", "verdict"),
    [
        ("model calls", 11, "0.32.4", "worse"),
        ("model calls", 9, "0.32.4", "better"),
        ("modules, start: libraries", 110, "0.32.4", None),
        ("modules, start: libraries", 111, "0.32.4", "worse"),
        ("modules, import: libraries", 1, "0.32.4", "worse"),
        ("modules, start: standard library", 115, "0.32.4", None),
        ("modules, start: standard library", 116, "0.32.4", "worse"),
        ("modules, import: standard library", 6, "0.32.4", None),
        ("modules, import: standard library", 7, "0.32.4", "worse"),
        ("primitives per token", 201, "0.32.4", "worse"),
        ("primitives per token", 210, "0.33.0", None),
        ("primitives per token", 211, "0.33.0", "worse"),
    ],
)
def test_more_fails_and_less_is_told(name: str, count: int, mlx: str, verdict: str | None) -> None:
    changed = changes(OLD, Baseline({**OLD.counts, name: count}, mlx, "3.13.0"))
    assert [change.verdict for change in changed] == ([] if verdict is None else [verdict])
    assert any(change.fails for change in changed) == (verdict == "worse")


@pytest.mark.parametrize(
    ("held", "allocator", "verdicts"),
    [(5, "CPU", ["worse"]), (1 << 16, "Metal", []), (5 + (1 << 16), "Metal", ["worse"])],
)
def test_another_allocator_may_round_what_it_holds(held: int, allocator: str, verdicts: list[str]) -> None:
    name = "bytes held beyond the cache"
    changed = changes(Baseline({name: 4}, "0", "3", "CPU"), Baseline({name: held}, "0", "3", allocator))
    assert [change.verdict for change in changed] == verdicts


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Baseline({"model calls": 3}, "0.32.4", "3.11.7", "Metal")
    written.write(tmp_path / "counts.json")
    assert Baseline.read(tmp_path / "counts.json") == written


def test_counts_on_one_side_only_fail() -> None:
    changed = changes(Baseline({"old": 1}, "0", "3"), Baseline({"new": 2}, "0", "3"))
    assert changed == [Change("old", 1, None), Change("new", None, 2)]
    assert [(change.verdict, change.fails) for change in changed] == [("gone", True), ("new", True)]


def test_the_report_by_hand() -> None:
    assert report([], 3, "x.json") == "3 counts are as in x.json"
    lines = report([Change("model calls", 1000, 1001)], 3, "x.json").splitlines()
    assert lines[2] == "| model calls | 1,000 | 1,001 | worse |"
    assert lines[-1] == "More work than before: mend it, or, if it is meant, scripts/bench --update-baseline"
    assert report([Change("a", 2, 1)], 3, "x.json").endswith("Update the baseline: scripts/bench --update-baseline")


def test_check_fails_for_a_doctored_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"model calls": 10, "primitives per token": 200}
    monkeypatch.setattr(counts, "all_counts", lambda: found)
    path = tmp_path / "bench_counts.json"
    monkeypatch.setattr(bench, "BASELINE", path)
    assert bench.main(["--update-baseline"]) == 0
    assert bench.main(["--check"]) == 0
    doctored = json.loads(path.read_text())
    doctored["counts"]["model calls"] = 9
    path.write_text(json.dumps(doctored))
    capsys.readouterr()
    assert bench.main(["--check"]) == 1
    assert "| model calls | 9 | 10 | worse |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def reply_counts() -> dict[str, int]:
    """Counted once; the same every time, as the last test of them holds."""
    return counts.reply_counts()


def test_the_committed_baseline_counts_what_is_counted_now(reply_counts: dict[str, int]) -> None:
    committed = Baseline.read(baseline.BASELINE)
    for count in (*reply_counts, *counts.decoding_counts()):
        assert count in committed.counts
    assert committed.counts["modules, import mlxqwen: libraries"] == 0


def test_conversions_count_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less for narrower forms, and under names that the baseline knows."""
    small = {
        **conversion_counts._SHAPE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "head_dim": 32,
        "vocab_size": 128,
    }
    monkeypatch.setattr(conversion_counts, "_SHAPE", small)
    found = conversion_counts.conversion_counts()
    committed = Baseline.read(baseline.BASELINE)
    assert all(count in committed.counts for count in found)
    assert all(number > 0 for number in found.values())
    sizes = {form: found[f"bytes read by a conversion from {form}"] for form in ("BF16", "FP8", "AWQ", "GPTQ")}
    assert max(sizes["AWQ"], sizes["GPTQ"]) < sizes["FP8"] < sizes["BF16"]


def test_a_reply_takes_one_call_a_token_and_one_for_each_chunk(reply_counts: dict[str, int]) -> None:
    assert reply_counts["model calls per reply of 300 tokens to 700"] == 2 + 299
    assert reply_counts["positions with logits per reply of 300 tokens to 700"] == 300


def test_a_machine_with_a_gpu_counts_the_same_on_its_cpu(
    reply_counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    default = [mx.Device(mx.gpu)]
    monkeypatch.setattr(mx, "default_device", lambda: default[-1])
    monkeypatch.setattr(mx, "set_default_device", default.append)
    current_device.cache_clear()
    try:
        assert current_device().is_gpu
        held = "bytes held beyond the cache after 299 decoded tokens"
        found = counts.reply_counts()
        # How large a piece of memory malloc gives depends on what was freed before, by other tests too.
        assert abs(found.pop(held) - reply_counts[held]) <= 64
        assert found == {name: number for name, number in reply_counts.items() if name != held}
        assert [device.type for device in default[1:]] == [mx.DeviceType.cpu, mx.DeviceType.gpu]
        assert current_device().is_gpu
    finally:
        current_device.cache_clear()


@pytest.mark.parametrize("switched_off", [False, True])
def test_compiling_is_switched_on_again_where_it_was_on(switched_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[str] = []
    monkeypatch.setattr(mx, "disable_compile", lambda: switched.append("off"))
    monkeypatch.setattr(mx, "enable_compile", lambda: switched.append("on"))
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    if switched_off:
        monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    with uncompiled():
        assert switched == ["off"]
    assert switched == (["off"] if switched_off else ["off", "on"])


def test_the_side_of_the_same_numbers_leads() -> None:
    sides = {"mlxqwen": [1.0], "mlx-lm": [3.0], FLOAT32: [2.0]}
    assert [row.beside for row in compared("decode", "s", sides)] == [FLOAT32, "mlx-lm"]
    assert [row.beside for row in compared("decode", "s", {"mlxqwen": [1.0]})] == [""]


@pytest.mark.parametrize(
    ("most", "sides", "expected"),
    [
        (1, [(90, 80, 80, 1, 2), (70, 60, 60, 3, 5)], [[1, 2], [3, 5]]),
        (4, [(90, 80, 80, 1, 2), (70, 60, 60, 3, 5)], [[1, 2], [3, 5]]),
        (4, [(90, 0.025, 80, 80, 1, 2, 3, 4), (70, 60, 60, 60, 3, 5, 1, 1)], [[1.5, 3.5], [4, 1]]),
        (2, [(90, 0.001, 80, 80, 1, 2, 3, 4)], [[1.5, 3.5]]),
    ],
)
def test_steps_are_timed_in_turn_short_ones_several_at_once(
    most: int, sides: list[tuple[float, ...]], expected: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one of each side, the one that tells how long they are, and the first turn do not count."""
    seconds = [0.0]
    monkeypatch.setattr(steps, "now", lambda: seconds[0])

    def side(*lengths: float) -> Iterator[None]:
        for length in lengths:
            seconds[0] += length
            yield

    found = steps.seconds_per_step([side(*lengths) for lengths in sides], 2, most)
    assert [pytest.approx(times) for times in expected] == found


def test_many_rows_of_the_demo_model_beside_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_models", lambda settings: [("demo model", None, DEMO_FOLDER)])
    rows = [*batches.batch(Settings(Path(), runs=2))]
    assert [row.what for row in rows[::2]] == [f"batch of {size}, demo model" for size in (1, 8, 32)]
    assert {(row.unit, row.more_is_better, len(row.ours), len(row.theirs)) for row in rows} == {
        ("tokens/s", True, 2, 2)
    }
    computing = [*batches.batch(Settings(Path(), runs=1, quick=True, processor_time=True))]
    assert {row.unit for row in computing} == {"tokens per processor second"}
    assert len(computing) == len(rows) - 2
