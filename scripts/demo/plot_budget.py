"""Plot how often the demo model is right against its thinking budget, and print the numbers as a markdown table.

    python scripts/demo plot_budget --n 100 --seed 1 --out docs/thinking_budget.png

Needs the `plot` extra. Words and numbers are held out from training; replies are drawn in batches, as `evaluate.py`
does, with the same seeds for every budget, so that a larger budget sees the same thoughts for longer.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.data import exercise
from demo.evaluate import replies
from demo.source import Source
from demo.tasks import is_right
from mlxqwen import load
from mlxqwen.chat.thinking import EARLY_STOP_TEXT

TASKS = ("count", "sum")
BUDGETS: tuple[int | None, ...] = (0, 8, 16, 24, 32, 40, 48, 64, 96, None)


@dataclass(frozen=True)
class Mark:
    """The shares of exercises answered right and of thoughts that the budget ended."""

    right: float
    cut: float


def mark(model: Any, tokenizer: Any, task: str, budget: int | None, n: int, seed: int) -> Mark:
    """How `n` held-out exercises of `task` go with at most `budget` tokens of thought."""
    source = Source(random.Random(seed), "held-out")
    exercises = [exercise(task, source) for _ in range(n)]
    asked = [conversation for conversation, _ in exercises]
    said = replies(model, tokenizer, asked, seed, thinking=True, thinking_budget=budget)
    parts = [text.rpartition("</think>") for text in said]
    right = sum(is_right(wanted, answer) for (_, wanted), (_, _, answer) in zip(exercises, parts, strict=True))
    cut = sum(EARLY_STOP_TEXT in thought or budget == 0 for thought, _, _ in parts)
    return Mark(right / n, cut / n)


def table(marks: dict[str, list[Mark]], budgets: tuple[int | None, ...] = BUDGETS) -> str:
    """The marks as markdown: a row for each budget, two columns for each task."""
    heads = " | ".join(f"{task} right | thoughts ended" for task in marks)
    lines = [f"| budget | {heads} |", "| ---: |" + " ---: |" * 2 * len(marks)]
    for place, budget in enumerate(budgets):
        cells = " | ".join(f"{row[place].right:.1%} | {row[place].cut:.1%}" for row in marks.values())
        lines.append(f"| {'none' if budget is None else budget} | {cells} |")
    return "\n".join(lines)


def plot(marks: dict[str, list[Mark]], out: Path) -> None:
    """Draw a curve for each task into the file `out`."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    names = ["no limit" if budget is None else str(budget) for budget in BUDGETS]
    for (task, row), style in zip(marks.items(), ("o-", "s--"), strict=True):
        axes.plot(names, [100 * one.right for one in row], style, markersize=5, label=task)
    axes.set(xlabel="thinking budget, tokens", ylabel="right answers, %", ylim=(0, 104))
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Draw the plot and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder; by default the demo model")
    parser.add_argument("--n", type=int, default=100, help="exercises for each task and budget")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/thinking_budget.png"))
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    marks = {
        task: [mark(model, tokenizer, task, budget, options.n, options.seed) for budget in BUDGETS] for task in TASKS
    }
    print(table(marks))
    plot(marks, options.out)
