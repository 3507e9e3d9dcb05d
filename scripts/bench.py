"""Measure mlxqwen beside mlx-lm: same machine, same weights, same run, turn by turn.

Prints a markdown table of medians, and of the ratios of the turns; some parts print tables of their own. Nothing is
installed or downloaded; mlx-lm and the real Qwen3 tokenizer come with the `dev` extra. Weights are random, of true
shapes, or the demo model's; both sides read one folder.

With --check nothing is timed: counts of work, done on MLX's CPU stream everywhere, are held to a committed baseline.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.baseline import BASELINE, Baseline, changes, report
from benchmarks.comparison import HEAD
from benchmarks.machine import describe, missing_packages
from benchmarks.parts import PARTS, PartError, run_part
from benchmarks.processes import ROOT, own_cache
from benchmarks.settings import Settings

NOTES = """\
Ratios above one are in mlxqwen's favour; medians of turns, and the quartiles of the turns' ratios. A first turn that
warms disk and caches is not counted. Both sides get the same ids, decode the same number of tokens, greedily where
nothing else is said, and know no end tokens. On a CPU mlxqwen computes in float32, mlx-lm as the checkpoint says, in
bfloat16; "mlx-lm set to float32" computes as mlxqwen does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    check(parser, options)
    if options.check or options.update_baseline:
        return check_counts(update=options.update_baseline)
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
    """Run the parts and print the table → the exit status."""
    if missing := missing_packages():
        print(f"bench: {' and '.join(missing)} not installed: pip install -e '.[dev]'", file=sys.stderr)
        return 1
    names = options.names or [name for name, part in PARTS.items() if part.by_default]
    names = sorted(names, key=lambda name: PARTS[name].has_table)  # the lines of the common table come first
    print(describe(), flush=True)
    if not PARTS[names[0]].has_table:
        clock = "Seconds of processor time. " if options.processor_time else ""
        print(f"\n{clock}{NOTES}\n\n{HEAD}", flush=True)
    failed = False
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="mlxqwen-bench-") as work,
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
        for name in names:
            settings.tell(f"{name}, about {PARTS[name].minutes:g} min on two slow cores")
            try:
                for row in run_part(name, settings):
                    print(row.markdown(), flush=True)
            except PartError as error:
                failed = True
                print(f"bench: {error}", file=sys.stderr)
    return int(failed)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parts = "\n".join(f"  {name:13} {part.what}" for name, part in PARTS.items())
    total = sum(part.minutes for part in PARTS.values() if part.by_default)
    others = ", ".join(name for name, part in PARTS.items() if not part.by_default)
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog=f"parts:\n{parts}\n\nAll but {others} run by default, in about {total:g} minutes on two slow cores.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="PART", help="what to measure; see below")
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
    for name in options.names:
        if name not in PARTS:
            parser.error(f"{name}: no such part; there are {', '.join(PARTS)}")
    if options.shape and not missing_packages():
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
