"""Measure mlxqwen beside mlx-lm: same machine, same weights, same run, turn by turn.

Prints a markdown table of medians, and of the ratios of the turns; some parts print tables of their own. Nothing is
installed or downloaded; mlx-lm and the real Qwen3 tokenizer come with the `dev` extra. Weights are random, of true
shapes, or the demo model's; both sides read one folder.

With --report all is written as JSON too, line by line, with nothing that names the machine's owner.
With --check nothing is timed: counts of work, done on MLX's CPU stream everywhere, are held to a committed baseline.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from benchmarks.baseline import BASELINE, Baseline, changes, report
from benchmarks.budget import Budget
from benchmarks.comparison import HEAD
from benchmarks.machine import Machine, describe, load_average, missing_packages
from benchmarks.parts import PARTS, PartError, run_part
from benchmarks.plot import curves_of, missing_for_plot, write_plot
from benchmarks.processes import ROOT, own_cache
from benchmarks.report import PartRecord, Report, ReportError
from benchmarks.settings import Settings

from mlxqwen.console import spell_out_controls

NOTES = """\
Ratios above one are in mlxqwen's favour; medians of turns, and the quartiles of the turns' ratios. A first turn that
warms disk and caches is not counted. Both sides get the same ids, decode the same number of tokens, greedily where
nothing else is said, and know no end tokens. On a CPU mlxqwen computes in float32, mlx-lm as the checkpoint says, in
bfloat16; "mlx-lm set to float32" computes as mlxqwen does."""
ALL, TABLE = "all", "table"
MINUTES = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    check(parser, options)
    if options.check or options.update_baseline:
        return check_counts(update=options.update_baseline)
    if options.names[:1] == [TABLE]:
        return show(Path(options.names[1]), options.plot)
    if options.names == [ALL]:
        options.names = []
        options.minutes = options.minutes or MINUTES
    return measure(options)


def check_counts(*, update: bool) -> int:
    """Hold the counts to the baseline, or write them as the new one → the exit status."""
    from benchmarks.counts import all_counts

    found = Baseline.of(all_counts())
    changed = changes(Baseline.read(BASELINE), found) if BASELINE.exists() else []
    print(report(changed, len(found.counts), BASELINE.name))
    if update:
        found.write(BASELINE)
        print(f"written: {BASELINE}")
        return 0
    return int(any(change.fails for change in changed))


def measure(options: argparse.Namespace) -> int:
    """Run the parts, print the table, and write the report and the plot as they are asked for → the exit status."""
    budget = Budget(options.minutes)
    if missing := missing_packages():
        told = f"{' and '.join(missing)} not installed: rows that need it are missing, or stand alone"
        print(f"bench: {told}: pip install -e '.[dev]'", file=sys.stderr)
    names = options.names or [name for name, part in PARTS.items() if part.by_default]
    names = sorted(names, key=lambda name: PARTS[name].has_table)  # the lines of the common table come first
    machine = Machine.of_this()
    print(describe(machine), flush=True)
    if not PARTS[names[0]].has_table:
        clock = "Seconds of processor time. " if options.processor_time else ""
        print(f"\n{clock}{NOTES}\n\n{HEAD}", flush=True)
    report = Report(machine, "processors" if options.processor_time else "wall")
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="mlxqwen-bench-", ignore_cleanup_errors=True) as work,
        own_cache(Path(work) / "cache"),
    ):
        settings = Settings(
            Path(work),
            options.runs,
            options.quick,
            options.layers,
            tuple(options.shape or ()),
            options.processor_time,
        )
        try:
            for place, name in enumerate(names):
                run_into(report, name, settings, budget.share(names[place:]), options.report)
        except KeyboardInterrupt:
            print("bench: broken off", file=sys.stderr)
            return 130
    if options.plot is not None and not draw(report, options.plot):
        return 1
    return int(any(part.outcome == "failed" for part in report.parts))


def run_into(report: Report, name: str, settings: Settings, seconds: float | None, path: Path | None) -> None:
    """Run a part for at most so long, print its lines, and write the report with each."""
    part = PartRecord(name, quick=settings.quick or Budget.is_short(name, seconds))
    before = report.parts[-1].processors if report.parts else 0.0
    report.parts.append(part)
    started, computed = time.monotonic(), children_seconds()
    part.load_before = load_average()
    settings.tell(f"{name}, about {PARTS[name].minutes:g} min on two slow cores")
    try:
        if seconds == 0:
            part.outcome, part.note = "left out", "no time was left"
            return
        deadline = None if seconds is None else started + seconds
        with closing(run_part(name, replace(settings, quick=part.quick), deadline)) as lines:
            for line in lines:
                print(line.markdown(), flush=True)
                part.add(line)
                save(report, path)
    except PartError as error:
        part.outcome, part.note = "failed", str(error).removeprefix(f"{name}: ")
        print(f"bench: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        part.outcome, part.note = "failed", "broken off"
        raise
    finally:
        part.seconds = time.monotonic() - started
        part.load_after = load_average()
        part.processors = (children_seconds() - computed) / max(part.seconds, 1e-3)
        part.is_busy = others_compute(part, before)
        save(report, path)


def children_seconds() -> float:
    """What the processes that were waited for have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def others_compute(part: PartRecord, processors_before: float) -> bool:
    """Whether more than a quarter of the cores had work that was not the benchmark's own, now or in the part before."""
    own = max(1.0, part.processors, processors_before)
    return max(part.load_before, part.load_after) - own > 0.25 * (os.cpu_count() or 1)


def save(report: Report, path: Path | None) -> None:
    """Write the report, if one is asked for."""
    if path is not None:
        report.write(path)


def draw(report: Report, path: Path) -> bool:
    """Write the plot, or tell why there is none → whether it is there."""
    panels = curves_of(report.rows())
    if not panels:
        print("bench: --plot: found no rows for a plot, expected those of curves, batch or context", file=sys.stderr)
        return False
    busy = ", while other programs ran" if any(part.is_busy for part in report.parts) else ""
    unit = "tokens/s" if report.clock == "wall" else "tokens per processor second"
    write_plot(path, panels, title=f"{report.machine.short_line()}{busy}", unit=unit)
    return True


def show(path: Path, plot: Path | None) -> int:
    """Print a report's tables, and draw its plot if that is asked for → the exit status."""
    try:
        report = Report.read(path)
    except ReportError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(spell_out_controls(report.markdown()))  # it may be a stranger's
    return 0 if plot is None or draw(report, plot) else 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parts = "\n".join(f"  {name:13} {part.what}" for name, part in PARTS.items())
    total = sum(part.minutes for part in PARTS.values() if part.by_default)
    others = ", ".join(name for name, part in PARTS.items() if not part.by_default)
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog=(
            f"parts:\n{parts}\n\nAll but {others} run by default, in about {total:g} minutes on two slow cores.\n"
            f"`scripts/bench {ALL} --report FILE.json` does that in {MINUTES:g} minutes, with less work in each;\n"
            f"`scripts/bench {TABLE} FILE.json` prints a report's tables again."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="PART", help="what to measure; see below")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.json", help="write what was measured, line by line, as JSON"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw tokens/s by rows and by context")
    parser.add_argument("--minutes", type=float, help=f"stop after so many; {MINUTES:g} for {ALL!r}")
    parser.add_argument("--quick", action="store_true", help="fewer turns and less work in each")
    parser.add_argument("--runs", type=int, help="so many turns in each part")
    parser.add_argument("--layers", type=int, help="models of only so many layers")
    parser.add_argument(
        "--shape", action="append", help="a release's name; Qwen3-0.6B by default; repeatable (convert)"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count what the processors compute, not the clock: for a busy machine without a GPU",
    )
    parser.add_argument("--check", action="store_true", help="compare counts with the baseline; 1 if any got worse")
    parser.add_argument("--update-baseline", action="store_true", help="count, and write the baseline")
    parser.add_argument("--folder", type=Path, help="where to write weights; the system's temporary folder by default")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave with the parser's error for what cannot be."""
    if options.names[:1] == [TABLE]:
        if len(options.names) != 2:
            parser.error(f"{TABLE}: expected one report: scripts/bench {TABLE} FILE.json")
    elif options.names != [ALL]:
        for name in options.names:
            if name not in PARTS:
                parser.error(f"{name}: no such part; there are {', '.join(PARTS)}; or {ALL} alone")
    if options.report is not None and not options.report.parent.is_dir():
        parser.error(f"--report: {options.report.parent} is no folder")
    if options.plot is not None and (problem := missing_for_plot(options.plot)):
        parser.error(f"--plot: {problem}")
    if options.minutes is not None and not options.minutes > 0:
        parser.error("--minutes: expected more than 0")
    if options.shape:
        from make_checkpoint import SHAPES  # not at the start: it imports the packages of this checkout

        for shape in options.shape:
            if shape not in SHAPES:
                parser.error(f"--shape: {shape}: no such release; there are {', '.join(SHAPES)}")
    if options.names and (options.check or options.update_baseline):
        parser.error("--check and --update-baseline count everything: leave out the parts")
    for name in ("runs", "layers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: at least 1")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder: {options.folder} is no folder")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "convert")]  # the packages of this checkout, installed or not
    sys.exit(main())
