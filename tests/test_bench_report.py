"""Reports of the benchmark: written with each line, read again as they were, bounded in time, and without names."""

from __future__ import annotations

import getpass
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench
import pytest
from benchmarks import budget, parts, prefixes, scheduling
from benchmarks.budget import Budget
from benchmarks.comparison import Comparison, Point, Table
from benchmarks.machine import Machine
from benchmarks.plot import Curve, curves_of, small_svg
from benchmarks.processes import ROOT
from benchmarks.report import ON_METAL, PartRecord, Report, ReportError, anonymous
from benchmarks.settings import Settings

from mlxqwen.files.hub import DEMO_FOLDER

MAC = Machine(
    chip="Apple M3 Max",
    is_gpu=True,
    memory=64 << 30,
    usable_memory=48 << 30,
    cores=16,
    system="macOS 15.1 arm64",
    blas="MLX's own",
    python="3.12.1",
    mlxqwen="0.1.0 abcdef0",
    versions={"mlx": "0.32.4", "mlx-lm": "", "tokenizers": "0.23.3"},
)
ROW = Comparison("decode", "mlx-lm", "ms", [2.0, 4.0, 3.0], [6.0, 6.0, 6.0], point=Point("context", "0.6B", 256))
ALONE = Comparison("batch of 8", "", "tokens/s", [30.0], more_is_better=True, point=Point("rows", "demo", 8))
TABLE = Table("Draws", ("what", "number"), [("one", "1")])


def full_report() -> Report:
    """With a part of each kind."""
    return Report(
        MAC,
        date="2026-01-02",
        parts=[
            PartRecord("decode", rows=[ROW], seconds=1.5, load_before=0.25, load_after=1.0, processors=1.0),
            PartRecord("batch", rows=[ALONE], quick=True, is_busy=True, load_after=30.0),
            PartRecord("draws", tables=[TABLE]),
            PartRecord("moe", outcome="failed", note="killed"),
            PartRecord("memory", outcome="left out", note="no time was left"),
        ],
    )


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    full_report().write(path)
    read = Report.read(path)
    assert read.markdown() == full_report().markdown()
    assert [vars(part) | {"tables": [], "rows": []} for part in read.parts] == [
        vars(part) | {"tables": [], "rows": []} for part in full_report().parts
    ]
    (row,) = json.loads(path.read_text())["parts"][0]["rows"]
    assert (row["ours_median"], row["ours_quartiles"], row["turns"]) == (3.0, [2.5, 3.5], 3)
    assert (row["ratios_median"], row["ratios_quartiles"]) == (2.0, [1.75, 2.5])


def test_the_tables_of_a_report_by_hand() -> None:
    text = full_report().markdown()
    assert text.startswith(
        "mlx 0.32.4, mlx-lm not installed, tokenizers 0.23.3; Python 3.12.1; macOS 15.1 arm64, 16 cores"
    )
    assert ON_METAL in text
    calm, busy = text.split("While other programs ran:")
    assert "| decode | mlx-lm | 3.00 ms | 6.00 ms | 2.00 × | 1.75–2.50 | 3 |" in calm
    assert "| batch of 8 |  | 30.0 tokens/s |  |  |  | 1 |" in busy
    assert busy.endswith("Not measured, or not whole:\n\n- moe: failed: killed\n- memory: left out: no time was left")


def test_what_json_does_not_know_comes_back(tmp_path: Path) -> None:
    row = Comparison("longest wait", "mlx-lm", "ms", [1.0], [float("inf")])
    Report(MAC, parts=[PartRecord("serve", rows=[row])]).write(tmp_path / "report.json")
    assert [*Report.read(tmp_path / "report.json").rows()] == [row]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("[", "no JSON"),
        ("[1]", "format None, expected a report"),
        ('{"format": 2}', "format 2, expected"),
        ('{"format": 1, "date": "", "clock": "wall"}', "damaged"),
        ({"parts": [{"name": "x", "rows": [], "tables": [], "surprise": 1}]}, "damaged"),
        ({"parts": [{"name": "x", "tables": [], "rows": [{"what": "w"}]}]}, "damaged"),
    ],
)
def test_what_is_no_report_is_told(
    damage: str | dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    full_report().write(path)
    text = damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage)
    path.write_text(text)
    assert bench.main(["table", str(path)]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ReportError, match="cannot be read"):
        Report.read(tmp_path / "none.json")


def test_an_odd_number_of_ratios_is_damage(tmp_path: Path) -> None:
    full_report().write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    content["parts"][0]["rows"][0]["theirs"].append(1.0)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ReportError, match="damaged: ValueError"):
        Report.read(tmp_path / "report.json")


def test_a_strangers_report_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Report(MAC, parts=[PartRecord("x", note="\x1b[2J")]).write(tmp_path / "report.json")
    assert bench.main(["table", str(tmp_path / "report.json")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_errors_name_no_folder_and_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    text = f"{ROOT}/scripts/bench.py: '{Path.home()}/models/x' and /Users/ada/secret/y.json: no, ada, 3 s/token or 1/2"
    assert anonymous(text) == "scripts/bench.py: 'models/x' and y.json: no, user, 3 s/token or 1/2"
    assert len(anonymous("long " * 1000)) < 500


def test_the_machine_of_a_report_names_nobody() -> None:
    machine = Machine.of_this()
    text = json.dumps(vars(machine))
    assert machine.memory > 0
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def test_parts_share_the_time_by_what_they_usually_take(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    some = {name: parts.Part("", "", "", minutes) for name, minutes in (("a", 1), ("b", 3))}
    monkeypatch.setattr(budget, "PARTS", some)
    bounded = Budget(2.0, began=0.0)
    assert bounded.share(["a", "b"]) == 30.0
    assert Budget.is_short("a", 30.0)
    seconds[0] = 10.0  # the first was quick: the other has the rest
    assert bounded.share(["b"]) == 110.0
    seconds[0] = 116.0
    assert bounded.share(["b"]) == 0.0
    assert Budget(None).share(["a"]) is None
    assert not Budget.is_short("b", None)


def test_a_run_is_written_line_by_line_and_survives_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"

    def run_part(name: str, settings: Settings, deadline: float | None) -> Iterator[Comparison | Table]:
        assert deadline is not None
        assert settings.quick
        if name == "load":
            raise parts.PartError("load: RuntimeError: no memory")
        yield ROW
        assert [*Report.read(path).rows()][-1] == ROW
        if name == "decode":
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_part", run_part)
    monkeypatch.setattr(bench, "describe", lambda machine: "here")
    assert bench.main(["import", "load", "decode", "sample", "--minutes", "1", "--report", str(path)]) == 130
    assert "broken off" in capsys.readouterr().err
    found = [(part.name, part.outcome, part.note, len(part.rows)) for part in Report.read(path).parts]
    assert found == [
        ("import", "measured", "", 1),
        ("load", "failed", "RuntimeError: no memory", 0),
        ("decode", "failed", "broken off", 1),
    ]
    assert bench.main(["import", "--minutes", "0.05", "--report", str(path)]) == 0
    assert [(part.outcome, part.note) for part in Report.read(path).parts] == [("left out", "no time was left")]


def test_all_is_bounded_and_what_cannot_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Any] = []

    def measure(options: Any) -> int:
        measured.append(options)
        return 0

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main(["all", "--report", str(tmp_path / "report.json")]) == 0
    assert bench.main(["all", "--minutes", "3"]) == 0
    assert bench.main([]) == 0
    assert [(one.names, one.minutes) for one in measured] == [([], 10.0), ([], 3.0), ([], None)]
    for arguments in (
        ["table"],
        ["all", "load"],
        ["--report", "/no/such/r.json"],
        ["--plot", "x.txt"],
        ["--minutes", "0"],
    ):
        with pytest.raises(SystemExit) as left:
            bench.main(arguments)
        assert left.value.code == 2
    assert "expected one report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("load", "own", "is_busy"), [(1.1, 1.0, False), (30.0, 1.0, True), (1.9, 0.1, False), (40.0, 39.0, False)]
)
def test_other_programs_show_in_the_load(
    load: float, own: float, is_busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert bench.others_compute(PartRecord("x", load_after=load, processors=own), 0.0) == is_busy
    assert bench.others_compute(PartRecord("x", load_before=load), own) == is_busy  # what it left in the average


SLEEPING = """
import subprocess, sys, time
from benchmarks.comparison import Comparison

def sleep(settings):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield Comparison(str(child.pid), "x", "s", [1.0], [1.0])
    time.sleep(60)
"""


def test_a_part_is_stopped_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package" / "benchmarks"
    package.mkdir(parents=True)
    for source in (ROOT / "scripts" / "benchmarks").glob("*.py"):
        (package / source.name).symlink_to(source)
    (package / "sleeping.py").write_text(SLEEPING)
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])  # which a part's process gets
    monkeypatch.setitem(parts.PARTS, "sleep", parts.Part("sleeping", "sleep", "", 1))
    with pytest.raises(parts.PartError, match="sleep: stopped, as its time was over"):
        next(parts.run_part("sleep", Settings(tmp_path), time.monotonic()))
    lines = parts.run_part("sleep", Settings(tmp_path), time.monotonic() + 60)
    line = next(lines)
    assert isinstance(line, Comparison)
    lines.close()
    for _ in range(50):
        state = subprocess.run(["ps", "-o", "stat=", "-p", line.what], capture_output=True, text=True).stdout.strip()
        if state in ("", "Z"):
            return
        time.sleep(0.1)
    os.kill(int(line.what), signal.SIGKILL)
    pytest.fail("the process that the part started is still there")


def test_curves_are_medians_by_panel() -> None:
    rows = [
        Comparison(
            "", "mlx-lm", "tokens/s", [10.0, 30.0, 20.0], [5.0], more_is_better=True, point=Point("rows", "d", 8)
        ),
        Comparison("", "mlx-lm", "tokens/s", [4.0], [2.0], more_is_better=True, point=Point("rows", "d", 1)),
        Comparison("", "mlx-lm", "ms", [2.0], [4.0], point=Point("context", "0.6B", 256)),
        Comparison("no point", "mlx-lm", "ms", [2.0], [4.0]),
    ]
    assert curves_of(rows) == {
        ("rows", "d"): [Curve("mlxqwen", [1, 8], [4.0, 20.0]), Curve("mlx-lm", [1, 8], [2.0, 5.0])],
        ("context", "0.6B"): [Curve("mlxqwen", [256], [500.0]), Curve("mlx-lm", [256], [250.0])],
    }


def test_a_plot_is_drawn_from_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    full_report().write(tmp_path / "report.json")
    path = tmp_path / "plot.svg"
    assert bench.main(["table", str(tmp_path / "report.json"), "--plot", str(path)]) == 0
    drawn = path.read_bytes()
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert len(drawn) < 30_000
    assert re.search(rb"\d\.\d{3}", drawn) is None
    assert b"matplotlib.org" not in drawn
    assert b">replies at once</text>" in drawn
    assert bench.main(["table", str(tmp_path / "report.json"), "--plot", str(path)]) == 0
    assert path.read_bytes() == drawn
    Report(MAC).write(tmp_path / "report.json")
    assert bench.main(["table", str(tmp_path / "report.json"), "--plot", str(path)]) == 1
    assert "found no rows for a plot" in capsys.readouterr().err


def test_an_svg_has_ids_that_are_counted() -> None:
    """Matplotlib's are hashes, which change with the picture; what refers to them goes with them."""
    svg = """<?xml version="1.0"?>
    <svg version="1.1"><!-- a note -->
     <g id="line2d_1"><path id="m0123456789" d="M 1.23456 -2.000001 L 3.10 4"/></g>
     <g id="patch_2" clip-path="url(#pabcdefabcd)"><use href="#m0123456789"/></g>
     <clipPath id="pabcdefabcd"/>
    </svg>"""
    assert small_svg(svg) == (
        '<?xml version="1.0" encoding="utf-8"?>\n<svg version="1.1"><g><path id="i0" d="M 1.23 -2 L 3.1 4"/></g>\n'
        '<g clip-path="url(#i1)"><use href="#i0"/></g>\n<clipPath id="i1"/>\n</svg>'
    )


def test_steps_of_more_replies_stand_beside_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_SIZES", (1, 3))
    monkeypatch.setattr(scheduling, "_LAYERS", (1,))
    alone, beside = scheduling.scheduler(Settings(Path(), runs=2))
    assert alone.what == "scheduler: host time of a step, 1 layer, 1 running"
    assert alone.is_alone
    assert (beside.beside, beside.theirs) == ("1 running", alone.ours)
    assert len(beside.ours) == 2


def test_hits_of_the_prefix_store_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "few_layers", lambda settings, bits: ("demo", None, DEMO_FOLDER))
    monkeypatch.setattr(prefixes, "prompt_ids", lambda count: [n % 100 for n in range(count)])
    for name, tokens in (("_HELD", 64), ("_RESTORED", 48), ("_READ", 16)):
        monkeypatch.setattr(prefixes, name, tokens)
    found, copied, restored = prefixes.prefix(Settings(tmp_path, runs=2))
    assert (found.beside, found.theirs) == ("a bound", [50.0, 50.0])
    assert copied.what.startswith("prefix store, 64 tokens, demo: copying a hit of")
    assert restored.beside == "3 times reading 16"
    assert not [*tmp_path.iterdir()]
