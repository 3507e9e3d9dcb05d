"""All tensors of a checkpoint as MLX arrays: the runtime reads bytes into their places, and never all of them."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen.files.checkpoint.safetensors_file import checked_array, load_arrays

__all__ = ["arrays_of"]


def arrays_of(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, mx.array]:
    """By name, in the tensors' shapes and dtypes; F8_E4M3 and F8_E8M0 come as uint8 bit patterns."""
    wanted = [checkpoint[name] for name in (checkpoint.tensors if names is None else names)]
    shards = {path: load_arrays(path) for path in dict.fromkeys(one.path for one in wanted)}
    return {one.name: checked_array(one, shards[one.path]) for one in wanted}
