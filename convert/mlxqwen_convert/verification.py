"""How far what is written is from the dequantized source, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlxqwen_convert import affine
from mlxqwen_convert.affine import Packed
from mlxqwen_convert.errors import VerificationError
from mlxqwen_convert.plan import Plan, PlannedModule

if TYPE_CHECKING:
    from mlxqwen_convert.bfloat16 import Quantized
    from mlxqwen_convert.kept_codes import Found

__all__ = ["ModuleError", "check_errors", "compare", "error_of_bfloat16", "error_of_kept_codes"]

# A number's distance from the nearest one in a dtype, relative to it: half a unit in the last place.
_HALF_ULP = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 0.0}
_FAULTY = "The disk or the memory may be faulty. Convert again, and tell the developers if this comes back."
# Arrays of MLX or NumPy.
Magnitudes = TypeVar("Magnitudes", bound=Any)
# Half of the smallest number above zero, where weights come near it.
_SMALLEST = {"BF16": 0.0, "F16": 2.0**-25, "F32": 0.0}
# Half of the smallest number above zero of BF16.
_SUBNORMAL = 2.0**-134
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
    def relative(self) -> float | None:
        """The error's norm over the weights' norm; None for an error of weights that are all 0."""
        return _ratio(self.squared_error, self.squared_norm)

    @property
    def bound(self) -> float | None:
        """What `relative` may be at most; None for weights that are all 0."""
        return _ratio(self.squared_bound, self.squared_norm)

    def add(self, other: ModuleError) -> None:
        """Sum up, task by task."""
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.squared_bound += other.squared_bound
        self.codes += other.codes


def _ratio(part: float, whole: float) -> float | None:
    if not part:
        return 0.0
    return math.sqrt(part / whole) if whole else None


def compare(expected: mx.array, written: tuple[mx.array, ...], planned: PlannedModule, plan: Plan) -> mx.array:
    """The sums of a `ModuleError`, float32 `[3]`, not evaluated yet.

    They are those of the squared differences, of the squared weights and of what the squared differences may come to.

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
        return mx.stack([error, norm, bound])
    packed, group_size, bits = Packed(*written), planned.target.group_size, planned.target.bits
    difference = expected - affine.dequantize(packed, group_size, bits)
    scales, biases = mx.abs(packed.scales.astype(mx.float32)), mx.abs(packed.biases.astype(mx.float32))
    # Nearest codes are off by half a step at most; at the ends of the range a rounded scale or bias moves what can be
    # reached. A search gives up the ends of the range for a smaller error in all.
    reach = 2 * (_rounding(scales, biases, bits, plan.dtype) + smallest)
    reach = reach + scales * (1.0 if plan.options.quality else 0.5)
    return mx.stack([affine.sum_of_squares(difference), norm, affine.sum_of_squares(reach) * group_size])


def error_of_bfloat16(found: Quantized) -> ModuleError:
    """What `compare` finds for nearest codes with BF16 scales, from sums that are at hand."""
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


def error_of_kept_codes(found: Found, planned: PlannedModule, dtype: str, rows: tuple[int, int]) -> ModuleError:
    """The sums for codes that were kept, which differ from the source by what rounding their scales and biases does.

    Raises:
        VerificationError: codes are not the source's, or a scale or a bias is not the nearest to its own.
    """
    import numpy as np  # not all conversions need it

    target, where = planned.target, f"between rows {rows[0]} and {rows[1]}"
    if target is None:
        raise VerificationError(f"{planned.module.path}: has no codes to compare", hint=_FAULTY)
    if not found.codes_are_kept:
        raise VerificationError(f"{planned.module.path}: repacked codes differ from the source's {where}", hint=_FAULTY)
    relative, absolute = 2 * _HALF_ULP[dtype] + 2.0**-23, max(_SMALLEST[dtype], _SUBNORMAL)
    for errors, own in ((found.scale_errors, found.scales), (found.bias_errors, found.biases)):
        if not (np.abs(errors) <= relative * np.abs(own) + absolute).all():
            raise VerificationError(
                f"{planned.module.path}: scales or biases differ from the source's {where}", hint=_FAULTY
            )
    count = (rows[1] - rows[0]) * planned.module.width
    smallest = min(_SMALLEST[dtype], _LOST_TO_SMALLNESS * math.sqrt(found.squared_norm / count))
    reach = 2 * (_rounding(np.abs(found.scales), np.abs(found.biases), target.bits, dtype) + smallest)
    bound = float(np.square(reach).sum()) * target.group_size
    return ModuleError(found.squared_error, found.squared_norm, bound, count)


def check_errors(errors: Mapping[str, ModuleError]) -> None:
    """Raises `VerificationError` for a module whose error is beyond its bound."""
    for path, error in errors.items():
        if not error.squared_error <= error.squared_bound:
            found, most = (
                f"{math.sqrt(squares):.3g} in all" if share is None else f"{share:.3%}"
                for squares, share in ((error.squared_error, error.relative), (error.squared_bound, error.bound))
            )
            raise VerificationError(
                f"{path}: what was written is off by {found}, expected at most {most}",
                hint=f"If its weights are too small for float16, choose --dtype float32. Else: {_FAULTY}",
            )
