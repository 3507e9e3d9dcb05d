"""What `config.json` says of a checkpoint's quantization → a reader for each of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxqwen.checkpoint import TensorInfo
from mlxqwen.config import ModelConfig, Quantization
from mlxqwen.errors import ConfigError, UnsupportedFormatError
from mlxqwen_convert import gptq
from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.names import Module, Part
from mlxqwen_convert.readers import (
    FLOATS,
    AwqReader,
    FloatReader,
    Fp8Reader,
    GptqReader,
    MlxReader,
    PackedReader,
    Reader,
)
from mlxqwen_convert.source_files import SourceFiles

__all__ = ["SUPPORTED", "SourceFormat"]

SUPPORTED = "BF16, F16, F32, FP8, AWQ (GEMM, 4 bit), GPTQ (4, 8 bit), compressed-tensors (int4, int8, FP8), MLX"
_AGAIN = "Download the model again, or check that config.json belongs to these weights."


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """How the quantized modules of a checkpoint are stored.

    Args:
        name: "float", "fp8", "awq", "gptq", "int" (compressed-tensors), or "mlx".
        label: for people.
        bits: what its quantized modules have; None for floats.
        group_size: of the codes, as the checkpoint says; None where it has no groups or one a row.
        settings: the rest, by format.
    """

    name: str
    label: str
    bits: int | None = None
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    zero_offset: int = 1
    mlx: Quantization | None = None

    @property
    def is_integer(self) -> bool:
        """Whether it has integer codes of its own that can be kept."""
        return self.name in ("awq", "gptq", "int")

    @classmethod
    def of(cls, config: ModelConfig, raw: Mapping[str, Any], source: str) -> SourceFormat:
        """Read the `quantization_config` of a parsed `config.json`.

        Raises:
            UnsupportedFormatError: a format that is not converted.
            ConfigError: a format that is, described in a way that makes no sense.
        """
        if config.quantization is not None:
            own = config.quantization.default
            label = f"MLX {own.bits}-bit"
            return cls("mlx", label, own.bits, own.group_size, mlx=config.quantization)
        section = raw.get("quantization_config") or raw.get("compression_config")
        if not isinstance(section, Mapping):
            dtype = raw.get("dtype") or raw.get("torch_dtype")
            named = dtype if isinstance(dtype, str) else "float"
            return cls("float", named.upper().replace("BFLOAT", "BF").replace("FLOAT", "F"))
        keys = _Section(section, f"{source}: quantization_config")
        method = str(section.get("quant_method", "none"))
        readers = {"fp8": _fp8, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}
        if method not in readers:
            raise _unsupported(source, method)
        return readers[method](keys)

    def reader(self, module: Module, index: int, part: Part, files: SourceFiles) -> Reader:
        """The reader for matrix number `index` of a module, checked against it. Raises `SourceError`."""
        named = replace(module, path=f"{module.path}[{index}]") if module.kind == "experts" else module
        if not part:
            raise SourceError(f"{named.path}: its weights are missing", hint=_AGAIN)
        reader = self._reader(module, part, files)
        reader.check_part(named, part)
        return reader

    def _reader(self, module: Module, part: Part, files: SourceFiles) -> Reader:
        weight = part.get("weight")
        if weight is not None and weight.dtype in FLOATS and not _scale_words(part):
            return FloatReader(weight.dtype)
        found = _stored_as(part)
        alike = {found, self.name} == {"awq", "gptq"}  # GPTQ without g_idx looks like AWQ until shapes are compared
        if found and found != self.name and not alike:
            raise SourceError(f"{module.path}: is stored as {found}, config.json says {self.label}", hint=_AGAIN)
        if self.name == "mlx" and self.mlx is not None:
            affine = self.mlx.of(module.path)
            if affine is None:
                raise SourceError(f"{module.path}: is quantized, but config.json does not say how", hint=_AGAIN)
            return MlxReader(affine)
        if self.name == "fp8":
            return Fp8Reader(self.block, "weight_scale_inv" if "weight_scale_inv" in part else "weight_scale")
        if self.name == "awq":
            return AwqReader(self.group_size or module.width)
        if self.name == "gptq":
            act_order = _is_shuffled(files, part.get("g_idx"), self.group_size or module.width)
            return GptqReader(self.group_size or module.width, self.bits or 4, self.zero_offset, act_order)
        if self.name == "int":
            act_order = _is_shuffled(files, part.get("weight_g_idx"), self.group_size or module.width)
            return PackedReader(self.group_size or module.width, self.bits or 4, self.symmetric, act_order)
        if weight is not None and weight.dtype not in FLOATS:
            raise SourceError(
                f"{weight.path.name}: {weight.name} has dtype {weight.dtype}, expected BF16, F16 or F32", hint=_AGAIN
            )
        return FloatReader("float")


def _scale_words(part: Part) -> list[str]:
    return [word for word in part if "scale" in word or word in ("biases", "qzeros")]


def _stored_as(part: Part) -> str:
    if "qweight" in part:
        return "gptq" if "g_idx" in part else "awq"
    if "weight_packed" in part:
        return "int"
    if "biases" in part:
        return "mlx"
    weight = part.get("weight")
    return "fp8" if weight is not None and weight.dtype.startswith("F8") else ""


def _is_shuffled(files: SourceFiles, g_idx: TensorInfo | None, group_size: int) -> bool:
    if g_idx is None or g_idx.dtype != "I32" or len(g_idx.shape) != 1:
        return False
    return not gptq.in_order(files.whole(g_idx), group_size)


class _Section:
    """The quantization section of a config, with errors that name it."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def fail(self, key: str, expected: str) -> ConfigError:
        return ConfigError(
            f"{self.source}: {key!r} is {str(self.values.get(key))[:80]}, expected {expected}", hint=_AGAIN
        )

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
            raise self.fail(key, f"one of {', '.join(map(str, allowed))}")
        return value

    def group_size(self, key: str = "group_size") -> int | None:
        value = self.values.get(key)
        if value in (None, -1):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
            raise self.fail(key, "a number of weights, such as 32, 64 or 128")
        return value


def _fp8(keys: _Section) -> SourceFormat:
    keys.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = keys.values.get("weight_block_size")
    if block is None:
        return SourceFormat("fp8", "FP8")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(type(n) is not int or not 1 <= n <= 1 << 16 for n in block)
    ):
        raise keys.fail("weight_block_size", "two sizes, such as [128, 128]")
    return SourceFormat("fp8", f"FP8, blocks of {block[0]}×{block[1]}", block=(block[0], block[1]))


def _awq(keys: _Section) -> SourceFormat:
    version = str(keys.values.get("version") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(keys.source, f"AWQ {version}")
    keys.one_of("bits", (4,), 4)
    group_size = keys.group_size()
    return SourceFormat("awq", f"AWQ 4-bit, groups of {group_size or 'a row'}", 4, group_size)


def _gptq(keys: _Section) -> SourceFormat:
    bits = keys.one_of("bits", gptq.BITS, 4)
    packing = str(keys.values.get("checkpoint_format") or keys.values.get("format") or "gptq")
    if packing not in ("gptq", "gptq_v2"):
        raise _unsupported(keys.source, f"GPTQ {packing}")
    group_size = keys.group_size()
    label = f"GPTQ {bits}-bit, groups of {group_size or 'a row'}"
    return SourceFormat("gptq", label, bits, group_size, zero_offset=0 if packing == "gptq_v2" else 1)


def _compressed_tensors(keys: _Section) -> SourceFormat:
    packing = keys.values.get("format")
    groups = keys.values.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1 or not all(isinstance(g, Mapping) for g in groups.values()):
        raise keys.fail("config_groups", "one group of weights")
    group = next(iter(groups.values()))
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise keys.fail("config_groups", "an object of weights")
    section = _Section(weights, f"{keys.source}: weights")
    packing = packing or group.get("format")
    strategy = weights.get("strategy")
    if packing == "float-quantized" and weights.get("type") == "float" and weights.get("num_bits") == 8:
        if strategy == "block":
            block = weights.get("block_structure")
            return _fp8(_Section({"weight_block_size": block}, section.source))
        return SourceFormat("fp8", f"compressed-tensors FP8, scales by {strategy}")
    if packing != "pack-quantized" or weights.get("type") != "int":
        raise _unsupported(keys.source, f"compressed-tensors {packing}")
    bits = section.one_of("num_bits", (4, 8), 4)
    group_size = section.group_size() if strategy == "group" else None
    if strategy not in ("group", "channel"):
        raise section.fail("strategy", "'group' or 'channel'")
    return SourceFormat(
        "int",
        f"compressed-tensors int{bits}, groups of {group_size or 'a row'}",
        bits,
        group_size,
        symmetric=section.one_of("symmetric", (True, False), True),
    )


def _unsupported(source: str, found: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        f"{source}: the weights are in {found} form, which is not converted", hint=f"Supported: {SUPPORTED}."
    )


def mlx_dtype(name: str) -> mx.Dtype:
    """An MLX dtype by safetensors' name."""
    return {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[name]
