"""The disk and memory that a model takes, read from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx

from mlxqwen.checks import check_integer
from mlxqwen.device import Device
from mlxqwen.files.adapters import adapter_files, adapters_below
from mlxqwen.files.checkpoint import Checkpoint, headers_read_once, spare_tensors
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.headers_only import has_weights
from mlxqwen.files.purpose import other_purpose
from mlxqwen.model.loading import (
    FLOAT_DTYPES,
    check_tensors,
    checkpoint_dtype,
    foreign_format,
    model_tensors,
    parse_dtype,
)

__all__ = ["Footprint", "Requirement", "cache_bytes", "measure", "parameter_counts", "size_up"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a checkpoint holds.

    Args:
        config: its shape.
        format: "BF16", "MLX 4-bit, groups of 64", or a format that has to be converted first, such as "FP8".
        runs: whether this format runs without conversion.
        refusal: why loading refuses the folder, in words, though it is sound; None if it does not.
        notes: a line for each thing that loading leaves out.
        parameters: weights of the model, in whatever form they are stored.
        active_parameters: those that one token uses; fewer in a mixture of experts.
        numbers: how many values are stored as floats (weights, or scales and biases).
        float_bytes, packed_bytes: bytes on disk of these floats, and of everything else of the model.
        disk_bytes: bytes on disk of all tensors, with those that loading ignores.
        dtype: what a GPU would compute in.
    """

    config: ModelConfig
    format: str
    runs: bool
    refusal: str | None
    notes: tuple[str, ...]
    parameters: int
    active_parameters: int
    numbers: int
    float_bytes: int
    packed_bytes: int
    disk_bytes: int
    dtype: mx.Dtype

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight, with scales and biases."""
        return 8 * (self.float_bytes + self.packed_bytes) / self.parameters

    def weight_bytes(self, compute_dtype: mx.Dtype) -> int:
        """Bytes of the weights in memory: packed codes as they are, floats in `compute_dtype`."""
        return self.packed_bytes + self.numbers * compute_dtype.size


@dataclass(frozen=True, slots=True)
class Requirement:
    """The memory that running a checkpoint takes, in bytes.

    Args:
        device: the machine.
        dtype: what would be computed in.
        tokens: how many the cache is to hold.
        weight_bytes, cache_bytes: of the weights and of the cache.
    """

    device: Device
    dtype: mx.Dtype
    tokens: int
    weight_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of weights and cache."""
        return self.weight_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Whether the machine can hold both."""
        return self.total_bytes <= self.device.usable_memory


def size_up(
    footprint: Footprint,
    device: Device,
    *,
    tokens: int | None = None,
    kv_bits: int | None = None,
    dtype: str | mx.Dtype | None = None,
) -> Requirement:
    """The memory that `footprint` takes on `device`.

    Args:
        tokens: size of the cache; the model's whole context by default.
        kv_bits: 8 or 4 for a quantized cache.
        dtype: what to compute in, by default the device's choice.

    Raises:
        OptionError: less than one token, or another dtype.
    """
    tokens = footprint.config.context_length if tokens is None else int(check_integer("context", tokens, 1))
    compute = parse_dtype(dtype) or device.compute_dtype(footprint.dtype)
    return Requirement(
        device=device,
        dtype=compute,
        tokens=tokens,
        weight_bytes=footprint.weight_bytes(compute),
        cache_bytes=cache_bytes(footprint.config, tokens, compute.size, kv_bits),
    )


def _unread(folder: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note of what only the weights tell, where they are not here."""
    tells = any(name.endswith(("g_idx", "bias")) for name in checkpoint.tensors)
    if has_weights(folder) or not tells:
        return ()
    return ("whether biases are zeros, and columns are in order, is looked at once the weights are downloaded",)


def measure(folder: Path, *, check: bool = False) -> Footprint:
    """Read config and headers of `folder`.

    Args:
        folder: of the model.
        check: whether the tensors have to be those of the model, as they have to be to load it.

    Raises:
        ConfigError, CheckpointError, UnsupportedFormatError: it is no checkpoint.
    """
    with headers_read_once():
        config = ModelConfig.from_folder(folder)
        checkpoint = Checkpoint.open(folder)
    spare = spare_tensors(checkpoint)
    tensors = model_tensors(config, checkpoint, spare)
    floats = [info for info in tensors.values() if info.dtype in FLOAT_DTYPES]
    float_bytes = sum(info.nbytes for info in floats)
    dtype = checkpoint_dtype(tensors)
    parameters, active = parameter_counts(config)
    foreign = foreign_format(config, checkpoint)
    refusal = other_purpose(folder, config.architecture, checkpoint.tensors)
    if check and foreign is None and refusal is None:
        check_tensors(config, checkpoint, tensors)
    if refusal is None and (adapter := adapter_files(folder)):
        refusal = f"an adapter lies beside the weights ({', '.join(adapter[:3])}), which is not applied"
    return Footprint(
        config=config,
        format=foreign or _native_format(config, dtype),
        runs=foreign is None and refusal is None,
        refusal=refusal,
        notes=(
            *config.notes,
            *checkpoint.notes,
            *spare.notes,
            *adapters_below(folder),
            *_unread(folder, checkpoint),
        ),
        parameters=parameters,
        active_parameters=active,
        numbers=sum(prod(info.shape) for info in floats),
        float_bytes=float_bytes,
        packed_bytes=sum(info.nbytes for info in tensors.values()) - float_bytes,
        disk_bytes=checkpoint.nbytes,
        dtype=dtype,
    )


def cache_bytes(config: ModelConfig, tokens: int, itemsize: int, kv_bits: int | None, group_size: int = 64) -> int:
    """Bytes of a key/value cache of `tokens` tokens; `itemsize` is that of the compute dtype.

    Quantized keys and values take `kv_bits` each and a scale and a bias for every `config.kv_group_size(group_size)`.
    """
    group_size = config.kv_group_size(group_size)
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    if kv_bits is None:
        return values * itemsize
    return values * kv_bits // 8 + 2 * values // group_size * itemsize


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Weights by the shape alone: all, and those that one token uses."""
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    norms = 2 * c.hidden_size + 2 * c.head_dim
    total = active = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) + c.hidden_size
    for layer in range(c.num_hidden_layers):
        total += attention + norms
        active += attention + norms
        if c.moe is not None and c.moe.routes(layer):
            expert = 3 * c.hidden_size * c.moe.moe_intermediate_size
            router = c.hidden_size * c.moe.num_experts
            total += router + expert * c.moe.num_experts
            active += router + expert * c.moe.num_experts_per_tok
        else:
            total += 3 * c.hidden_size * c.intermediate_size
            active += 3 * c.hidden_size * c.intermediate_size
    return total, active


def _native_format(config: ModelConfig, dtype: mx.Dtype) -> str:
    if config.quantization is not None:
        default = config.quantization.default
        return f"MLX {default.bits}-bit, groups of {default.group_size}"
    return next(name for name, found in FLOAT_DTYPES.items() if found == dtype)
