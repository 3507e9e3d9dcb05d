"""What will be written, decided and checked before a byte of weights is read.

One file, as each decision follows from those before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxqwen.errors import OptionError
from mlxqwen.files.adapters import adapters_below
from mlxqwen.files.checkpoint import Checkpoint, spare_tensors
from mlxqwen.files.config import AffineQuantization, ModelConfig
from mlxqwen.files.model_files import read_config_file
from mlxqwen.files.purpose import refuse_other_purpose
from mlxqwen.files.tensor_names import is_rotary_buffer
from mlxqwen_convert.affine import BITS, GROUP_SIZES
from mlxqwen_convert.companion_files import check_companions
from mlxqwen_convert.errors import ConversionError, SourceError
from mlxqwen_convert.formats import SourceFormat
from mlxqwen_convert.layout import MAX_SHARD_BYTES, OutputTensor, Shard, lay_out
from mlxqwen_convert.names import Module, Part, Parts, PartsByPrefix, modules, parts_of
from mlxqwen_convert.readers import FLOATS, FloatReader, Reader
from mlxqwen_convert.sizes import size_of
from mlxqwen_convert.source_files import SourceFiles

__all__ = ["Method", "Options", "Plan", "PlannedModule", "make_plan"]

Method = str  # "copy", "cast", "dequantize", "quantize", "repack"

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ROUTER_BITS = 8


@dataclass(frozen=True, slots=True)
class Options:
    """What to convert to; see `mlxqwen_convert.convert`."""

    bits: int | None = None
    group_size: int | None = None
    dtype: str = "auto"
    lm_head_bits: int | None = None
    embed_bits: int | None = None
    keep: tuple[tuple[str, int], ...] = ()
    quality: bool = False
    strict: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        asked = [("bits", self.bits), ("lm_head_bits", self.lm_head_bits), ("embed_bits", self.embed_bits)]
        for pair in self.keep:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) or pair[1] is None:
                raise OptionError(
                    f"keep: found {pair!r}, expected pairs of a glob and bits",
                    hint='For example keep={"*.down_proj": 8}.',
                )
            asked.append((f"keep {pair[0]}", pair[1]))
        for name, bits in asked:
            if bits is not None and (type(bits) is not int or bits not in (16, *BITS)):
                raise OptionError(f"{name}: found {bits!r}, expected one of 16, 8, 6, 5, 4, 3, 2")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size not in GROUP_SIZES):
            raise OptionError(f"group_size: found {self.group_size}, expected 32, 64 or 128")
        if self.dtype not in ("auto", *DTYPES):
            raise OptionError(f"dtype: found {self.dtype}, expected auto, {', '.join(DTYPES)}")
        if self.device not in ("cpu", "gpu"):
            raise OptionError(f"device: found {self.device!r}, expected cpu or gpu")


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module: where it comes from and what becomes of it.

    Args:
        module: its name, kind and shape.
        parts: the source's tensors, one part for each matrix.
        readers: how to read them, one for each part.
        target: how it will be quantized; None if not.
        method: "copy", "cast", "dequantize", "quantize" or "repack".
        outputs: its tensors: the weight and, if quantized, scales and biases.
    """

    module: Module
    parts: Parts
    readers: tuple[Reader, ...]
    target: AffineQuantization | None
    method: Method
    outputs: tuple[OutputTensor, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return self.parts.nbytes

    @property
    def target_bytes(self) -> int:
        """Bytes to write."""
        return sum(tensor.nbytes for tensor in self.outputs)

    @property
    def source_label(self) -> str:
        """What it is made of, for tables."""
        return self.readers[0].label

    @property
    def target_label(self) -> str:
        """What it becomes, for tables."""
        if self.target is None:
            return self.outputs[0].dtype
        return f"{self.target.bits}-bit g{self.target.group_size}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion.

    Args:
        folder: of the source.
        config: the source's, parsed.
        raw_config: the source's, as `read_config_file` gives it.
        source: the source's format.
        options: as asked for.
        target: the quantization that modules have by default; None if none is quantized.
        dtype: of what stays unquantized and of scales, by safetensors' name.
        modules: all modules, in the model's order.
        shards: the files of weights that will be written.
        notes: a line for each thing that is worth knowing.
        source_notes: those of them that whoever loads the source has to know, too: what was left aside or lost.
        ignored_head: an `lm_head` that is there though the config ties it to the embeddings.
    """

    folder: Path
    config: ModelConfig
    raw_config: Mapping[str, Any]
    source: SourceFormat
    options: Options
    target: AffineQuantization | None
    dtype: str
    modules: tuple[PlannedModule, ...]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()
    source_notes: tuple[str, ...] = ()
    ignored_head: Part = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return sum(planned.module.parameters for planned in self.modules)

    @property
    def source_bytes(self) -> int:
        """Bytes of weights to read."""
        return sum(planned.source_bytes for planned in self.modules)

    @property
    def target_bytes(self) -> int:
        """Bytes of weights to write."""
        return sum(shard.size for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Of the output, scales and biases included."""
        return 8 * sum(planned.target_bytes for planned in self.modules) / self.parameters

    def quantization(self) -> dict[str, Any] | None:
        """What `config.json` says of it: the default, and what single modules do instead."""
        if self.target is None:
            return None
        section: dict[str, Any] = {**_as_dict(self.target), "mode": "affine"}
        for planned in self.modules:
            if planned.module.is_matrix and planned.target != self.target:
                section[planned.module.path] = False if planned.target is None else _as_dict(planned.target)
        return section

    def fingerprint(self, states: Mapping[Path, tuple[int, int, int]]) -> dict[str, Any]:
        """What must be the same for a conversion to be resumed: the source's files, the options, the layout."""
        files = {os.path.relpath(path, self.folder): list(state) for path, state in states.items()}
        heads = hashlib.sha256()
        for shard in self.shards:
            heads.update(shard.head)
        for planned in self.modules:
            heads.update(f"{planned.module.path} {planned.method} {planned.source_label}".encode())
        options = json.loads(json.dumps(asdict(self.options)))
        return {"source": str(self.folder.resolve()), "files": files, "options": options, "plan": heads.hexdigest()}


def _as_dict(affine: AffineQuantization) -> dict[str, int]:
    return {"group_size": affine.group_size, "bits": affine.bits}


def make_plan(folder: Path, options: Options, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Plan:
    """Read config, index and headers, match them to the model, and decide what becomes of every module.

    Raises:
        ConfigError, CheckpointError, UnsupportedFormatError: the source is not a checkpoint that can be converted.
        SourceError: its tensors do not fit its config, or a file beside them cannot be copied.
        OptionError: options that make no sense for it.
        ConversionError: it is already what is asked for; or, with `strict`, a module cannot be quantized.
    """
    path = folder / "config.json"
    raw, config_notes = read_config_file(folder)
    config = ModelConfig.from_dict(raw, source=str(path))
    source = SourceFormat.of(config, raw, str(path))
    check_companions(folder)
    checkpoint = Checkpoint.open(folder)
    if source.name == "float":
        source = replace(source, label=_stored_dtype(checkpoint))
    notes = [*config_notes, *checkpoint.notes]
    advice: list[str] = []
    if config.tie_word_embeddings and options.lm_head_bits is not None:
        raise OptionError(
            f"lm_head_bits: {folder} has no head of its own, its embeddings serve as one",
            hint="Use embed_bits (--embed-bits) instead." if options.embed_bits is None else "Leave it out.",
        )
    if config.rope_scaling is not None and config.moe is not None:
        advice.append("config.json has YaRN, which mlx-lm (0.32) leaves aside in a mixture of experts")
    elif config.rope_scaling is not None and not config.rope_scaling.truncate:
        advice.append("config.json has YaRN with truncate false, which mlx-lm (0.32) leaves aside")
    dtype = _dtype(options, source, checkpoint)
    refuse_other_purpose(folder, config.architecture, checkpoint.tensors)
    spare = spare_tensors(checkpoint)
    notes += [*spare.notes, *adapters_below(folder)]
    by_prefix = PartsByPrefix(info for name, info in checkpoint.tensors.items() if name not in spare.names)
    lost = [module.path for module in modules(config) if module.kind != "experts" and module.path not in by_prefix]
    incomplete = checkpoint.lacks([f"{path}.weight" for path in lost]) if lost or checkpoint.absent else None
    if lost and incomplete is not None:
        raise incomplete if checkpoint.absent else SourceError(incomplete.problem, hint=incomplete.hint)
    unnamed = checkpoint.unnamed
    del checkpoint  # of the tens of thousands of tensors that there can be, only what is needed is kept
    files = SourceFiles([])
    try:
        found = [(module, *_parts(module, by_prefix, source, files)) for module in modules(config)]
    except SourceError:
        if incomplete is not None:
            raise incomplete from None
        raise
    finally:
        files.close()
    notes += source.exemptions.notes() if source.exemptions is not None else []
    head = by_prefix.pop("lm_head", {}) if config.tie_word_embeddings else {}
    _refuse_unexpected(folder, by_prefix, unnamed)
    target = _default_target(options, source, found)
    planned = tuple(_planned(*entry, source, target, dtype, options, notes) for entry in found)
    _refuse_same(folder, source, planned, options)
    _check_globs(options, planned)
    _note_head(source, planned, options, advice)
    _note_without_effect(planned, options, advice)
    shards = lay_out((entry.outputs for entry in planned), max_shard_bytes)
    placed = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    planned = tuple(
        PlannedModule(p.module, p.parts, p.readers, p.target, p.method, tuple(placed[o.name] for o in p.outputs))
        for p in planned
    )
    default = target if any(entry.target is not None for entry in planned) else None
    return Plan(
        folder, config, raw, source, options, default, dtype, planned, shards, (*notes, *advice), tuple(notes), head
    )


def _parts(
    module: Module, by_prefix: PartsByPrefix, source: SourceFormat, files: SourceFiles
) -> tuple[Parts, tuple[Reader, ...]]:
    parts = parts_of(module, by_prefix)
    readers: dict[Reader, Reader] = {}
    found = [source.reader(module, index, part, files) for index, part in enumerate(parts)]
    return Parts(parts), tuple(readers.setdefault(reader, reader) for reader in found)


def _refuse_unexpected(folder: Path, left: Mapping[str, Part], unnamed: Collection[str]) -> None:
    names = [info.name for part in left.values() for info in part.values()]
    extra = [name for name in names if not is_rotary_buffer(name) and name not in unnamed]
    if extra:
        shown = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise SourceError(
            f"{folder}: tensors that config.json has no place for: {shown}",
            hint="Check that config.json belongs to these weights.",
        )


def _dtype(options: Options, source: SourceFormat, checkpoint: Checkpoint) -> str:
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    if source.is_integer:
        scales = {
            info.dtype for name, info in checkpoint.tensors.items() if name.endswith((".weight_scale", ".scales"))
        }
        # There, zero points are a power of two, so that a bias takes no more bits than its scale.
        exact_in_bfloat16 = source.name == "int" and source.symmetric and scales == {"BF16"}
        return "BF16" if exact_in_bfloat16 else "F16"
    return _stored_dtype(checkpoint)


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of the floats are stored in, but for scales of FP8."""
    sizes: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        if info.dtype in FLOATS and not name.endswith(("weight_scale_inv", "weight_scale")):
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "BF16"


def _default_target(
    options: Options, source: SourceFormat, found: list[tuple[Module, Parts, tuple[Reader, ...]]]
) -> AffineQuantization | None:
    if options.bits == 16:
        return None
    own = Counter(reader.own for _, _, readers in found for reader in readers if reader.own is not None)
    kept = own.most_common(1)[0][0] if own else None
    bits = options.bits or (kept.bits if kept else source.bits) or (8 if source.name == "fp8" else 4)
    return AffineQuantization(options.group_size or (kept.group_size if kept else 64), bits)


def _planned(
    module: Module,
    parts: Parts,
    readers: tuple[Reader, ...],
    source: SourceFormat,
    default: AffineQuantization | None,
    dtype: str,
    options: Options,
    notes: list[str],
) -> PlannedModule:
    target = _target(module, readers, source, default, options)
    if target is not None and module.width % target.group_size:
        problem = f"{module.path}: is {module.width} wide, which groups of {target.group_size} do not divide"
        if options.strict:
            raise ConversionError(problem, hint="Choose another --group-size, or leave --strict out.")
        notes.append(f"{problem}; it stays unquantized")
        target = None
    method = _method(module, parts, readers, target, dtype)
    if target is not None and method == "quantize" and source.is_integer:
        reasons = {_why_not_kept(reader, source, target) for reader in readers if not isinstance(reader, FloatReader)}
        notes += sorted(reason for reason in reasons if reason not in notes)
    return PlannedModule(module, parts, readers, target, method, _outputs(module, target, dtype))


def _why_not_kept(reader: Reader, source: SourceFormat, target: AffineQuantization) -> str:
    """Why a module's integer codes are not repacked."""
    if "act-order" in reader.label:
        why = f"{reader.label}: its inputs are out of order"
    elif reader.own is None:
        why = f"{reader.label}: MLX has no groups that its groups of {source.group_size or 'a row'} are made of"
    else:
        why = f"{reader.label}, groups of {reader.own.group_size}: other bits or larger groups were asked for"
    return f"{why}, so it is dequantized and quantized again to {target.bits} bits, groups of {target.group_size}"


def _target(
    module: Module,
    readers: tuple[Reader, ...],
    source: SourceFormat,
    default: AffineQuantization | None,
    options: Options,
) -> AffineQuantization | None:
    if not module.is_matrix:
        return None
    own = readers[0].own if all(reader.own == readers[0].own for reader in readers) else None
    bits = None if default is None else default.bits
    asked = False
    if own is not None and options.bits is None:
        bits = own.bits
    if module.kind == "embeddings" and options.embed_bits is not None:
        bits, asked = options.embed_bits, True
    if module.kind == "lm_head" and options.lm_head_bits is not None:
        bits, asked = options.lm_head_bits, True
    for glob, wanted in options.keep:
        if fnmatchcase(module.path, glob):
            bits, asked = wanted, True
    if bits is None or bits == 16:
        return None
    # What the makers of an integer checkpoint left alone stays alone, unless somebody asks.
    is_float = all(isinstance(reader, FloatReader) for reader in readers)
    if source.is_integer and is_float and not asked:
        return None
    if module.kind == "router":
        bits = max(bits, ROUTER_BITS)
    group_size = options.group_size or (default.group_size if default else 64)
    if own is not None and options.group_size is None:
        group_size = own.group_size
    return AffineQuantization(group_size, bits)


def _method(
    module: Module, parts: Parts, readers: tuple[Reader, ...], target: AffineQuantization | None, dtype: str
) -> Method:
    if target is not None:
        fits = all(
            reader.own is not None
            and reader.own.group_size % target.group_size == 0
            and (reader.own.bits == target.bits or (module.kind == "router" and reader.own.bits < target.bits))
            for reader in readers
        )
        return "repack" if fits else "quantize"
    if all(isinstance(reader, FloatReader) for reader in readers):
        return "copy" if all(part["weight"].dtype == dtype for part in parts) else "cast"
    return "dequantize"


def _outputs(module: Module, target: AffineQuantization | None, dtype: str) -> tuple[OutputTensor, ...]:
    if target is None:
        return (OutputTensor(f"{module.path}.weight", dtype, module.shape),)
    *outer, width = module.shape
    groups = (*outer, width // target.group_size)
    return (
        OutputTensor(f"{module.path}.weight", "U32", (*outer, width * target.bits // 32)),
        OutputTensor(f"{module.path}.scales", dtype, groups),
        OutputTensor(f"{module.path}.biases", dtype, groups),
    )


def _refuse_same(
    folder: Path,
    source: SourceFormat,
    planned: tuple[PlannedModule, ...],
    options: Options,
) -> None:
    """An MLX folder that would be copied as it is."""
    same = all(
        entry.method == "copy" or (entry.method == "repack" and entry.readers[0].own == entry.target)
        for entry in planned
    )
    if source.name == "mlx" and same:
        raise ConversionError(
            f"{folder}: is already MLX-quantized this way ({source.label}), nothing to convert",
            hint="Use it as it is, or ask for other --bits, --group-size or --dtype.",
        )
    experts = [part for entry in planned if entry.module.kind == "experts" for part in entry.parts]
    is_mlx = all("switch_mlp" in info.name for part in experts for info in part.values())
    is_mlx &= not any(info.stored_as for entry in planned for info in entry.parts[0].values())
    if source.name == "float" and options.bits == 16 and is_mlx and all(entry.method == "copy" for entry in planned):
        raise ConversionError(
            f"{folder}: is already unquantized in this dtype, nothing to convert",
            hint="Use it as it is, or ask for other --bits or --dtype.",
        )


def _check_globs(options: Options, planned: tuple[PlannedModule, ...]) -> None:
    for glob, _ in options.keep:
        if not any(fnmatchcase(entry.module.path, glob) for entry in planned if entry.module.is_matrix):
            raise OptionError(
                f"keep: {glob!r} matches no module", hint=f"Modules are named such as {planned[2].module.path}."
            )


def _note_head(source: SourceFormat, planned: tuple[PlannedModule, ...], options: Options, notes: list[str]) -> None:
    big = [
        entry
        for entry in planned
        if entry.module.kind in ("embeddings", "lm_head") and entry.target is None and options.bits != 16
    ]
    if source.is_integer and big:
        size = size_of(sum(entry.target_bytes for entry in big))
        offer = {"embeddings": "--embed-bits 8", "lm_head": "--lm-head-bits 8"}
        flags = " ".join(offer[entry.module.kind] for entry in big)
        saved = "halve them" if len(big) > 1 else "halves them"
        notes.append(f"{size} of embeddings and head stay unquantized, as in the source; {flags} {saved}")


def _note_without_effect(planned: tuple[PlannedModule, ...], options: Options, notes: list[str]) -> None:
    """Options that were given, but have nothing to act on."""
    is_any_quantized = any(entry.target is not None for entry in planned)
    if options.quality and all(entry.method != "quantize" for entry in planned):
        why = "the source's codes are kept as they are" if is_any_quantized else "nothing is quantized"
        notes.append(f"--quality has no effect: {why}")
    if options.group_size is not None and not is_any_quantized:
        notes.append("--group-size has no effect: nothing is quantized")
