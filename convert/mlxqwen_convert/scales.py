"""Scales as they come from a file: finite, and zero only where nothing is lost; those of FP8 not negative."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlxqwen_convert.errors import SourceError

__all__ = ["check_scales", "has_infinities", "refuse_lost_scales", "refuse_zero_scales"]

_EXPONENTS = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}
_SMALLEST_NORMAL = 2.0**-126
_TOLERATED_LOSS = 0.01
_HINT = "No quantizer writes such a scale: use another release of the model."


def check_scales(scales: mx.array, name: str, origin: tuple[int, ...] = (), *, signed: bool = False) -> bool:
    """Raises `SourceError` for a scale that is NaN or infinite, or negative unless `signed`; says whether any is zero.

    Args:
        scales: any float dtype and shape.
        name: the tensor's, for the message.
        origin: where `scales` begins in the whole tensor, one index for each dimension; by default at zero.
        signed: whether scales may be negative, as auto-round's are, which reach to the farther end of each group.
    """
    fine = mx.isfinite(scales) if signed else mx.isfinite(scales) & (scales >= 0)
    if not fine.all().item():
        index = first_true(~fine)
        found = scales[index].item()
        expected = "a finite number" if signed else "a finite number that is not negative"
        raise SourceError(f"{name}: scale {shown_index(index, origin)} is {found:g}, expected {expected}", hint=_HINT)
    return bool((scales == 0).any().item())


def has_infinities(floats: mx.array) -> mx.array:
    """Whether a float16, bfloat16 or float32 is infinite or NaN; one bool, not evaluated yet.

    By their exponents as integers: MLX's CPU backend takes twenty times as long for arithmetic in float16.
    """
    words, exponent = _EXPONENTS[floats.dtype]
    return (floats.view(words) & mx.array(exponent, dtype=words)).max() == exponent


def refuse_zero_scales(lost: mx.array, name: str, origin: tuple[int, ...] = ()) -> None:
    """Raises `SourceError` where `lost` says that a zero scale lies over codes that are not zero."""
    if lost.any().item():
        raise SourceError(
            f"{name}: scale {shown_index(first_true(lost), origin)} is zero over codes that are not, "
            "expected another number",
            hint=_HINT,
        )


def refuse_lost_scales(scales: mx.array, dtype: mx.Dtype, name: str) -> None:
    """Raises `SourceError` if scales lose more than a hundredth of themselves, all together, when stored in `dtype`.

    Only float16 has a range so narrow that this can be. Single scales that are tiny beside the others may vanish.
    """
    if dtype != mx.float16 or scales.dtype == mx.float16:
        return
    exact, stored = scales.astype(mx.float32), scales.astype(dtype).astype(mx.float32)
    largest = mx.maximum(mx.abs(exact).max(), _SMALLEST_NORMAL)  # the unit, so that no square underflows
    lost, all_of_it = mx.square((exact - stored) / largest).sum(), mx.square(exact / largest).sum()
    if not (lost <= _TOLERATED_LOSS**2 * all_of_it).item():  # not more, and not infinite
        raise SourceError(
            f"{name}: has scales up to {largest.item():.3g}, which float16 cannot hold",
            hint="Choose another --dtype: float32, in which nothing is lost, or bfloat16.",
        )


def first_true(condition: mx.array) -> tuple[int, ...]:
    """The index of the first true element."""
    flat = cast(int, condition.reshape(-1).argmax().item())
    index: list[int] = []
    for size in reversed(condition.shape):
        flat, position = divmod(flat, size)
        index.insert(0, position)
    return tuple(index)


def shown_index(index: tuple[int, ...], origin: tuple[int, ...] = ()) -> str:
    """`[row, column]` in the whole tensor."""
    shifted = [i + o for i, o in zip(index, origin, strict=True)] if origin else list(index)
    return str(shifted)
