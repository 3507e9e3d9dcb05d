"""What a conversion did: `conversion_report.json`, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mlxqwen_convert.plan import Plan
from mlxqwen_convert.verification import ModuleError

__all__ = ["KindRow", "Report", "kind_rows", "plan_table", "size_of"]

_KINDS = ("embeddings", "attention", "mlp", "router", "experts", "lm_head", "norms")


@dataclass(frozen=True, slots=True)
class KindRow:
    """All modules of one kind that go the same way.

    `relative_error` and `codes_kept` are those of all its modules together; None where nothing was compared.
    """

    kind: str
    modules: int
    parameters: int
    source: str
    target: str
    method: str
    source_bytes: int
    target_bytes: int
    relative_error: float | None = None
    largest_error: float | None = None
    codes_kept: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did, as `conversion_report.json` has it.

    Args:
        output: the folder; empty for a dry run.
        modules: by path: format before and after, method, relative error, its bound, codes found equal.
        seconds: wall-clock, of this run alone where an earlier one was resumed.
    """

    source: str
    output: str
    source_format: str
    target: str
    dtype: str
    parameters: int
    source_bytes: int
    target_bytes: int
    bits_per_weight: float
    expected_peak_bytes: int
    verified: bool
    resumed: bool
    seconds: float
    kinds: tuple[KindRow, ...]
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lasting(self) -> dict[str, Any]:
        """For the output itself: without what differs from run to run and from machine to machine."""
        passing = ("source", "output", "expected_peak_bytes", "seconds", "resumed")
        return {key: value for key, value in self.as_dict().items() if key not in passing}


def kind_rows(plan: Plan, errors: Mapping[str, ModuleError] | None = None) -> tuple[KindRow, ...]:
    """The plan by kind, with the errors if it was verified."""
    rows: dict[tuple[str, str, str, str], list[Any]] = {}
    for planned in plan.modules:
        key = (planned.module.kind, planned.source_label, planned.target_label, planned.method)
        rows.setdefault(key, []).append(planned)
    result = []
    for (kind, source, target, method), members in sorted(rows.items(), key=lambda item: _KINDS.index(item[0][0])):
        total, largest = ModuleError(), 0.0
        for planned in members:
            if errors is not None:
                total.add(errors[planned.module.path])
                largest = max(largest, errors[planned.module.path].relative)
        result.append(
            KindRow(
                kind,
                len(members),
                sum(planned.module.parameters for planned in members),
                source,
                target,
                method,
                sum(planned.source_bytes for planned in members),
                sum(planned.target_bytes for planned in members),
                None if errors is None else _rounded(total.relative),
                None if errors is None else _rounded(largest),
                None if errors is None or method != "repack" else total.codes,
            )
        )
    return tuple(result)


def module_facts(plan: Plan, errors: Mapping[str, ModuleError] | None) -> dict[str, dict[str, Any]]:
    """One entry for each module."""
    facts = {}
    for planned in plan.modules:
        entry: dict[str, Any] = {
            "shape": list(planned.module.shape),
            "from": planned.source_label,
            "to": planned.target_label,
            "method": planned.method,
        }
        if errors is not None:
            error = errors[planned.module.path]
            bound = error.bound
            entry["relative_error"] = _rounded(error.relative)
            entry["bound"] = _rounded(bound) if math.isfinite(bound) else None
            if planned.method == "repack":
                entry["codes_equal"] = error.codes
        facts[planned.module.path] = entry
    return facts


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def plan_table(rows: tuple[KindRow, ...]) -> str:
    """A table in plain text: tensors by kind, from → to, sizes, bits a weight, and errors where they are known."""
    verified = any(row.relative_error is not None for row in rows)
    heads = ["kind", "modules", "weights", "from", "to", "how", "before", "after", "bits/w"]
    heads += ["error", "largest"] if verified else []
    lines = [heads]
    for row in rows:
        cells = [row.kind, f"{row.modules:,}", _count(row.parameters), row.source, row.target, row.method]
        cells += [size_of(row.source_bytes), size_of(row.target_bytes), f"{8 * row.target_bytes / row.parameters:.2f}"]
        if verified:
            exact = row.method == "copy" or row.relative_error == 0
            cells += ["exact" if exact else _percent(row.relative_error), "" if exact else _percent(row.largest_error)]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    right = {"modules", "weights", "before", "after", "bits/w", "error", "largest"}
    text = ""
    for line in lines:
        cells = [c.rjust(w) if h in right else c.ljust(w) for c, w, h in zip(line, widths, heads, strict=True)]
        text += "  ".join(cells).rstrip() + "\n"
    return text


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def size_of(nbytes: int) -> str:
    """Bytes for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"
