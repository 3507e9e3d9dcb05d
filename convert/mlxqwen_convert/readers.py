"""One reader for each form that a module's weights come in: what it needs, whether it is sound, its rows.

One file, to read the forms beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NoReturn, Protocol

import mlx.core as mx

from mlxqwen.files.checkpoint import TensorInfo
from mlxqwen.files.config import AffineQuantization
from mlxqwen_convert import affine, awq, compressed_tensors, fp8, gptq
from mlxqwen_convert.affine import Packed
from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.names import Module, Part
from mlxqwen_convert.scales import first_true, refuse_lost_scales
from mlxqwen_convert.source_files import SourceFiles

if TYPE_CHECKING:
    from mlxqwen_convert.kept_codes import SourceCodes

__all__ = [
    "CHECK_CONFIG",
    "FLOATS",
    "AwqReader",
    "FloatReader",
    "Fp8Reader",
    "GptqReader",
    "MlxReader",
    "PackedReader",
    "Reader",
    "require",
]

FLOATS = ("BF16", "F16", "F32")
CHECK_CONFIG = "Check that config.json belongs to these weights."


class Reader(Protocol):
    """Rows of one matrix in one format.

    Attributes:
        label: the format, for tables.
        own: how the codes can be kept as they are; None where there are no codes.
    """

    @property
    def label(self) -> str:
        """The format, for tables."""
        ...

    @property
    def own(self) -> AffineQuantization | None:
        """How the codes can be kept as they are; None where there are no codes."""
        ...

    def check_part(self, module: Module, part: Part) -> None:
        """Raise `SourceError` unless the part has the tensors, dtypes and shapes that the format asks for."""
        ...

    def floats(self, files: SourceFiles, part: Part, start: int, stop: int, *, check: bool) -> mx.array:
        """Rows `start:stop` in float32 `[stop - start, width]`; `check` refuses what no quantizer writes."""
        ...

    def packed(self, files: SourceFiles, part: Part, start: int, stop: int, dtype: mx.Dtype, *, check: bool) -> Packed:
        """The rows' own codes as MLX packs them, their scales and biases in `dtype`."""
        ...

    def source_codes(self, files: SourceFiles, part: Part, start: int, stop: int) -> SourceCodes:
        """The rows' own codes, scales and biases, to compare with what is written of `packed`."""
        ...


def require(module: Module, part: Part, word: str, dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise `SourceError` unless `part` has a tensor of one of these dtypes and shapes."""
    info = part.get(word)
    if info is None:
        found = ", ".join(sorted(part)) or "nothing"
        raise SourceError(f"{module.path}: {word} is missing, found {found}", hint=CHECK_CONFIG)
    if info.dtype not in dtypes:
        raise SourceError(
            f"{info.path.name}: {info.name} has dtype {info.dtype}, expected {' or '.join(dtypes)}",
            hint=CHECK_CONFIG,
        )
    if info.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise SourceError(
            f"{info.path.name}: {info.name} has shape {list(info.shape)}, expected {expected}", hint=CHECK_CONFIG
        )


def allow(part: Part, words: Sequence[str]) -> None:
    """Raise `SourceError` for a tensor that the format has no place for."""
    for word, info in part.items():
        if word not in words:
            raise SourceError(
                f"{info.path.name}: {info.name} is a tensor that this format has no place for", hint=CHECK_CONFIG
            )


def no_codes(part: Part) -> NoReturn:
    """Raise `SourceError`: a format of floats has nothing that MLX could pack."""
    info = next(iter(part.values()))
    raise SourceError(f"{info.name}: has no codes to keep")


@dataclass(frozen=True, slots=True)
class FloatReader:
    """BF16, F16 or F32 weights."""

    label: str
    own: None = None

    def check_part(self, module: Module, part: Part) -> None:
        allow(part, ["weight"])
        require(module, part, "weight", FLOATS, [(module.rows, module.width) if module.is_matrix else module.shape])

    def floats(self, files: SourceFiles, part: Part, start: int, stop: int, *, check: bool) -> mx.array:
        rows = self.stored(files, part, start, stop).astype(mx.float32)
        if check:
            _check_finite(rows, part["weight"], start)
        return rows

    def stored(self, files: SourceFiles, part: Part, start: int, stop: int) -> mx.array:
        """Rows `start:stop` as they are in the file, `[stop - start, width]`; all of a vector as `[1, width]`."""
        info = part["weight"]
        return files.whole(info).reshape(1, -1) if len(info.shape) == 1 else files.rows(info, start, stop)

    def packed(self, files: SourceFiles, part: Part, start: int, stop: int, dtype: mx.Dtype, *, check: bool) -> Packed:
        no_codes(part)

    def source_codes(self, files: SourceFiles, part: Part, start: int, stop: int) -> SourceCodes:
        no_codes(part)


def _check_finite(rows: mx.array, info: TensorInfo, start: int) -> None:
    # A sum of squares in float32 could overflow where no weight does; NaN and Inf times zero are NaN.
    if mx.isnan((rows * 0.0).sum()).item():
        row, column = first_true(~mx.isfinite(rows))
        where = [column] if len(info.shape) == 1 else [start + row, column]
        raise SourceError(
            f"{info.path.name}: {info.name}: weight {where} is {rows[row, column].item():g}, expected a finite number",
            hint="No trained model has such a weight: use another release of it.",
        )


@dataclass(frozen=True, slots=True)
class Fp8Reader:
    """E4M3 weights with scales by block, or (`block` None) by row or for the whole tensor."""

    block: tuple[int, int] | None
    scale_word: str
    label: str = "FP8"
    own: None = None

    @classmethod
    def of(cls, module: Module, part: Part, block: tuple[int, int] | None) -> Fp8Reader:
        """The reader of a module, by the shape of its scales; `block` is what the config says of them.

        Where the config speaks of no blocks and the scales have some, these are of 128 × 128, as everywhere.
        """
        word = "weight_scale_inv" if "weight_scale_inv" in part else "weight_scale"
        shape = part[word].shape if word in part else ()
        if shape in _whole_or_row(module):
            return cls(None, word)
        return cls(block or (128, 128) if len(shape) in (2, 4) else block, word)

    def check_part(self, module: Module, part: Part) -> None:
        allow(part, ["weight", self.scale_word])
        require(module, part, "weight", ["F8_E4M3"], [(module.rows, module.width)])
        shapes = _whole_or_row(module)
        if self.block is not None:
            height, width = self.block
            rows, columns = -(-module.rows // height), -(-module.width // width)
            shapes = [(rows, columns), (rows, 1, columns, 1)]  # ModelOpt keeps axes for what is within a block
        require(module, part, self.scale_word, (*FLOATS, "F8_E8M0"), shapes)

    def floats(self, files: SourceFiles, part: Part, start: int, stop: int, *, check: bool) -> mx.array:
        codes, scale = files.rows(part["weight"], start, stop), self.scale(files, part, start, stop)
        if check:
            fp8.check_rows(
                codes, scale, self.block, start, name=part["weight"].name, scale_name=part[self.scale_word].name
            )
        return fp8.dequantize_rows(codes, scale, self.block, start)

    def has_scales_of_groups(self, group_size: int) -> bool:
        """Whether all weights of a group have one scale."""
        return self.block is None or self.block[1] % group_size == 0

    def scale(self, files: SourceFiles, part: Part, start: int, stop: int) -> mx.array:
        """What some rows need of the scales, as `fp8.dequantize_rows` takes them."""
        info = part[self.scale_word]
        if self.block is None and prod(info.shape) == 1:
            scale = files.whole(info)
        else:
            rows = fp8.scale_rows(start, stop, self.block)
            scale = files.rows(info, rows.start, rows.stop)
        if info.dtype == "F8_E8M0":
            scale = fp8.powers_of_two(scale)
        return scale if self.block is None else scale.reshape(len(scale), -1)

    def packed(self, files: SourceFiles, part: Part, start: int, stop: int, dtype: mx.Dtype, *, check: bool) -> Packed:
        no_codes(part)

    def source_codes(self, files: SourceFiles, part: Part, start: int, stop: int) -> SourceCodes:
        no_codes(part)


def _whole_or_row(module: Module) -> list[tuple[int, ...]]:
    """The shapes of one scale for the whole tensor, or one a row."""
    return [(), (1,), (1, 1), (module.rows,), (module.rows, 1)]


@dataclass(frozen=True, slots=True)
class MlxReader:
    """MLX's own affine groups."""

    own: AffineQuantization

    @property
    def label(self) -> str:
        return f"MLX {self.own.bits}-bit g{self.own.group_size}"

    def check_part(self, module: Module, part: Part) -> None:
        allow(part, ["weight", "scales", "biases"])
        groups, remainder = divmod(module.width, self.own.group_size)
        if remainder:
            raise SourceError(
                f"{module.path}: is {module.width} wide, which groups of {self.own.group_size} do not divide",
                hint=CHECK_CONFIG,
            )
        require(module, part, "weight", ["U32"], [(module.rows, module.width * self.own.bits // 32)])
        for word in ("scales", "biases"):
            require(module, part, word, FLOATS, [(module.rows, groups)])

    def floats(self, files: SourceFiles, part: Part, start: int, stop: int, *, check: bool) -> mx.array:
        packed = self.packed(files, part, start, stop, mx.float32, check=check)
        return affine.dequantize(packed, self.own.group_size, self.own.bits)

    def packed(self, files: SourceFiles, part: Part, start: int, stop: int, dtype: mx.Dtype, *, check: bool) -> Packed:
        weight, scales, biases = (files.rows(part[word], start, stop) for word in ("weight", "scales", "biases"))
        packed = Packed(weight, scales.astype(dtype), biases.astype(dtype))
        if check:
            refuse_lost_scales(scales, dtype, part["scales"].name)
            affine.check(packed, part["weight"].name, start)
        return packed

    def source_codes(self, files: SourceFiles, part: Part, start: int, stop: int) -> SourceCodes:
        from mlxqwen_convert.kept_codes import of_mlx  # takes NumPy, which not all conversions need

        return of_mlx(self.packed(files, part, start, stop, mx.float32, check=False), self.own.bits)


@dataclass(frozen=True, slots=True)
class AwqReader:
    """AWQ's GEMM layout; rows of the weight are columns of its tensors."""

    group_size: int
    label: str = "AWQ 4-bit"

    @property
    def own(self) -> AffineQuantization | None:
        return _own(self.group_size, 4)

    def check_part(self, module: Module, part: Part) -> None:
        allow(part, ["qweight", "qzeros", "scales"])
        groups = _groups(module, self.group_size)
        _whole_words(module, 8)
        require(module, part, "qweight", ["I32"], [(module.width, module.rows // 8)])
        require(module, part, "qzeros", ["I32"], [(groups, module.rows // 8)])
        require(module, part, "scales", ["F16", "BF16", "F32"], [(groups, module.rows)])

    def floats(self, files: SourceFiles, part: Part, start: int, stop: int, *, check: bool) -> mx.array:
        return awq.dequantize(*self._tile(files, part, start, stop, check))

    def packed(self, files: SourceFiles, part: Part, start: int, stop: int, dtype: mx.Dtype, *, check: bool) -> Packed:
        tile = self._tile(files, part, start, stop, check)
        if check:
            refuse_lost_scales(tile[2], dtype, part["scales"].name)
        return awq.repack(*tile, dtype)

    def source_codes(self, files: SourceFiles, part: Part, start: int, stop: int) -> SourceCodes:
        from mlxqwen_convert.kept_codes import of_awq  # takes NumPy, which not all conversions need

        return of_awq(*self._tile(files, part, start, stop, False))

    def _tile(
        self, files: SourceFiles, part: Part, start: int, stop: int, check: bool
    ) -> tuple[mx.array, mx.array, mx.array]:
        tile = (
            files.columns(part["qweight"], start // 8, stop // 8),
            files.columns(part["qzeros"], start // 8, stop // 8),
            files.columns(part["scales"], start, stop),
        )
        if check:
            awq.check(*tile, name=part["scales"].name, origin=(0, start))
        return tile


@dataclass(frozen=True, slots=True)
class GptqReader:
    """GPTQ's layout; rows of the weight are columns of its tensors. `act_order` says that inputs are not in order."""

    group_size: int
    bits: int
    zero_offset: int = 1
    act_order: bool = False

    @property
    def label(self) -> str:
        return f"GPTQ {self.bits}-bit" + (" act-order" if self.act_order else "")

    @property
    def own(self) -> AffineQuantization | None:
        return None if self.act_order else _own(self.group_size, self.bits)

    def check_part(self, module: Module, part: Part) -> None:
        allow(part, ["qweight", "qzeros", "scales", "g_idx"])
        groups, words = _groups(module, self.group_size), 32 // self.bits
        _whole_words(module, words)
        require(module, part, "qweight", ["I32"], [(module.width // words, module.rows)])
        require(module, part, "qzeros", ["I32"], [(groups, module.rows // words)])
        require(module, part, "scales", ["F16", "BF16", "F32"], [(groups, module.rows)])
        if "g_idx" in part:
            require(module, part, "g_idx", ["I32"], [(module.width,)])

    def floats(self, files: SourceFiles, part: Part, start: int, stop: int, *, check: bool) -> mx.array:
        tile = self._tile(files, part, start, stop)
        g_idx = files.whole(part["g_idx"]) if self.act_order else None
        if check:
            self._check(tile, part, g_idx, start)
        return gptq.dequantize(*tile, self.bits, g_idx, zero_offset=self.zero_offset)

    def packed(self, files: SourceFiles, part: Part, start: int, stop: int, dtype: mx.Dtype, *, check: bool) -> Packed:
        tile = self._tile(files, part, start, stop)
        if check:
            self._check(tile, part, None, start)
            refuse_lost_scales(tile[2], dtype, part["scales"].name)
        return gptq.repack(*tile, self.bits, dtype, zero_offset=self.zero_offset)

    def source_codes(self, files: SourceFiles, part: Part, start: int, stop: int) -> SourceCodes:
        from mlxqwen_convert.kept_codes import of_gptq  # takes NumPy, which not all conversions need

        return of_gptq(*self._tile(files, part, start, stop), self.bits, self.zero_offset)

    def _tile(self, files: SourceFiles, part: Part, start: int, stop: int) -> tuple[mx.array, mx.array, mx.array]:
        words = 32 // self.bits
        return (
            files.columns(part["qweight"], start, stop),
            files.columns(part["qzeros"], start // words, stop // words),
            files.columns(part["scales"], start, stop),
        )

    def _check(self, tile: tuple[mx.array, mx.array, mx.array], part: Part, g_idx: mx.array | None, start: int) -> None:
        if g_idx is not None:
            gptq.check_groups(g_idx, len(tile[2]), name=part["g_idx"].name)
        name, origin = part["scales"].name, (0, start)
        gptq.check(*tile, self.bits, g_idx, zero_offset=self.zero_offset, name=name, origin=origin)


@dataclass(frozen=True, slots=True)
class PackedReader:
    """compressed-tensors `pack-quantized`."""

    group_size: int
    bits: int
    symmetric: bool
    act_order: bool = False

    @property
    def label(self) -> str:
        return f"compressed-tensors int{self.bits}" + (" act-order" if self.act_order else "")

    @property
    def own(self) -> AffineQuantization | None:
        return None if self.act_order else _own(self.group_size, self.bits)

    def check_part(self, module: Module, part: Part) -> None:
        words = ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"]
        allow(part, words)
        groups, per_word = _groups(module, self.group_size), 32 // self.bits
        _groups(module, per_word)
        require(module, part, "weight_packed", ["I32"], [(module.rows, module.width // per_word)])
        require(module, part, "weight_scale", FLOATS, [(module.rows, groups)])
        if not self.symmetric or "weight_zero_point" in part:
            require(module, part, "weight_zero_point", ["I32"], [(-(-module.rows // per_word), groups)])
        if "weight_g_idx" in part:
            require(module, part, "weight_g_idx", ["I32"], [(module.width,)])
        if "weight_shape" in part:
            require(module, part, "weight_shape", ["I64", "I32"], [(2,)])

    def floats(self, files: SourceFiles, part: Part, start: int, stop: int, *, check: bool) -> mx.array:
        tile, width = self._tile(files, part, start, stop), self._width(part)
        g_idx = files.whole(part["weight_g_idx"]) if self.act_order else None
        if check:
            if g_idx is not None:
                gptq.check_groups(g_idx, tile[1].shape[1], name=part["weight_g_idx"].name)
            compressed_tensors.check(*tile, self.bits, width, g_idx, name=part["weight_scale"].name, row_offset=start)
        return compressed_tensors.dequantize(*tile, self.bits, width, g_idx)

    def packed(self, files: SourceFiles, part: Part, start: int, stop: int, dtype: mx.Dtype, *, check: bool) -> Packed:
        tile, width = self._tile(files, part, start, stop), self._width(part)
        if check:
            compressed_tensors.check(*tile, self.bits, width, name=part["weight_scale"].name, row_offset=start)
            refuse_lost_scales(tile[1], dtype, part["weight_scale"].name)
        return compressed_tensors.repack(*tile, self.bits, width, dtype)

    def source_codes(self, files: SourceFiles, part: Part, start: int, stop: int) -> SourceCodes:
        from mlxqwen_convert.kept_codes import of_compressed_tensors  # takes NumPy, which not all conversions need

        return of_compressed_tensors(*self._tile(files, part, start, stop), self.bits)

    def _width(self, part: Part) -> int:
        return part["weight_packed"].shape[1] * 32 // self.bits

    def _tile(
        self, files: SourceFiles, part: Part, start: int, stop: int
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        zeros = None
        if not self.symmetric:
            rows = compressed_tensors.zero_point_rows(start, stop, self.bits)
            zeros = files.rows(part["weight_zero_point"], rows.start, rows.stop)
        return files.rows(part["weight_packed"], start, stop), files.rows(part["weight_scale"], start, stop), zeros


def _own(group_size: int, bits: int) -> AffineQuantization | None:
    size = affine.repack_group_size(group_size)
    return None if size is None else AffineQuantization(size, bits)


def _whole_words(module: Module, per_word: int) -> None:
    for count, what in ((module.rows, "rows"), (module.width, "columns")):
        if count % per_word:
            raise SourceError(
                f"{module.path}: has {count} {what}, expected a multiple of {per_word}, which a packed word holds",
                hint=CHECK_CONFIG,
            )


def _groups(module: Module, group_size: int) -> int:
    groups, remainder = divmod(module.width, group_size)
    if remainder:
        raise SourceError(
            f"{module.path}: is {module.width} wide, which groups of {group_size} do not divide",
            hint=CHECK_CONFIG,
        )
    return groups
