"""A fingerprint of a model, which tells its keys and values from those of other models."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxqwen.cache.kv_cache import cache_identity
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = ["SAMPLE_BYTES", "model_fingerprint"]

SAMPLE_BYTES = 4096  # the most that is read of one parameter
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # as wide as an item


def model_fingerprint(model: Qwen3ForCausalLM) -> str:
    """SHA-256 over the model's shape, and over the names, dtypes, shapes and a sample of its parameters → hex digits.

    The sample is an evenly strided grid of at most `SAMPLE_BYTES` of each parameter, so a checkpoint that was just
    mapped into memory is not read. It tells apart what training, merging or quantizing makes: those change numbers
    everywhere. It cannot see an edit that leaves all sampled numbers as they were, and it is no defence against
    somebody who makes one. The same weights in another dtype, or fused in another way, have another fingerprint.
    """
    parameters: list[tuple[str, mx.array]] = cast(Any, tree_flatten)(cast(Any, model).parameters())
    samples = [mx.contiguous(_sample(array)).reshape(-1).view(_WORDS[array.dtype.size]) for _, array in parameters]
    mx.eval(samples)
    sha = hashlib.sha256(cache_identity(model.config).encode())
    for (name, array), sample in zip(parameters, samples, strict=True):
        sha.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        sha.update(memoryview(cast(Any, sample)))
    return sha.hexdigest()


def _sample(array: mx.array) -> mx.array:
    """A view of at most `SAMPLE_BYTES`, by strides along each axis that leave every axis about as many items."""
    left, strides = SAMPLE_BYTES // array.dtype.size, {}
    by_size = sorted(range(array.ndim), key=lambda axis: array.shape[axis])
    for place, axis in enumerate(by_size):
        most = max(1, int(left ** (1 / (array.ndim - place)) + 1e-9))
        strides[axis] = -(-array.shape[axis] // most) or 1
        left //= max(1, -(-array.shape[axis] // strides[axis]))
    return array[tuple(slice(None, None, strides[axis]) for axis in range(array.ndim))]
