"""The plot of accuracy against the thinking budget: its numbers rise where the demo is given time to think."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo.plot_budget import BUDGETS, Mark, mark, plot, table


def test_the_table_has_a_row_for_each_budget() -> None:
    marks = {"count": [Mark(0.25, 1.0), Mark(0.99, 0.0)], "sum": [Mark(0.125, 1.0), Mark(1.0, 0.005)]}
    assert table(marks, (8, None)).splitlines() == [
        "| budget | count right | thoughts ended | sum right | thoughts ended |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 8 | 25.0% | 100.0% | 12.5% | 100.0% |",
        "| none | 99.0% | 0.0% | 100.0% | 0.5% |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["count", "sum"])
def test_the_demo_is_right_more_often_the_longer_it_may_think(demo: tuple[Any, Any], task: str) -> None:
    none, some, enough = (mark(*demo, task, budget, n=12, seed=2) for budget in (0, 20, 96))
    assert none.cut == 1.0
    assert 0.5 < some.cut <= 1.0
    assert enough.cut == 0.0
    assert none.right < enough.right
    assert some.right < enough.right
    assert enough.right >= 0.9


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "plot.png"
    plot({task: [Mark(0.5, 0.5)] * len(BUDGETS) for task in ("count", "sum")}, out)
    assert out.read_bytes().startswith(b"\x89PNG")
