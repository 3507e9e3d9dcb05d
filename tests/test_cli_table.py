"""Tables: complete where there is room, without what matters least where there is not."""

from __future__ import annotations

from mlxqwen.cli.table import Column, table

COLUMNS = (Column("name", least=4), Column("size", right=True, left_out=1), Column("how", left_out=2), Column("state"))
ROWS = (["models/one", "7", "copy", "ready"], ["two", "1,000", "repack", "gone"])


def test_all_of_it() -> None:
    assert table(COLUMNS, ROWS) == (
        "name         size  how     state\n"
        "models/one      7  copy    ready\n"
        "two         1,000  repack  gone\n"
    )  # fmt: skip
    assert table(COLUMNS, ROWS, 32) == table(COLUMNS, ROWS)


def test_long_cells_lose_their_beginning_first() -> None:
    assert table(COLUMNS, ROWS, 28).splitlines() == [
        "name     size  how     state",
        "…s/one      7  copy    ready",
        "two     1,000  repack  gone",
    ]


def test_columns_are_left_out_from_the_highest_number_down() -> None:
    assert table(COLUMNS, ROWS, 25).splitlines()[:2] == ["name         size  state", "models/one      7  ready"]
    assert table(COLUMNS, ROWS, 17).splitlines()[:2] == ["name        state", "models/one  ready"]


def test_what_may_not_be_left_out_stays() -> None:
    assert table(COLUMNS, ROWS, 1).splitlines() == ["name  state", "…one  ready", "two   gone"]
