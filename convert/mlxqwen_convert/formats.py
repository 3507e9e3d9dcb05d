"""What `config.json` says of a checkpoint's quantization → a reader for each of its modules.

One file, as each form of quantization is a short branch of the same decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxqwen.errors import ConfigError, UnsupportedFormatError
from mlxqwen.files.checkpoint import TensorInfo
from mlxqwen.files.config import ModelConfig, Quantization
from mlxqwen.files.headers_only import has_weights
from mlxqwen_convert import compressed_tensors, gptq
from mlxqwen_convert.errors import SourceError
from mlxqwen_convert.exemptions import Exemptions
from mlxqwen_convert.names import Module, Part
from mlxqwen_convert.readers import (
    CHECK_CONFIG,
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
_MODELOPT_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
# Words of packed zero points that are read together.
_ZERO_POINTS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """How the quantized modules of a checkpoint are stored.

    Args:
        name: "float", "fp8", "awq", "gptq", "int" (compressed-tensors), or "mlx".
        label: for people.
        bits: what its quantized modules have; None for floats.
        group_size: of the codes, as the checkpoint says; None where it has no groups or one a row.
        is_dynamic: whether GPTQModel's `dynamic` gives some modules other bits or groups, which their shapes tell.
        act_order: whether `config.json` says that inputs are not in the order of their groups.
        block: height and width of FP8's blocks; None where it has a scale a row or for each tensor.
        symmetric: whether compressed-tensors' zero points are all the middle one.
        zero_offset: what to add to GPTQ's stored zeros.
        exemptions: the modules that the config says are not quantized; None where that is not compared.
        mlx: MLX's own quantization, for its own folders.
    """

    name: str
    label: str
    bits: int | None = None
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    zero_offset: int = 1
    act_order: bool = False
    is_dynamic: bool = False
    exemptions: Exemptions | None = None
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
            return cls("float", "floats")
        keys = _Section(section, f"{source}: quantization_config")
        method = str(section.get("quant_method", "none"))
        readers = {"fp8": _fp8, "fbgemm_fp8": _fp8, "modelopt": _modelopt, "awq": _awq, "gptq": _gptq}
        readers["compressed-tensors"] = _compressed_tensors
        if method not in readers:
            raise _unsupported(source, method)
        return readers[method](keys)

    def reader(self, module: Module, index: int, part: Part, files: SourceFiles) -> Reader:
        """The reader for matrix number `index` of a module, checked against it. Raises `SourceError`."""
        named = replace(module, path=f"{module.path}[{index}]") if module.kind == "experts" else module
        if not part:
            raise SourceError(f"{named.path}: its weights are missing", hint=CHECK_CONFIG)
        reader = self._reader(module, part)
        reader.check_part(named, part)
        if self.exemptions is not None:
            weight = next(part[word] for word in ("weight", "weight_packed", "qweight") if word in part)
            kinds = ("attention", "mlp", "experts")
            is_float = isinstance(reader, FloatReader)
            self.exemptions.compare(weight, is_float=is_float, is_expected_quantized=module.kind in kinds)
        return _settled(reader, named, part, files)

    def _reader(self, module: Module, part: Part) -> Reader:
        weight = part.get("weight")
        if weight is not None and weight.dtype in FLOATS and not _scale_words(part):
            return FloatReader(weight.dtype)
        found = _stored_as(part)
        alike = {found, self.name} == {"awq", "gptq"}  # GPTQ without g_idx looks like AWQ until shapes are compared
        if found and found != self.name and not alike:
            raise SourceError(f"{module.path}: is stored as {found}, config.json says {self.label}", hint=CHECK_CONFIG)
        if self.name == "mlx" and self.mlx is not None:
            affine = self.mlx.of(module.path)
            if affine is None:
                raise SourceError(f"{module.path}: is quantized, but config.json does not say how", hint=CHECK_CONFIG)
            return MlxReader(affine)
        if self.name == "fp8":
            return Fp8Reader.of(module, part, self.block)
        if self.name == "awq":
            return AwqReader(self.group_size or module.width)
        if self.name == "gptq":
            if self.act_order and "g_idx" not in part:
                raise SourceError(f"{module.path}: g_idx is missing, config.json says desc_act", hint=CHECK_CONFIG)
            bits, group_size = self._gptq_form(module, part)
            return GptqReader(group_size, bits, self.zero_offset)
        if self.name == "int":
            if self.act_order and "weight_g_idx" not in part:
                raise SourceError(
                    f"{module.path}: weight_g_idx is missing, config.json says actorder", hint=CHECK_CONFIG
                )
            return PackedReader(self.group_size or module.width, self.bits or 4, self.symmetric)
        if weight is not None and weight.dtype not in FLOATS:
            raise SourceError(
                f"{weight.path.name}: {weight.name} has dtype {weight.dtype}, expected BF16, F16 or F32",
                hint=CHECK_CONFIG,
            )
        return FloatReader("float")

    def _gptq_form(self, module: Module, part: Part) -> tuple[int, int]:
        """Bits and size of groups of one GPTQ module. Raises `UnsupportedFormatError` for bits that are not read."""
        bits, group_size = self.bits or 4, self.group_size or module.width
        codes, scales = part.get("qweight"), part.get("scales")
        if not self.is_dynamic or codes is None or scales is None or len(codes.shape) != 2 or not scales.shape[0]:
            return bits, group_size
        bits = codes.shape[0] * 32 // module.width
        if bits not in gptq.BITS:
            raise _unsupported(f"{codes.path.name}: {codes.name}", f"GPTQ {bits}-bit (by GPTQModel's dynamic)")
        return bits, module.width // scales.shape[0] or module.width


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


def _settled(reader: Reader, module: Module, part: Part, files: SourceFiles) -> Reader:
    """The reader, after a look at those tensors beside the codes that can contradict them; their shapes are known."""
    if not all(has_weights(info.path.parent) for info in part.values()):  # a preview
        return reader
    if isinstance(reader, GptqReader) and _is_shuffled(files, part.get("g_idx"), reader.group_size):
        return replace(reader, act_order=True)
    if not isinstance(reader, PackedReader):
        return reader
    if "weight_shape" in part:
        said = files.whole(part["weight_shape"]).tolist()
        if said != [module.rows, module.width]:
            name = part["weight_shape"].name
            raise SourceError(f"{name}: says {said}, expected {[module.rows, module.width]}", hint=CHECK_CONFIG)
    if reader.symmetric and "weight_zero_point" in part:
        _refuse_zero_points(files, part["weight_zero_point"], module.rows, reader.bits)
    act_order = _is_shuffled(files, part.get("weight_g_idx"), reader.group_size)
    return replace(reader, act_order=True) if act_order else reader


def _refuse_zero_points(files: SourceFiles, info: TensorInfo, rows: int, bits: int) -> None:
    """Raise `SourceError` for zero points that codes said to be symmetric cannot have."""
    step = max(1, _ZERO_POINTS_AT_ONCE // info.shape[1])
    for start in range(0, info.shape[0], step):
        words = files.rows(info, start, min(start + step, info.shape[0]))
        if not compressed_tensors.are_symmetric(words, bits, rows - start * 32 // bits):
            raise SourceError(
                f"{info.path.name}: {info.name} has zero points, config.json says that the weights are symmetric",
                hint=CHECK_CONFIG,
            )


def _is_shuffled(files: SourceFiles, g_idx: TensorInfo | None, group_size: int) -> bool:
    return g_idx is not None and not gptq.in_order(files.whole(g_idx), group_size)


class _Section:
    """The quantization section of a config, with errors that name it."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def fail(self, key: str, expected: str) -> ConfigError:
        return ConfigError(
            f"{self.source}: {key!r} is {str(self.values.get(key))[:80]}, expected {expected}",
            hint="Write there how the weights are stored.",
        )

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value not in allowed or type(value) is not type(allowed[0]):
            raise self.fail(key, f"one of {', '.join(map(str, allowed))}")
        return value

    def supported(self, key: str, allowed: tuple[Any, ...], default: Any, form: str) -> Any:
        """Like `one_of`, for what other programs do write: the error says what is converted."""
        value = self.values.get(key, default)
        if type(value) is type(allowed[0]) and value not in allowed:
            raise _unsupported(self.source, f"{form} ({key} {str(value)[:40]})")
        return self.one_of(key, allowed, default)

    def group_size(self, key: str = "group_size") -> int | None:
        value = self.values.get(key)
        if value in (None, -1):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
            raise self.fail(key, "a number of weights, such as 32, 64 or 128")
        return value


def _fp8(keys: _Section) -> SourceFormat:
    keys.supported("fmt", ("e4m3", "float8_e4m3fn"), "e4m3", "FP8")
    exemptions = _exemptions(keys, "modules_to_not_convert", "ignored_layers")
    block = keys.values.get("weight_block_size")
    if block is None:
        return SourceFormat("fp8", "FP8", exemptions=exemptions)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(type(n) is not int or not 1 <= n <= 1 << 16 for n in block)
    ):
        raise keys.fail("weight_block_size", "two sizes, such as [128, 128]")
    label = f"FP8, blocks of {block[0]}×{block[1]}"
    return SourceFormat("fp8", label, block=(block[0], block[1]), exemptions=exemptions)


def _modelopt(keys: _Section) -> SourceFormat:
    """NVIDIA ModelOpt's FP8: a scale for each tensor, for each row, or for blocks of 128 × 128."""
    algorithm = keys.values.get("quant_algo")
    layers = keys.values.get("quantized_layers")
    if algorithm == "MIXED_PRECISION" and isinstance(layers, Mapping):
        found = {layer.get("quant_algo") if isinstance(layer, Mapping) else None for layer in layers.values()}
        algorithm = found.pop() if len(found) == 1 else algorithm
    if not isinstance(algorithm, str) or algorithm.upper() not in _MODELOPT_FP8:
        raise _unsupported(keys.source, f"ModelOpt {str(algorithm)[:40]}")
    exemptions = _exemptions(keys, "ignore", "exclude_modules")
    return SourceFormat("fp8", f"ModelOpt {algorithm.upper()}", exemptions=exemptions)


def _exemptions(keys: _Section, *names: str) -> Exemptions:
    """The list of modules that are not quantized, under the first of these keys that is there."""
    for name in names:
        listed = keys.values.get(name)
        if listed is None:
            continue
        if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
            raise keys.fail(name, "a list of modules")
        return Exemptions(name, listed)
    return Exemptions(None, [])


def _no_exemptions(keys: _Section, *names: str) -> Exemptions | None:
    """That no module is left out; None where one of these keys, each with rules of its own, says which are."""
    return None if any(keys.values.get(name) for name in names) else Exemptions(None, [])


def _awq(keys: _Section) -> SourceFormat:
    version = str(keys.values.get("version") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(keys.source, f"AWQ {version}")
    keys.supported("bits", (4,), 4, "AWQ")
    group_size = keys.group_size()
    exemptions = _no_exemptions(keys, "modules_to_not_convert")
    return SourceFormat("awq", f"AWQ 4-bit, groups of {group_size or 'a row'}", 4, group_size, exemptions=exemptions)


def _gptq(keys: _Section) -> SourceFormat:
    bits = keys.supported("bits", gptq.BITS, 4, "GPTQ")
    packing = str(keys.values.get("checkpoint_format") or keys.values.get("format") or "gptq")
    if packing not in ("gptq", "gptq_v2"):
        raise _unsupported(keys.source, f"GPTQ {packing}")
    group_size = keys.group_size()
    label = f"GPTQ {bits}-bit, groups of {group_size or 'a row'}"
    offset, act_order = 0 if packing == "gptq_v2" else 1, keys.values.get("desc_act") is True
    return SourceFormat(
        "gptq",
        label,
        bits,
        group_size,
        zero_offset=offset,
        act_order=act_order,
        is_dynamic=bool(keys.values.get("dynamic")),
        exemptions=_no_exemptions(keys, "dynamic", "modules_in_block_to_quantize", "modules_to_not_convert"),
    )


def _compressed_tensors(keys: _Section) -> SourceFormat:
    packing = keys.values.get("format")
    groups = keys.values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise keys.fail("config_groups", "one group of weights")
    if len(groups) > 1:
        raise _unsupported(keys.source, f"compressed-tensors with {len(groups)} config_groups")
    group = next(iter(groups.values()))
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise keys.fail("config_groups", "an object of weights")
    section = _Section(weights, f"{keys.source}: weights")
    exemptions = _exemptions(keys, "ignore") if group.get("targets") == ["Linear"] else None
    packing = packing or group.get("format")
    strategy = weights.get("strategy")
    if (
        packing in ("float-quantized", "naive-quantized")
        and weights.get("type") == "float"
        and weights.get("num_bits") == 8
    ):
        if strategy == "block":
            block = weights.get("block_structure")
            return replace(_fp8(_Section({"weight_block_size": block}, section.source)), exemptions=exemptions)
        return SourceFormat("fp8", f"compressed-tensors FP8, scales by {strategy}", exemptions=exemptions)
    if packing != "pack-quantized" or weights.get("type") != "int":
        raise _unsupported(keys.source, f"compressed-tensors {packing}")
    bits = section.supported("num_bits", (4, 8), 4, "compressed-tensors")
    group_size = section.group_size() if strategy == "group" else None
    section.supported("strategy", ("group", "channel"), None, "compressed-tensors")
    return SourceFormat(
        "int",
        f"compressed-tensors int{bits}, groups of {group_size or 'a row'}",
        bits,
        group_size,
        symmetric=section.one_of("symmetric", (True, False), True),
        act_order=weights.get("actorder") in ("group", "dynamic"),
        exemptions=exemptions,
    )


def _unsupported(source: str, found: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        f"{source}: the weights are in {found} form, which is not converted", hint=f"Supported: {SUPPORTED}."
    )


def mlx_dtype(name: str) -> mx.Dtype:
    """An MLX dtype by safetensors' name."""
    return {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[name]
