"""Conversions with and without verifying: BF16 → 4-bit beside mlx_lm.convert, and what a weight of each form takes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.checkpoints import checkpoint, source_checkpoint
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.machine import has_mlx_lm
from benchmarks.processes import Run, python, timed
from benchmarks.settings import Settings
from mlxqwen_convert import convert as run_conversion

__all__ = ["convert"]

_PEER = "mlx_lm.convert"
_FORMS = {"bf16": "BF16 → 4-bit", "fp8": "FP8 → 8-bit", "awq": "AWQ, repacked", "gptq": "GPTQ, repacked"}
_LAYERS, _VOCABULARY = 4, 2048  # of which the embeddings, which most forms leave alone, are a small part


def convert(settings: Settings) -> Iterator[Comparison]:
    """Seconds, and the most memory that a process held; nanoseconds of processor time a weight, by form."""
    for shape in settings.all_shapes():
        yield from _rows(settings, shape)
        yield from _forms(settings, shape)


def _forms(settings: Settings, shape: str) -> Iterator[Comparison]:
    """Of all threads together, in one process; each form beside BF16 in the same turn."""
    layers, output = settings.layers or _LAYERS, settings.work / "converted"
    name = f"convert, {shape.removeprefix('Qwen3-')}, {layers} layers, a weight, processor time"
    sources = {
        label: source_checkpoint(settings, form, shape=shape, layers=layers, vocabulary=_VOCABULARY)
        for form, label in _FORMS.items()
    }
    turns = settings.turns(3)
    for way in ("verified", "--no-verify"):

        def told(turn: int, way: str = way) -> None:
            settings.tell(f"{name}, {way}: turn {turn} of {turns}")

        sides = [partial(_nanoseconds, source, output, verify=way == "verified") for source in sources.values()]
        plain, *others = take_turns(sides, turns, told)
        beside, *labels = sources
        yield Comparison(f"{name}, {beside}, {way}", "", "ns", plain)
        for label, numbers in zip(labels, others, strict=True):
            yield Comparison(f"{name}, {label}, {way}", f"{beside}, {way}", "ns", numbers, plain)


def _nanoseconds(source: Path, output: Path, *, verify: bool) -> float:
    started = time.process_time()
    report = run_conversion(source, output, verify=verify)
    seconds = time.process_time() - started
    shutil.rmtree(output)
    return seconds * 1e9 / report.parameters


def _rows(settings: Settings, shape: str) -> Iterator[Comparison]:
    source, output = checkpoint(settings, None, shape=shape), settings.work / "converted"
    ours = python("-m", "mlxqwen", "convert", source, output, "--bits", "4")
    theirs = python("-m", "mlx_lm", "convert", "--hf-path", source, "--mlx-path", output, "-q")
    commands = {"verified": ours, "--no-verify": [*ours, "--no-verify"]}
    if has_mlx_lm():
        commands[_PEER] = theirs
    runs: dict[str, list[Run]] = {side: [] for side in commands}

    def seconds(side: str, command: list[str]) -> float:
        run = timed(command)
        shutil.rmtree(output)
        runs[side].append(run)
        return run.time(settings)

    turns = settings.turns(3)
    name = f"convert, {source.name.removeprefix('Qwen3-')}, BF16 → 4-bit"
    numbers = take_turns(
        [partial(seconds, side, command) for side, command in commands.items()],
        turns,
        lambda turn: settings.tell(f"{name}: turn {turn} of {turns}" if turn else f"{name}: warm"),
    )
    times = dict(zip(commands, numbers, strict=True))
    peaks = {side: [run.peak_bytes / 2**20 for run in some[-turns:]] for side, some in runs.items()}
    for way in ("verified", "--no-verify"):
        for end, unit, table in (("", "s", times), (": memory", "MiB", peaks)):
            yield from compared(f"{name}, {way}{end}", unit, {s: table[s] for s in (way, _PEER) if s in table})
