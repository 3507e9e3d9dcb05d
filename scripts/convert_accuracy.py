"""Convert the demo model every way and print how often it is still right, as a markdown table.

    PYTHONPATH=.:convert python scripts/convert_accuracy.py --n 100 --seed 1

FP8, AWQ and GPTQ sources are the demo's weights in those forms, made by the round-to-nearest encoders of
`tests/convert`. The error is that of the feed-forward weights, relative to the source.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eval_demo import accuracy

from mlxqwen import load
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen_convert import Report, convert
from tests.convert.checkpoints import make_demo

TASKS = ("count", "sum")


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


NAMES = {"bf16": "BF16", "fp8": "FP8", "awq": "AWQ 4-bit", "gptq": "GPTQ 4-bit"}
WAYS = (
    *(Way("bf16", bits) for bits in (8, 6, 5, 4, 3, 2)),
    *(Way("bf16", bits, quality=True) for bits in (4, 3, 2)),
    Way("fp8", 8),
    Way("awq"),
    Way("gptq"),
)


def marks(folder: Path, n: int, seed: int) -> str:
    """Accuracy of the model in `folder`, a cell for each task."""
    model, tokenizer = load(folder)
    return " | ".join(_percent(accuracy(model, tokenizer, task, "thinking", n, seed)) for task in TASKS)


def feed_forward_error(report: Report) -> float:
    """The relative error of the feed-forward weights."""
    errors = [row.relative_error for row in report.kinds if row.kind == "mlp"]
    assert len(errors) == 1
    assert errors[0] is not None
    return errors[0]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="exercises for each cell")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| from | to | bits a weight | error |", " | ".join(TASKS), "|")
    print("| --- | --- | ---: | ---: |", " | ".join("---:" for _ in TASKS), "|")
    print(f"| BF16 | as it is | 16 | | {marks(DEMO_FOLDER, options.n, options.seed)} |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for number, way in enumerate(WAYS):
            source, output = DEMO_FOLDER, Path(name) / str(number)
            if way.form != "bf16":
                source = make_demo(Path(name) / way.form, way.form).folder
            report = convert(source, output, bits=way.bits, quality=way.quality)
            cells = (
                NAMES[way.form],
                way.target,
                f"{report.bits_per_weight:.2f}",
                _percent(feed_forward_error(report)),
                marks(output, options.n, options.seed),
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
