"""Tensors of a checkpoint that change nothing in what it computes: scales of activations, biases of zeros."""

from __future__ import annotations

from typing import NamedTuple

from mlxqwen.errors import CheckpointError
from mlxqwen.files.checkpoint.folder import Checkpoint, counted, some_of
from mlxqwen.files.checkpoint.safetensors_file import ITEM_BYTES
from mlxqwen.files.headers_only import has_weights
from mlxqwen.files.tensor_names import is_scale_of_activations

__all__ = ["SpareTensors", "spare_tensors"]

_FLOATS = ("BF16", "F16", "F32", "F64")
_WEIGHT_WORDS = ("weight", "qweight", "weight_packed")
# Far more than any bias of a Qwen3 has, stacked experts' included.
_MOST_BYTES = 64 << 20


class SpareTensors(NamedTuple):
    """The names of tensors that can be left out, and a note for each kind of them."""

    names: frozenset[str]
    notes: tuple[str, ...]


def spare_tensors(checkpoint: Checkpoint) -> SpareTensors:
    """The tensors that are left out: scales of activations and of a cache, and biases of zeros. Reads only biases.

    In a preview biases are taken for zeros.

    Raises:
        CheckpointError: a bias that is not zero, which a model without biases has no place for.
    """
    scales = [name for name in checkpoint.tensors if is_scale_of_activations(name)]
    biases = [name for name in checkpoint.tensors if _is_bias(checkpoint, name)]
    can_be_read = has_weights(checkpoint.folder)
    used = [name for name in biases if can_be_read and not _is_zero(checkpoint, name)]
    if used:
        raise CheckpointError(
            f"{checkpoint.folder}: found biases that are not zero, expected a Qwen3 without biases: {some_of(used)}",
            hint="No Qwen3 release has biases, and mlxqwen does not run them.",
        )
    notes = []
    if scales:
        words = sorted({name.rpartition(".")[2] for name in scales})
        notes.append(
            f"left out {counted(scales, 'scale')} of activations or of a cache ({', '.join(words)}): neither is "
            "quantized by them here"
        )
    if biases and can_be_read:
        notes.append(f"left out biases that are all zeros ({len(biases):,}): {some_of(biases)}")
    return SpareTensors(frozenset((*scales, *biases)), tuple(notes))


def _is_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the bias of a module that has a weight; experts that are fused have `_bias` at the end."""
    stem, _, word = name.rpartition(".")
    info = checkpoint.tensors[name]
    if info.dtype not in _FLOATS or info.nbytes > _MOST_BYTES:
        return False
    if word == "bias":
        return any(f"{stem}.{weight}" in checkpoint.tensors for weight in _WEIGHT_WORDS)
    return word.endswith("_bias") and name.removesuffix("_bias") in checkpoint.tensors


def _is_zero(checkpoint: Checkpoint, name: str) -> bool:
    """Whether all numbers of a tensor of floats are zero, of either sign."""
    data, size = checkpoint.read(name), ITEM_BYTES[checkpoint.tensors[name].dtype]
    signs = data[size - 1 :: size]
    return not signs.strip(b"\x00\x80") and not any(data[lane::size].strip(b"\x00") for lane in range(size - 1))
