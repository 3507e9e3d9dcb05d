"""Loading: the files of a checkpoint become a model; names, shapes, quantization, dtypes and memory are checked here.

A folder in Hugging Face's layout (BF16, F16 or F32; one tensor per expert, or transformers 5's fused experts) or in
MLX's (affine-quantized, stacked experts) becomes a model whose weights are evaluated and ready. The checks stand in one
file, as they follow one tensor from its name to its place.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxqwen.daemons import in_lasting_thread
from mlxqwen.device import Device, current_device
from mlxqwen.errors import CheckpointError, InsufficientMemoryError, OptionError, UnsupportedFormatError
from mlxqwen.files.adapters import adapters_below, refuse_adapter
from mlxqwen.files.checkpoint import Checkpoint, SpareTensors, TensorInfo, headers_read_once, spare_tensors
from mlxqwen.files.config import GenerationConfig, ModelConfig, Quantization
from mlxqwen.files.headers_only import has_weights
from mlxqwen.files.purpose import refuse_other_purpose
from mlxqwen.files.tensor_names import is_rotary_buffer
from mlxqwen.forks import check_process
from mlxqwen.model.cores import shares_of
from mlxqwen.model.linear import JoinedRows, PlainProduct
from mlxqwen.model.moe import QuantizedSwitchLinear, SwitchLinear
from mlxqwen.model.qwen3 import CompiledDecoder, Qwen3ForCausalLM
from mlxqwen.model.reading import ParameterSource, WeightReader

__all__ = [
    "FLOAT_DTYPES",
    "LoadOptions",
    "PreparedModel",
    "check_memory",
    "check_tensors",
    "checkpoint_dtype",
    "compute_dtype",
    "foreign_format",
    "load_model",
    "model_tensors",
    "parse_dtype",
    "prepare_model",
    "read_config",
]

logger = logging.getLogger("mlxqwen")

FLOAT_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
_FOREIGN = {
    "fp8": "FP8",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "fbgemm_fp8": "FP8",
    "modelopt": "ModelOpt",
}
_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(0|[1-9][0-9]{0,3})\.((?:gate|up|down)_proj)\.weight")
_EMBEDDINGS = "model.embed_tokens"
_COMPARED_BYTES = 1 << 24


def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """A compute dtype by name ("bfloat16", "float16", "float32") or as MLX's own. Raises `OptionError`."""
    if dtype is None:
        return None
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(found, mx.Dtype) and found in _DTYPES.values():
        return found
    raise OptionError(f"dtype: found {dtype!s}, expected bfloat16, float16 or float32")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


class LoadOptions(TypedDict, total=False):
    """The options of `prepare_model`, for functions that pass them on."""

    dtype: str | mx.Dtype | None
    rope_scaling: Mapping[str, Any] | None
    yarn_factor: float | None
    yarn: Literal["auto"] | None
    force: bool
    ignore_adapter: bool
    fused: bool
    device: Device | None


class PreparedModel(NamedTuple):
    """A model that has been checked and not read yet.

    Args:
        weight_bytes: bytes that its weights take in memory.
        dtype: what it computes in.
        read: reads the weights; each call makes another model. Each layer is evaluated within the context that it is
            given.
    """

    weight_bytes: int
    dtype: mx.Dtype
    read: Callable[[AbstractContextManager[object]], Qwen3ForCausalLM]


def load_model(folder: str | Path, **options: Unpack[LoadOptions]) -> Qwen3ForCausalLM:
    """Load the weights of a folder; no tokenizer is needed. Options and errors are those of `prepare_model`."""
    check_process()
    return prepare_model(folder, **options).read(nullcontext())


def read_config(
    folder: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    yarn_factor: float | None = None,
    yarn: Literal["auto"] | None = None,
) -> ModelConfig:
    """The config of a model's folder, with the RoPE scaling that is asked for. Arguments: see `prepare_model`.

    Raises:
        ConfigError, CheckpointError, UnsupportedFormatError: the folder is not a checkpoint.
        OptionError: an argument out of range.
    """
    parse_dtype(dtype)
    if not isinstance(folder, str | os.PathLike):
        raise OptionError(f"folder: found {type(folder).__name__}, expected the path of a model's folder")
    folder = Path(folder)
    if not (folder / "config.json").exists():
        Checkpoint.open(folder)  # knows foreign files, which tell more than a missing config
    config = ModelConfig.from_folder(folder)
    if rope_scaling is not None and yarn_factor is not None:
        raise OptionError("rope_scaling and yarn_factor: found both, expected one", hint="YaRN is set by either.")
    if yarn not in (None, "auto"):
        raise OptionError(
            f"yarn: found {yarn!r}, expected 'auto' or none",
            hint="One factor for all requests is yarn_factor (--yarn-factor).",
        )
    if yarn is not None:
        if yarn_factor is not None:
            raise OptionError(
                "yarn and yarn_factor: found both, expected one",
                hint="A factor for all requests, or for each the one that its length asks for.",
            )
        return (config if rope_scaling is None else config.with_rope_scaling(rope_scaling)).with_yarn_by_request()
    if rope_scaling is not None:
        return config.with_rope_scaling(rope_scaling)
    return config if yarn_factor is None else config.with_yarn(yarn_factor)


def compute_dtype(stored: mx.Dtype, dtype: str | mx.Dtype | None, device: Device | None) -> mx.Dtype:
    """The dtype that a model computes in: `dtype` if given, else what `device` chooses for the stored one."""
    return parse_dtype(dtype) or (device or current_device()).compute_dtype(stored)


def prepare_model(
    folder: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    yarn_factor: float | None = None,
    yarn: Literal["auto"] | None = None,
    force: bool = False,
    ignore_adapter: bool = False,
    fused: bool = True,
    device: Device | None = None,
) -> PreparedModel:
    """Check all that can be checked before a weight is read → a `PreparedModel`, which reads them.

    Args:
        folder: holds `config.json` and safetensors files.
        dtype: what to compute in; by default the checkpoint's on a GPU and float32 on a CPU.
        rope_scaling: replaces the RoPE scaling of `config.json`, in the same form.
        yarn_factor: extends the trained context this many times by YaRN.
        yarn: "auto" scales each request by its own length: see `ModelConfig.with_yarn_by_request`.
        force: load even what does not fit this machine.
        ignore_adapter: load the weights alone where an adapter lies beside them, which is refused otherwise.
        fused: lay projections of the same input together, which is quicker; without, every weight is found under its
            name in an MLX checkpoint, to change, train, save or quantize.
        device: the machine to load for; by default this one.

    Raises:
        ConfigError, CheckpointError, UnsupportedFormatError: the folder is not a checkpoint that can be run.
        OptionError: an argument out of range.
        InsufficientMemoryError: the weights do not fit, and `force` is not set.
    """
    with headers_read_once():
        config = read_config(folder, dtype=dtype, rope_scaling=rope_scaling, yarn_factor=yarn_factor, yarn=yarn)
        folder, device = Path(folder), device or current_device()
        checkpoint = Checkpoint.open(folder)
    refuse_other_purpose(folder, config.architecture, checkpoint.tensors)
    _refuse_foreign(folder, config, checkpoint)
    if not ignore_adapter:
        refuse_adapter(folder)
    generation_config = GenerationConfig.from_folder(folder)

    spare = spare_tensors(checkpoint)
    tensors = model_tensors(config, checkpoint, spare)
    model, sources = _match(checkpoint, tensors, config, generation_config)
    below = adapters_below(checkpoint.folder)
    for note in (*config.notes, *checkpoint.notes, *spare.notes, *below, *generation_config.notes):
        logger.warning(note)
    _note_ignored_head(checkpoint, tensors)
    compute = compute_dtype(checkpoint_dtype(tensors), dtype, device)
    if compute != mx.float32 and not device.is_gpu and any(isinstance(m, SwitchLinear) for m in model.modules()):
        raise OptionError(
            f"dtype: found {_name(compute)}, expected float32: on a CPU, MLX multiplies experts in nothing else",
            hint="Leave the dtype out, or use an MLX-quantized release.",
        )
    nbytes = sum(prod(source.shape) * (mx.uint32 if source.is_packed else compute).size for source in sources.values())
    if not force:
        check_memory(folder, nbytes, compute, device=device)

    checked = [model]

    def read(turn: AbstractContextManager[object]) -> Qwen3ForCausalLM:
        device.keep_resident()
        if checked:
            model = checked.pop()
        else:
            model = _unread(checkpoint, sources, config, generation_config)
        if fused:
            for layer in model.model.layers:
                layer.fuse(device)
        mx.clear_cache()  # else small arrays get the larger memory of what was there before
        layers = _read_by_layer(model, sources, compute, device)
        goes_on = True
        while goes_on:
            with turn:
                goes_on = next(layers, False)
        mx.clear_cache()
        if fused:
            if "scales" in model.head:
                model.dense_from, model.shares = device.dense_from(model.head.bits), shares_of(device)
            elif not device.is_gpu:
                model.by_rows = PlainProduct(device)
            model.model.begins_layers = device.begins_layers
        if fused and device.compiles_kernels:
            model.model.decoder = CompiledDecoder(model.model)
        return model

    return PreparedModel(nbytes, compute, read)


def check_memory(folder: Path, nbytes: int, dtype: mx.Dtype, held_bytes: int = 0, device: Device | None = None) -> None:
    """Raise `InsufficientMemoryError` unless weights fit into the memory that a device has for them.

    Args:
        folder: of the model, for the message.
        nbytes: of its weights in memory.
        dtype: that it computes in.
        held_bytes: of the weights of a draft model beside it.
        device: by default this machine.
    """
    device = device or current_device()
    if nbytes + held_bytes > device.usable_memory:
        others = f", those of the draft model {held_bytes / 1e9:.1f} GB" if held_bytes else ""
        raise InsufficientMemoryError(
            f"{folder}: the weights take {nbytes / 1e9:.1f} GB in {_name(dtype)}{others}, this machine can "
            f"hold {device.usable_memory / 1e9:.1f} GB",
            hint="Use a smaller or more strongly quantized release, a narrower dtype, or --force (force=True).",
        )


def model_tensors(config: ModelConfig, checkpoint: Checkpoint, spare: SpareTensors) -> dict[str, TensorInfo]:
    """The tensors that the model is made of, by name.

    `spare` ones are left out, buffers that follow from the config, and a head that it ties to the embeddings.
    """
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if name not in spare.names
        and not is_rotary_buffer(name)
        and not (config.tie_word_embeddings and name.startswith("lm_head."))
    }


def checkpoint_dtype(tensors: Mapping[str, TensorInfo]) -> mx.Dtype:
    """The dtype that a GPU computes in: that of the embeddings' floats, but never bfloat16 beside float16 scales.

    Those scales have eleven bits, of which bfloat16 keeps eight: a weight would be off by up to a tenth of a step.
    """
    first = [tensors[name] for name in (f"{_EMBEDDINGS}.scales", f"{_EMBEDDINGS}.weight") if name in tensors]
    names = (info.dtype for info in (*first, *tensors.values()) if info.dtype in FLOAT_DTYPES)
    found = FLOAT_DTYPES[next(names, "F32")]
    exact = any(info.dtype == "F16" and name.endswith(".scales") for name, info in tensors.items())
    return mx.float16 if found == mx.bfloat16 and exact else found


def foreign_format(config: ModelConfig, checkpoint: Checkpoint) -> str | None:
    """The name of a format that has to be converted first, by the config or the tensors; None if it runs."""
    method = config.foreign_quantization
    if method is None and config.quantization is None:
        tied = "lm_head." if config.tie_word_embeddings else None
        tensors = {n: info for n, info in checkpoint.tensors.items() if tied is None or not n.startswith(tied)}
        suffixes = {name.rpartition(".")[2] for name in tensors}
        if "qweight" in suffixes:
            method = "gptq" if "g_idx" in suffixes else "awq"
        elif "weight_packed" in suffixes:
            method = "compressed-tensors"
        elif any(info.dtype.startswith("F8") for info in tensors.values()):
            method = "fp8"
    return None if method is None else _FOREIGN.get(method, method)


def _refuse_foreign(folder: Path, config: ModelConfig, checkpoint: Checkpoint) -> None:
    name = foreign_format(config, checkpoint)
    if name is not None:
        hint = "Convert it first: mlxqwen convert SOURCE OUTPUT"
        if config.foreign_quantization is None:
            hint = "config.json does not say so: take the one that was written with these weights."
        raise UnsupportedFormatError(
            f"{folder}: the weights are in {name} form, expected BF16, F16, F32 or MLX-quantized weights",
            hint=hint,
        )


def _sources(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], num_experts: int) -> dict[str, ParameterSource]:
    """The tensors for each parameter: separate or fused experts become the stacked `switch_mlp`."""
    sources: dict[str, ParameterSource] = {}
    experts: dict[str, dict[int, TensorInfo]] = {}
    for name, info in tensors.items():
        if num_experts and (match := _EXPERT.fullmatch(name)):
            parameter = f"{match[1]}.switch_mlp.{match[3]}.weight"
            experts.setdefault(parameter, {})[int(match[2])] = info
        elif name.endswith(".mlp.experts.gate_up_proj") and len(info.shape) == 3:
            half = info.shape[1] // 2
            module = name.removesuffix("experts.gate_up_proj") + "switch_mlp"
            sources[f"{module}.gate_proj.weight"] = ParameterSource((info,), slice(0, half))
            sources[f"{module}.up_proj.weight"] = ParameterSource((info,), slice(half, None))
        elif name.endswith(".mlp.experts.down_proj"):
            sources[name.removesuffix("experts.down_proj") + "switch_mlp.down_proj.weight"] = ParameterSource((info,))
        else:
            sources[name] = ParameterSource((info,))
    for parameter, stack in experts.items():
        if parameter in sources or stack.keys() != set(range(num_experts)):
            raise _wrong_experts(checkpoint, parameter, stack.keys(), num_experts)
        sources[parameter] = ParameterSource(tuple(stack[expert] for expert in range(num_experts)), stacked=True)
    return sources


def _wrong_experts(checkpoint: Checkpoint, parameter: str, found: Collection[int], num_experts: int) -> CheckpointError:
    """The error for experts that are not exactly those of the config, or are there in two forms."""
    missing = [str(expert) for expert in range(num_experts) if expert not in found]
    if missing and checkpoint.absent:
        return checkpoint.lacks(missing)
    extra = [str(expert) for expert in sorted(found) if expert >= num_experts]
    problem = f"missing {_some(missing)}" if missing else f"has no place for {_some(extra)}" if extra else "found twice"
    return CheckpointError(
        f"{checkpoint.folder}: experts of {parameter}: {problem}, expected 0 to {num_experts - 1}",
        hint="Check that config.json belongs to these weights.",
    )


def check_tensors(config: ModelConfig, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `CheckpointError` unless `tensors` are those of the model, in names, dtypes and shapes."""
    _match(checkpoint, tensors, config)


def _match(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    generation_config: GenerationConfig | None = None,
) -> tuple[Qwen3ForCausalLM, dict[str, ParameterSource]]:
    """The model without its weights, and where they are. Checks every name, dtype and shape."""
    sources = _sources(checkpoint, tensors, 0 if config.moe is None else config.moe.num_experts)
    model = _unread(checkpoint, sources, config, generation_config)
    expected = dict(tree_flatten(model.parameters()))
    missing = [name for name in expected if name not in sources]
    if missing:
        raise checkpoint.lacks(missing)
    unexpected = [name for name in sources if name not in expected and name not in checkpoint.unnamed]
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.folder}: tensors that config.json has no place for: {_some(unexpected)}",
            hint="Check that config.json belongs to these weights.",
        )
    for name, array in expected.items():
        _check(array, sources[name])
    return model, {name: source for name, source in sources.items() if name in expected}


def _unread(
    checkpoint: Checkpoint,
    sources: Mapping[str, ParameterSource],
    config: ModelConfig,
    generation_config: GenerationConfig | None,
) -> Qwen3ForCausalLM:
    """The model in the checkpoint's form, its weights still to be read.

    Until then MLX's layers have random ones, drawn by the generator of the thread that makes them.
    """

    def make() -> Qwen3ForCausalLM:
        model = Qwen3ForCausalLM(config, generation_config)
        _quantize(model, checkpoint, sources, config.quantization)
        return model

    return in_lasting_thread(make)


def _quantize(
    model: Qwen3ForCausalLM,
    checkpoint: Checkpoint,
    sources: Mapping[str, ParameterSource],
    quantization: Quantization | None,
) -> None:
    """Replace the modules whose weights come with scales by quantized ones."""
    replaced: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if f"{path}.scales" not in sources or not isinstance(module, nn.Linear | nn.Embedding | SwitchLinear):
            continue
        affine = None if quantization is None else quantization.of(path)
        if affine is None:
            raise CheckpointError(
                f"{checkpoint.folder}: {path} is quantized, but config.json does not say how",
                hint="The folder needs the config.json that was written with its weights.",
            )
        *stack, rows, width = module.weight.shape
        if width % affine.group_size:
            raise CheckpointError(
                f"{checkpoint.folder}: {path} is {width} wide, which groups of {affine.group_size} do not divide",
                hint="Check that config.json belongs to these weights.",
            )
        if isinstance(module, SwitchLinear):
            replaced.append((path, QuantizedSwitchLinear(width, rows, stack[0], affine)))
        else:
            quantized: nn.Module = (
                nn.QuantizedEmbedding(rows, width, group_size=affine.group_size, bits=affine.bits)
                if isinstance(module, nn.Embedding)
                else nn.QuantizedLinear(width, rows, bias=False, group_size=affine.group_size, bits=affine.bits)
            )
            replaced.append((path, quantized))
    model.update_modules(tree_unflatten(replaced))


def _check(expected: mx.array, source: ParameterSource) -> None:
    """Raise unless `source` has the parameter's shape and a dtype that it can be made of."""
    packed = expected.dtype == mx.uint32
    for info in source.tensors:
        if info.shape != source.tensors[0].shape or source.shape != tuple(expected.shape):
            raise CheckpointError(
                f"{info.path}: {info.name} has shape {list(info.shape)}, expected {_expected_shape(source, expected)}",
                hint="Check that config.json belongs to these weights.",
            )
        if info.dtype not in ({"U32"} if packed else FLOAT_DTYPES):
            raise CheckpointError(
                f"{info.path}: {info.name} has dtype {info.dtype}, expected {'U32' if packed else 'BF16, F16 or F32'}",
                hint="This version of mlxqwen runs BF16, F16, F32 and MLX-quantized weights.",
            )


def _expected_shape(source: ParameterSource, expected: mx.array) -> list[int]:
    shape = list(expected.shape)
    if source.rows is not None:
        return [shape[0], 2 * shape[1], *shape[2:]]
    return shape[1:] if source.stacked else shape


def _note_ignored_head(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    """Warn of a head that differs from the embeddings that config.json ties it to; a copy, as Qwen has it, is fine."""
    head = [name for name in checkpoint.tensors if name.startswith("lm_head.") and name not in tensors]
    if not head or not has_weights(checkpoint.folder):
        return
    same = all(_same_bytes(checkpoint, name, name.replace("lm_head", _EMBEDDINGS, 1)) for name in head)
    logger.log(
        logging.INFO if same else logging.WARNING,
        "%s: ignored, since config.json ties it to the embeddings%s",
        ", ".join(head),
        "" if same else ", which it differs from: check tie_word_embeddings",
    )


def _same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors are equal to the bit; at most a few MiB are held at once."""
    if second not in checkpoint.tensors:
        return False
    one, other = checkpoint[first], checkpoint[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, _COMPARED_BYTES):
        stop = min(start + _COMPARED_BYTES, one.nbytes)
        if checkpoint.read_range(first, start, stop) != checkpoint.read_range(second, start, stop):
            return False
    return True


def _read_by_layer(
    model: Qwen3ForCausalLM, sources: Mapping[str, ParameterSource], dtype: mx.Dtype, device: Device
) -> Iterator[bool]:
    """Read the weights of `model`, fused or not, in `dtype` except packed codes; yields after each layer."""
    modules = dict(model.named_modules())
    layers: dict[str, dict[str, list[ParameterSource]]] = {}
    for name in dict(tree_flatten(model.parameters())):
        path, _, key = name.rpartition(".")
        module, parts = modules[path], [name]
        if isinstance(module, JoinedRows):
            parent = path.rpartition(".")[0]
            parts = [f"{parent}.{part}.{key}" for part in module.names]
        layers.setdefault(".".join(name.split(".")[:3]), {})[name] = [sources[part] for part in parts]
    with WeightReader(dtype, device.reading_threads) as reader:
        for parameters in layers.values():
            quantized = [name for name in parameters if "scales" in modules[name.rpartition(".")[0]]]
            held = []
            for name, array in reader.read(parameters, () if device.is_gpu else quantized).items():
                path, _, key = name.rpartition(".")
                module = modules[path]
                held.append(module.turned(array) if isinstance(module, JoinedRows) else array)
                setattr(module, key, held[-1])
            mx.eval(held)  # what is left to do belongs to this thread
            yield True


def _some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
