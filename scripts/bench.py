"""Measure mlxqwen beside mlx-lm: same machine, same weights, same run, interleaved.

Prints a markdown table of medians and ratios. Nothing is installed or downloaded; mlx-lm and the real Qwen3 tokenizer
come with the `dev` extra.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "How many r's in strawberry?"


@dataclass(frozen=True)
class Run:
    """One process: wall-clock seconds and the most memory it held, in bytes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, for mlxqwen and for something else."""

    name: str
    other: str
    ours: Sequence[Run]
    theirs: Sequence[Run]

    def markdown(self) -> str:
        ours, theirs = (statistics.median(run.seconds for run in runs) for runs in (self.ours, self.theirs))
        memory = [statistics.median(run.peak_bytes for run in runs) / 2**20 for runs in (self.ours, self.theirs)]
        return (
            f"| {self.name} | {self.other} | {ours:.3f} s | {theirs:.3f} s | {theirs / ours:.1f} × "
            f"| {memory[0]:.0f} MiB | {memory[1]:.0f} MiB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 runs a side instead of 15")
    parser.add_argument("--runs", type=int, help="so many runs a side; of conversions 3")
    commands = parser.add_subparsers(dest="command")
    conversions = commands.add_parser("convert", help="BF16 → 4-bit beside mlx_lm.convert, on random weights")
    conversions.add_argument("--shape", action="append", help="a release's name; Qwen3-0.6B by default; repeatable")
    conversions.add_argument("--layers", type=int, help="only so many layers of it")
    conversions.add_argument("--folder", type=Path, help="where to write; the system's temporary folder by default")
    arguments = parser.parse_args()
    default = 3 if arguments.quick or arguments.command == "convert" else 15
    runs = arguments.runs if arguments.runs is not None else default
    if runs < 1:
        parser.error("--runs: at least 1")
    if arguments.command == "convert":
        shapes = arguments.shape or ["Qwen3-0.6B"]
        print_table(
            [row for shape in shapes for row in conversion_rows(shape, arguments.layers, arguments.folder, runs)], runs
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: a child's peak memory counts what its parent held when it was started.
        writer = [sys.executable, str(ROOT / "scripts" / "small_model.py"), folder]
        if status := subprocess.run(writer, env=environment()).returncode:
            sys.exit(status)
        rows = cold_starts(Path(folder), runs)
    print_table(rows, runs)


def print_table(rows: Sequence[Row], runs: int) -> None:
    print(heading(runs))
    for row in rows:
        print(row.markdown())


def heading(runs: int) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm", "tokenizers"))
    return (
        f"{versions}; Python {platform.python_version()}; {platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.system()}. Whole processes, medians of {runs} interleaved runs. The model has bfloat16 weights; on "
        "a CPU mlxqwen computes in float32, mlx-lm in bfloat16.\n\n"
        "| what | beside | mlxqwen | the other | ratio | peak | the other's peak |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )


def cold_starts(model: Path, runs: int) -> list[Row]:
    """Importing, and answering with one token from a standing start."""
    common = ["--model", str(model), "--prompt", PROMPT, "--max-tokens", "1", "--temp", "0.6"]
    theirs_generate = [sys.executable, "-m", "mlx_lm", "generate", *common, "--top-p", "0.95", "--top-k", "20"]
    ours_generate = [sys.executable, "-m", "mlxqwen", "generate", PROMPT, "--model", str(model), "--max-tokens", "1"]
    pairs = [
        ("import", "mlx_lm", importing("mlxqwen"), importing("mlx_lm")),
        ("import", "mlx.core", importing("mlxqwen"), importing("mlx.core")),
        ("one token, 2 layers, real tokenizer", "mlx_lm.generate", ours_generate, theirs_generate),
    ]
    return [Row(name, other, *interleaved(ours, theirs, runs)) for name, other, ours, theirs in pairs]


def conversion_rows(shape: str, layers: int | None, folder: Path | None, runs: int) -> list[Row]:
    """BF16 → 4-bit with and without reading everything back, each beside mlx_lm.convert."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, output = Path(work) / "source", Path(work) / "output"
        size = [] if layers is None else ["--layers", str(layers)]
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), "--shape", shape, *size, str(source)],
            check=True,
            env=environment(),
        )
        theirs = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(output), "-q"]
        ours = [sys.executable, "-m", "mlxqwen", "convert", str(source), str(output), "--bits", "4"]
        commands = [ours, [*ours, "--no-verify"], theirs]
        timings: list[list[Run]] = [[], [], []]
        for turn in range(runs + 1):
            for command, runs_so_far in zip(commands, timings, strict=True):
                run = timed(command)
                shutil.rmtree(output)
                if turn:  # the first warms the disk cache
                    runs_so_far.append(run)
    name = f"{shape}{'' if layers is None else f', {layers} layers'}, BF16 → 4-bit"
    return [
        Row(f"{name}, verified", "mlx_lm.convert", timings[0], timings[2]),
        Row(f"{name}, --no-verify", "mlx_lm.convert", timings[1], timings[2]),
    ]


def environment() -> dict[str, str]:
    """The packages of this checkout come first, installed or not."""
    paths = [str(ROOT), str(ROOT / "convert"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def importing(module: str) -> list[str]:
    return [sys.executable, "-c", f"import {module}"]


def interleaved(ours: list[str], theirs: list[str], runs: int) -> tuple[list[Run], list[Run]]:
    """One run of each that does not count (it warms the disk cache), then turn by turn."""
    for command in (ours, theirs):
        timed(command)
    both = [(timed(ours), timed(theirs)) for _ in range(runs)]
    return [pair[0] for pair in both], [pair[1] for pair in both]


def timed(command: list[str]) -> Run:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment())
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors.decode()}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit)


if __name__ == "__main__":
    main()
