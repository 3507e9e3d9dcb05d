"""A run of the benchmark as a JSON file: what was measured, on which machine, and what was not; and as markdown again.

The file is written anew after each line, whole or not at all, so that a run that is broken off leaves what it has.
Nothing in it names the machine's owner.
"""

from __future__ import annotations

import getpass
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.comparison import HEAD, Comparison, Point, Table, quartiles
from benchmarks.machine import Machine
from benchmarks.processes import ROOT
from mlxqwen.files.atomic import write_file

__all__ = ["ON_METAL", "PartRecord", "Report", "ReportError", "anonymous"]

FORMAT = 1
ON_METAL = """\
On a Mac, MLX computes on its GPU, by Metal, and the table differs:

- Both sides compute in what the checkpoint says, bfloat16; there are no rows beside "mlx-lm set to float32".
- mlx-lm is measured in every row: none takes it minutes, as some do on a CPU.
- mlxqwen compiles what lies between two attentions, and queues a step before the last token is read.
- `memory` counts what Metal's allocator rounds to pages; a process's peak has no GPU buffers in it.
- `--processor-time` says nothing there, and the BLAS does not matter."""
_DIGITS = 6  # of numbers in the file
_MOST_OF_AN_ERROR = 400  # characters


class ReportError(Exception):
    """A file that is no report."""


@dataclass
class PartRecord:
    """One part of a run.

    Args:
        name: of the part.
        outcome: "measured", "failed", or "left out"; a part that failed may have some of its lines.
        note: why it failed or was left out.
        quick: whether it took fewer turns and less work in each.
        seconds: that it took.
        load_before, load_after: the system's load average of the last minute.
        processors: how many the benchmark itself kept busy, on average; of programs that it has waited for.
        is_busy: whether other programs computed meanwhile, as far as the load averages tell.
        rows: its lines of the common table.
        tables: its own.
    """

    name: str
    outcome: str = "measured"
    note: str = ""
    quick: bool = False
    seconds: float = 0.0
    load_before: float = 0.0
    load_after: float = 0.0
    processors: float = 0.0
    is_busy: bool = False
    rows: list[Comparison] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def add(self, line: Comparison | Table) -> None:
        """Take what the part has measured."""
        if isinstance(line, Table):
            self.tables.append(line)
        else:
            self.rows.append(line)


@dataclass
class Report:
    """A run.

    Args:
        machine: that it ran on.
        clock: what was counted: "wall" or "processors".
        date: of its start, in UTC.
        parts: in the order in which they were run.
    """

    machine: Machine
    clock: str = "wall"
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d", time.gmtime()))
    parts: list[PartRecord] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it, whole or not at all. Raises `OSError`."""
        parts = [
            {
                **{name: _rounded(value) for name, value in vars(part).items() if name not in ("rows", "tables")},
                "note": anonymous(part.note),
                "rows": [_fields(row) for row in part.rows],
                "tables": [asdict(table) for table in part.tables],
            }
            for part in self.parts
        ]
        content = {"format": FORMAT, "date": self.date, "clock": self.clock, "machine": asdict(self.machine)}
        text = json.dumps(content | {"parts": parts}, indent=1, ensure_ascii=False, allow_nan=False)
        write_file(path, (text + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises `ReportError` for a file that cannot be read or is none of these."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise ReportError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise ReportError(f"{path}: found no JSON, expected a report of scripts/bench") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ReportError(f"{path}: found format {found!r}, expected a report of scripts/bench, format {FORMAT}")
        try:
            parts = [_part(part) for part in content["parts"]]
            return cls(Machine(**content["machine"]), str(content["clock"]), str(content["date"]), parts)
        except (KeyError, TypeError, ValueError, AttributeError, statistics.StatisticsError) as error:
            raise ReportError(f"{path}: damaged: {type(error).__name__}: {error}") from None

    def rows(self) -> Iterable[Comparison]:
        """All lines of the common table."""
        return (row for part in self.parts for row in part.rows)

    def markdown(self) -> str:
        """Machine, common table, the tables of parts, and what was not measured."""
        clock = "by the clock" if self.clock == "wall" else "in processor time"
        pieces = [f"{self.machine.line()}; mlxqwen {self.machine.mlxqwen}. Measured on {self.date}, {clock}."]
        if self.machine.is_gpu:
            pieces.append(ON_METAL)
        kinds = (("", False), ("While other programs ran", True))
        for title, is_busy in kinds:
            rows = [row.markdown() for part in self.parts if part.is_busy == is_busy for row in part.rows]
            if rows:
                pieces += [f"{title}:"] if title else []
                pieces.append("\n".join([HEAD, *rows]))
        pieces += [table.markdown().strip() for part in self.parts for table in part.tables]
        missing = [f"- {part.name}: {part.outcome}: {part.note}" for part in self.parts if part.note]
        if missing:
            pieces.append("\n".join(["Not measured, or not whole:", "", *missing]))
        return "\n\n".join(pieces)


def anonymous(text: str) -> str:
    """An error's words without the folders and the user that it names, and not longer than a few lines."""
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}/", "")
    text = re.sub(r"(?<![\w.])~?(?:/[^\s/'\":,]+)+/", "", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = ""
    if len(user) > 2 and user != "root":
        text = re.sub(rf"\b{re.escape(user)}\b", "user", text)
    return text if len(text) <= _MOST_OF_AN_ERROR else f"… {text[-_MOST_OF_AN_ERROR:]}"


def _fields(row: Comparison) -> dict[str, Any]:
    """A line with all that the table says of it."""
    fields: dict[str, Any] = {"what": row.what, "beside": row.beside, "unit": row.unit, "turns": len(row.ours)}
    for name, side in (("ours", row.ours), ("theirs", row.theirs), ("ratios", row.ratios)):
        fields[name] = _rounded(list(side))
        if side:
            fields[f"{name}_median"] = _rounded(statistics.median(side))
            fields[f"{name}_quartiles"] = _rounded(list(quartiles(side)))
    point = {} if row.point is None else {"point": asdict(row.point)}
    return fields | {"more_is_better": row.more_is_better, **point}


def _rounded(value: Any) -> Any:
    """A number in few digits, None for one that JSON does not know; lists of them; all else as it is."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def _part(fields: Mapping[str, Any]) -> PartRecord:
    rows, tables = ([_row(row) for row in fields["rows"]], [Table(**table) for table in fields["tables"]])
    return PartRecord(**{**fields, "rows": rows, "tables": tables})


def _row(fields: Mapping[str, Any]) -> Comparison:
    point = Point(**fields["point"]) if "point" in fields else None
    row = Comparison(
        str(fields["what"]),
        str(fields["beside"]),
        str(fields["unit"]),
        _numbers(fields["ours"]),
        _numbers(fields["theirs"]),
        more_is_better=bool(fields["more_is_better"]),
        point=point,
    )
    row.markdown()  # as many numbers on both sides, and one at least
    return row


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.inf if value is None else float(value) for value in values]
