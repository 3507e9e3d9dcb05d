"""How far what is written is from the dequantized source, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlxqwen_convert import affine
from mlxqwen_convert.affine import Packed
from mlxqwen_convert.errors import VerificationError
from mlxqwen_convert.plan import Plan, PlannedModule

if TYPE_CHECKING:
    from mlxqwen_convert.bfloat16 import Quantized

__all__ = ["ModuleError", "check_errors", "compare", "error_of", "error_of_bfloat16"]

# A number's distance from the nearest one in a dtype, relative to it: half a unit in the last place.
_HALF_ULP = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 0.0}
_FAULTY = "The disk or the memory may be faulty. Convert again, and tell the developers if this comes back."
# Arrays of MLX or NumPy.
Magnitudes = TypeVar("Magnitudes", bound=Any)
_SMALLEST = {"BF16": 0.0, "F16": 2.0**-25, "F32": 0.0}
# What may be lost to numbers too small for a dtype, relative to the weights' root mean square.
_LOST_TO_SMALLNESS = 0.01


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


def compare(expected: mx.array, written: tuple[mx.array, ...], planned: PlannedModule, plan: Plan) -> mx.array:
    """The sums that `error_of` reads, float32 `[4]`, not evaluated yet.

    They are those of the squared differences, of the squared weights and of what the squared differences may come to,
    and, where codes are kept, how far the worst weight is beyond what rounding explains.

    Args:
        expected: float32 `[rows, width]`, dequantized from the source.
        written: the target's tensors for the same rows.
    """
    norm = affine.sum_of_squares(expected)
    typical = mx.sqrt(norm / expected.size)
    smallest = mx.minimum(mx.array(_SMALLEST[plan.dtype]), _LOST_TO_SMALLNESS * typical)
    if planned.target is None:
        error = affine.sum_of_squares(expected - written[0].astype(mx.float32))
        bound = 8 * norm * _HALF_ULP[plan.dtype] ** 2 + 2 * expected.size * mx.square(smallest)
        return mx.stack([error, norm, bound, mx.array(0.0)])
    packed, group_size, bits = Packed(*written), planned.target.group_size, planned.target.bits
    difference = expected - affine.dequantize(packed, group_size, bits)
    scales, biases = mx.abs(packed.scales.astype(mx.float32)), mx.abs(packed.biases.astype(mx.float32))
    # Nearest codes are off by half a step at most, repacked ones by what their bias and scale lose when rounded; at
    # the ends of the range a rounded scale or bias moves what can be reached.
    rounding = _rounding(scales, biases, bits, plan.dtype)
    reach, beyond = 2 * (rounding + smallest), mx.array(0.0)
    if planned.method == "repack":
        most = 2 * (rounding + _SMALLEST[plan.dtype] * 2**bits)
        beyond = (mx.abs(difference).reshape(*scales.shape, group_size).max(axis=-1) - most).max()
    else:
        # A search gives up the ends of the range for a smaller error in all.
        reach = reach + scales * (1.0 if plan.options.quality else 0.5)
    return mx.stack([affine.sum_of_squares(difference), norm, affine.sum_of_squares(reach) * group_size, beyond])


def error_of_bfloat16(found: Quantized) -> ModuleError:
    """What `compare` and `error_of` find for nearest codes with BF16 scales, from sums that are at hand."""
    import numpy as np  # not all conversions need it

    # A chunk has so many groups that fresh memory for each step would take longer than the steps.
    reach, half_steps = np.abs(found.wide_biases), np.abs(found.wide_scales)
    with np.errstate(over="ignore"):
        reach *= 2 * _rounding(0.0, 1.0, found.bits, "BF16")
        half_steps *= 2 * _rounding(1.0, 0.0, found.bits, "BF16") + 0.5
        reach += half_steps
        reach *= reach
    return ModuleError(found.squared_error, found.squared_norm, float(reach.sum()) * found.group_size)


def _rounding(scales: Magnitudes, biases: Magnitudes, bits: int, dtype: str) -> Magnitudes:
    """By how much a rounded scale and bias may move a weight."""
    moved: Magnitudes = max(_HALF_ULP[dtype], 2.0**-22) * (biases + scales * (2**bits - 1))
    return moved


def error_of(sums: Sequence[float], planned: PlannedModule, rows: tuple[int, int]) -> ModuleError:
    """What `compare` found for some rows. Raises `VerificationError` if codes that should be kept are not."""
    error, norm, bound, beyond = sums
    if planned.method != "repack":
        return ModuleError(error, norm, bound)
    if not beyond <= 0:
        raise VerificationError(
            f"{planned.module.path}: repacked codes differ from the source's between rows {rows[0]} and {rows[1]}",
            hint=_FAULTY,
        )
    return ModuleError(error, norm, bound, (rows[1] - rows[0]) * planned.module.width)


def check_errors(errors: Mapping[str, ModuleError]) -> None:
    """Raises `VerificationError` for a module whose error is beyond its bound."""
    for path, error in errors.items():
        if not error.squared_error <= error.squared_bound:
            raise VerificationError(
                f"{path}: what was written is off by {error.relative:.3%}, expected at most {error.bound:.3%}",
                hint=f"If its weights are too small for float16, choose --dtype float32. Else: {_FAULTY}",
            )
