"""What a conversion did: `conversion_report.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mlxqwen_convert.plan import Plan
from mlxqwen_convert.verification import ModuleError

__all__ = ["KindRow", "Report", "kind_rows"]

_KINDS = ("embeddings", "attention", "mlp", "router", "experts", "lm_head", "norms")


@dataclass(frozen=True, slots=True)
class KindRow:
    """All modules of one kind that go the same way.

    `relative_error` and `codes_kept` are those of all its modules together; None where nothing was compared. Weights
    that are all 0 and do not come back as 0 have no relative error: `absolute_error` is the root mean square of theirs.
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
    absolute_error: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did, as `conversion_report.json` has it.

    Args:
        output: the folder; empty for a dry run.
        modules: by path: format before and after, method, relative error, its bound, codes found equal.
        seconds: wall-clock, of this run alone where an earlier one was resumed.
        refusal: why the conversion itself would be refused, after a dry run; None if nothing is in its way.
        hint: the way out of that.
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
    refusal: str | None = None
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lasting(self) -> dict[str, Any]:
        """For the output itself: without what differs from run to run and from machine to machine."""
        passing = ("source", "output", "expected_peak_bytes", "seconds", "resumed", "refusal", "hint")
        return {key: value for key, value in self.as_dict().items() if key not in passing}


def kind_rows(plan: Plan, errors: Mapping[str, ModuleError] | None = None) -> tuple[KindRow, ...]:
    """The plan by kind, with the errors if it was verified."""
    rows: dict[tuple[str, str, str, str], list[Any]] = {}
    for planned in plan.modules:
        key = (planned.module.kind, planned.source_label, planned.target_label, planned.method)
        rows.setdefault(key, []).append(planned)
    result = []
    for (kind, source, target, method), members in sorted(rows.items(), key=lambda item: _KINDS.index(item[0][0])):
        total, of_zeros, largest, zeros = ModuleError(), ModuleError(), 0.0, 0
        for planned in members:
            error = ModuleError() if errors is None else errors[planned.module.path]
            if error.relative is not None:
                total.add(error)
                largest = max(largest, error.relative)
            else:
                of_zeros.add(error)
                zeros += planned.module.parameters
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
                None if errors is None or method != "repack" else total.codes + of_zeros.codes,
                _rounded(math.sqrt(of_zeros.squared_error / zeros)) if zeros else None,
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
            entry["relative_error"] = _rounded(error.relative)
            bound = error.bound
            entry["bound"] = _rounded(bound) if bound is not None and math.isfinite(bound) else None
            if error.relative is None:
                entry["absolute_error"] = _rounded(math.sqrt(error.squared_error / planned.module.parameters))
            if planned.method == "repack":
                entry["codes_equal"] = error.codes
        facts[planned.module.path] = entry
    return facts


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
