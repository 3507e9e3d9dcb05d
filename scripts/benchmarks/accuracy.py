"""How often the demo model is still right after each kind of conversion.

FP8, AWQ and GPTQ sources are the demo's weights in those forms, made by the round-to-nearest encoders of
`tests/convert`. The error is that of the feed-forward weights, relative to the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.evaluate import accuracy as share_right

from benchmarks.comparison import Table
from benchmarks.settings import Settings
from mlxqwen import load
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen_convert import Report, convert
from tests.convert.checkpoints import make_demo

__all__ = ["WAYS", "Way", "accuracy", "converted"]

TASKS = ("count", "sum")
_EXERCISES, _SEED = 100, 1
_NAMES = {"bf16": "BF16", "fp8": "FP8", "awq": "AWQ 4-bit", "gptq": "GPTQ 4-bit"}


@dataclass(frozen=True)
class Way:
    """A conversion: the source's form, and bits if they are not the source's own."""

    form: str
    bits: int | None = None
    quality: bool = False

    @property
    def target(self) -> str:
        """What it makes, in words."""
        if self.bits is None:
            return "repacked, 4-bit"
        return f"{self.bits}-bit" + (", `--quality`" if self.quality else "")


WAYS = (
    *(Way("bf16", bits) for bits in (8, 6, 5, 4, 3, 2)),
    *(Way("bf16", bits, quality=True) for bits in (4, 3, 2)),
    Way("fp8", 8),
    Way("awq"),
    Way("gptq"),
)


def accuracy(settings: Settings) -> Table:
    """The demo as it is, and converted each way."""
    count = 10 if settings.quick else _EXERCISES
    rows = [("BF16", "as it is", "16", "", *_marks(DEMO_FOLDER, count))]
    for way in WAYS:
        settings.tell(f"accuracy: {_NAMES[way.form]}, {way.target}")
        rows.append(converted(way, settings.work / "accuracy" / f"{len(rows)}", count))
    columns = ("from", "to", "bits a weight", "error", *TASKS)
    return Table("The demo model after a conversion, right answers", columns, rows, texts=2)


def converted(way: Way, folder: Path, count: int) -> tuple[str, ...]:
    """Cells of one conversion, marked in so many exercises a task; source and output go into the new `folder`."""
    folder.mkdir(parents=True)
    source = DEMO_FOLDER if way.form == "bf16" else make_demo(folder / "source", way.form).folder
    report = convert(source, folder / "out", bits=way.bits, quality=way.quality)
    bits, error = f"{report.bits_per_weight:.2f}", _percent(_feed_forward_error(report))
    return _NAMES[way.form], way.target, bits, error, *_marks(folder / "out", count)


def _marks(folder: Path, count: int) -> list[str]:
    """How often the model in `folder` is right, for each task."""
    model, tokenizer = load(folder)
    return [_percent(share_right(model, tokenizer, task, "thinking", count, _SEED)) for task in TASKS]


def _feed_forward_error(report: Report) -> float:
    (error,) = (row.relative_error for row in report.kinds if row.kind == "mlp")
    if error is None:
        raise ValueError("the report has no error of feed-forward weights: it was made without verifying")
    return error


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
