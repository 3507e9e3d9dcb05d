"""Where every tensor of the output lies: shards, offsets and headers, all known before a byte of weights is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from mlxqwen.files.checkpoint import INDEX_NAME, ITEM_BYTES

__all__ = ["INDEX_NAME", "MAX_SHARD_BYTES", "OutputTensor", "Shard", "index_of", "lay_out"]

MAX_SHARD_BYTES = 5 * 1000**3
METADATA = {"format": "mlx"}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Args:
        name: as written in the file.
        dtype: safetensors' name for it.
        shape: sizes in elements.
        shard: the number of its file, from 0.
        start: its first byte in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int = -1
    start: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the last axis."""
        return self.shape[-1] * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output: its name, what stands before the tensors' bytes, and its size in bytes."""

    name: str
    head: bytes
    size: int
    tensors: tuple[OutputTensor, ...]


def lay_out(modules: Iterable[Sequence[OutputTensor]], max_shard_bytes: int = MAX_SHARD_BYTES) -> tuple[Shard, ...]:
    """Place tensors in files of at most `max_shard_bytes`, the tensors of one module together.

    Within a file wide dtypes come first, so that every tensor begins at a multiple of its item's size.
    """
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensors in modules:
        size = sum(tensor.nbytes for tensor in tensors)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].extend(tensors)
        filled += size
    return tuple(_shard(number, len(groups), group) for number, group in enumerate(groups))


def _shard(number: int, count: int, tensors: list[OutputTensor]) -> Shard:
    name = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": METADATA}
    position = 0
    offsets = []
    for tensor in ordered:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        offsets.append(position)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    placed = tuple(
        replace(tensor, shard=number, start=len(head) + offset) for tensor, offset in zip(ordered, offsets, strict=True)
    )
    return Shard(name, head, len(head) + position, placed)


def index_of(shards: Sequence[Shard], parameters: int) -> str:
    """The text of `model.safetensors.index.json`."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    metadata = {"total_size": total, "total_parameters": parameters}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"
