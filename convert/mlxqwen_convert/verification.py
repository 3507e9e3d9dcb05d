"""What was written, read back from the disk and compared with the dequantized source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxqwen_convert import affine
from mlxqwen_convert.affine import Packed
from mlxqwen_convert.errors import VerificationError
from mlxqwen_convert.formats import mlx_dtype
from mlxqwen_convert.pipeline import TargetFiles, Task, chunks_of, repacked, rows_on_disk, run, tasks_of
from mlxqwen_convert.plan import Plan, PlannedModule
from mlxqwen_convert.source_files import SourceFiles

__all__ = ["ModuleError", "verify"]

# A number's distance from the nearest one in a dtype, relative to it: half a unit in the last place.
_HALF_ULP = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 0.0}
_SMALLEST = {"BF16": 0.0, "F16": 2.0**-25, "F32": 0.0}


@dataclass(slots=True)
class ModuleError:
    """How far one module is from its source.

    Args:
        squared_error: the sum of the squared differences.
        squared_norm: of the source.
        squared_bound: what the squared differences may come to at most.
        codes: codes compared, all equal; 0 where there are none to compare.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    squared_bound: float = 0.0
    codes: int = 0

    @property
    def relative(self) -> float:
        """The error's norm over the weights' norm."""
        return _ratio(self.squared_error, self.squared_norm)

    @property
    def bound(self) -> float:
        """What `relative` may be at most."""
        return _ratio(self.squared_bound, self.squared_norm)

    def add(self, other: ModuleError) -> None:
        """Sum up, task by task."""
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.squared_bound += other.squared_bound
        self.codes += other.codes


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else (0.0 if not part else math.inf)


def verify(
    plan: Plan, source: SourceFiles, target: TargetFiles, workers: int, progress: Callable[[int, int], None]
) -> dict[str, ModuleError]:
    """Compare every tensor; module → its error.

    Raises:
        VerificationError: codes that should have been kept differ, or an error is beyond its bound.
    """
    by_task: dict[Task, ModuleError] = {}
    total = plan.parameters
    seen = 0

    def done(task: Task, error: ModuleError) -> None:
        nonlocal seen
        by_task[task] = error
        seen += (task.stop - task.start) * plan.modules[task.module].module.width
        progress(seen, total)

    run(lambda task: _compare(plan, task, source, target, workers), tasks_of(plan), workers, done)
    errors = {planned.module.path: ModuleError() for planned in plan.modules}
    for task in tasks_of(plan):  # summed in one order, whichever came first
        errors[plan.modules[task.module].module.path].add(by_task[task])
    for path, error in errors.items():
        if not error.squared_error <= error.squared_bound:
            raise VerificationError(
                f"{path}: what was written is off by {error.relative:.3%}, expected at most {error.bound:.3%}",
                hint="The disk or the memory may be faulty. Convert again, and tell the developers if this comes back.",
            )
    return errors


def _compare(plan: Plan, task: Task, source: SourceFiles, target: TargetFiles, workers: int) -> ModuleError:
    planned = plan.modules[task.module]
    part, reader = planned.parts[task.part], planned.readers[task.part]
    total = ModuleError()
    for start, stop in chunks_of(planned, task, workers):
        written = rows_on_disk(planned, task, target, start, stop)
        expected = reader.floats(source, part, start, stop, check=False)
        if planned.target is None:
            total.add(_compare_floats(expected, written[0], plan.dtype))
            continue
        packed = Packed(*written)
        if planned.method == "repack":
            kept = repacked(planned, reader, part, source, (start, stop), mlx_dtype(plan.dtype), check=False)
            if not mx.array_equal(kept.weight, packed.weight).item():
                raise VerificationError(
                    f"{planned.module.path}: codes on disk differ from the source's between rows {start} and {stop}",
                    hint="The disk or the memory may be faulty. Convert again.",
                )
            total.codes += (stop - start) * planned.module.width
        total.add(_compare_packed(expected, packed, planned, plan))
    return total


def _compare_floats(expected: mx.array, written: mx.array, dtype: str) -> ModuleError:
    error, norm = affine.squared_errors(expected, written.astype(mx.float32))
    bound = 8 * norm * _HALF_ULP[dtype] ** 2 + 2 * expected.size * _SMALLEST[dtype] ** 2
    return ModuleError(error, norm, bound)


def _compare_packed(expected: mx.array, packed: Packed, planned: PlannedModule, plan: Plan) -> ModuleError:
    if planned.target is None:
        return ModuleError()
    group_size, bits = planned.target.group_size, planned.target.bits
    scales, biases = packed.scales.astype(mx.float32), packed.biases.astype(mx.float32)
    # Nearest codes are off by half a step at most, repacked ones by what their bias and scale lose when rounded; at
    # the ends of the range a rounded scale or bias moves what can be reached.
    rounding = max(_HALF_ULP[plan.dtype], 2.0**-22) * (mx.abs(biases) + mx.abs(scales) * (2**bits - 1))
    reach = 2 * (rounding + _SMALLEST[plan.dtype])
    if planned.method != "repack":
        # A search gives up the ends of the range for a smaller error in all.
        reach = reach + mx.abs(scales) * (1.0 if plan.options.quality else 0.5)
    difference = expected - affine.dequantize(packed, group_size, bits)
    sums: Any = mx.stack([mx.square(part).sum(axis=-1).sum() for part in (difference, expected, reach)]).tolist()
    return ModuleError(sums[0], sums[1], sums[2] * group_size)
