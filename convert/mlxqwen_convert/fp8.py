"""FP8 (E4M3) weights with scales by block, by row or for the whole tensor → float32 rows.

The scale multiplies, whatever its name (`weight_scale_inv` in Qwen's own releases): `w[i, j] = code[i, j] ·
scale[i // 128, j // 128]`, ragged last blocks included.
"""

from __future__ import annotations

import mlx.core as mx

from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.scales import check_scales, first_true, refuse_zero_scales, shown_index

__all__ = ["check_rows", "dequantize_rows", "powers_of_two", "scale_rows"]

# float16 has one bit of exponent more than E4M3, so that its bias is larger by 8.
_HALF_UNIT = 2.0**8


def scale_rows(start: int, stop: int, block: tuple[int, int] | None) -> slice:
    """The rows of a block-wise scale that the weight's rows from `start` up to `stop` need."""
    height = 1 if block is None else block[0]
    return slice(start // height, (stop - 1) // height + 1)


def powers_of_two(exponents: mx.array) -> mx.array:
    """float32 of F8_E8M0 scales, exact: `2 ** (exponent − 127)`, and NaN for 255.

    Args:
        exponents: uint8, as they lie in the file.
    """
    bits = exponents.astype(mx.uint32)
    normal = (bits << 23).view(mx.float32)
    smallest = mx.array(1 << 22, dtype=mx.uint32).view(mx.float32)  # 2 ** −127 has no exponent of its own
    return mx.where(bits == 255, mx.array(float("nan")), mx.where(bits == 0, smallest, normal))


def dequantize_rows(
    codes: mx.array, scale: mx.array, block: tuple[int, int] | None = None, row_offset: int = 0
) -> mx.array:
    """float32 `[rows, in]`: the product of code and scale, rounded once.

    Args:
        codes: uint8 `[rows, in]`, E4M3 bits as they lie in the file.
        scale: with `block`, the rows `scale_rows(row_offset, row_offset + rows, block)` of it,
            `[·, ceil(in / block[1])]`; without, one for the whole tensor (any shape of one element) or
            one for each of these rows (`[rows]` or `[rows, 1]`). BF16, F16 or F32, below 2¹²⁰.
        block: height and width of a block.
        row_offset: the tensor's row that `codes` begins with.
    """
    values, scale = _halves(codes).astype(mx.float32), scale.astype(mx.float32) * _HALF_UNIT
    if block is None:
        return values * (scale.reshape(1, 1) if scale.size == 1 else scale.reshape(-1, 1))
    (rows, width), (height, block_width) = codes.shape, block
    by_column = mx.repeat(scale, block_width, axis=1)[:, :width]
    if len(scale) == 1:
        return values * by_column
    if row_offset % height == 0 and rows % height == 0:
        return (values.reshape(-1, height, width) * by_column[:, None]).reshape(rows, width)
    return values * by_column[_block_of_rows(rows, height, row_offset)]


def check_rows(
    codes: mx.array,
    scale: mx.array,
    block: tuple[int, int] | None = None,
    row_offset: int = 0,
    *,
    name: str,
    scale_name: str,
) -> None:
    """Raises `SourceError` for what no quantizer writes, naming the tensor and the index in it.

    NaN among the codes; a scale that is NaN, infinite or negative; a zero scale over codes that are not zero.
    Arguments as of `dequantize_rows`; the names are the weight's and the scale's.
    """
    nan = (codes & 0x7F) == 0x7F
    if nan.any().item():
        raise SourceError(
            f"{name}: weight {shown_index(first_true(nan), (row_offset, 0))} is NaN, expected a number",
            hint="No quantizer writes such a weight: use another release of the model.",
        )
    first_row = 0 if scale.size == 1 and block is None else row_offset // (1 if block is None else block[0])
    origin = (first_row, *(0,) * (scale.ndim - 1)) if scale.ndim else ()
    if check_scales(scale, scale_name, origin):
        refuse_zero_scales((scale == 0) & _any_code(codes, scale, block, row_offset), scale_name, origin)


def _halves(codes: mx.array) -> mx.array:
    """float16 of E4M3 bits, in units of `_HALF_UNIT`: both keep sign, exponent and mantissa in this order."""
    # An arithmetic shift puts the sign into the two highest bits, of which the exponent owns the second.
    return ((codes.view(mx.int8).astype(mx.int16) << 7) & ~0x4000).view(mx.float16)


def _block_of_rows(rows: int, height: int, row_offset: int) -> mx.array:
    return (mx.arange(rows) + row_offset) // height - row_offset // height


def _any_code(codes: mx.array, scale: mx.array, block: tuple[int, int] | None, row_offset: int) -> mx.array:
    """bool in the scale's shape: whether it has a code to scale that is not zero."""
    used = (codes & 0x7F) != 0
    if block is None:
        return used.any().reshape(scale.shape) if scale.size == 1 else used.any(axis=1).reshape(scale.shape)
    height, width = block
    used = mx.pad(used, [(row_offset % height, -(row_offset + len(used)) % height), (0, -used.shape[1] % width)])
    return used.reshape(used.shape[0] // height, height, -1, width).any(axis=(1, 3))
