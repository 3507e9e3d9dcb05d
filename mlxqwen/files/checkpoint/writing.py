"""Tensors → files, atomically: under a final name there is never half a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlxqwen.errors import CheckpointError
from mlxqwen.files.atomic import reason_of, staging_folder, sync, write_file
from mlxqwen.files.checkpoint.folder import INDEX_NAME, SINGLE_NAME, is_weight_name, listed, some_of
from mlxqwen.files.checkpoint.safetensors_file import read_header

if TYPE_CHECKING:
    import mlx.core as mx

MAX_SHARD_BYTES = 5 * 1024**3


def save_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Writes one file; under its name there is the old file, the whole new one, or nothing.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with staged_for(path, path.parent) as staging:
        staged = staging / "file.safetensors"  # MLX appends the suffix where it is missing
        write_tensors(staged, path, arrays, metadata)
        staged.replace(path)


def write_checkpoint(
    folder: Path,
    arrays: Mapping[str, mx.array],
    *,
    metadata: Mapping[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model's weights: `model.safetensors` or numbered shards, and an index in any case.

    Everything is written beside and moved into place when it is whole, the index last.

    Args:
        folder: is made if it is not there; must hold no weights yet.
        arrays: name → array, written in this order.
        metadata: goes into every file.
        max_shard_bytes: the most that one file holds, unless a single tensor is larger.

    Raises:
        CheckpointError: nothing to write, weights are already there, or they cannot be written.
    """
    if not arrays:
        raise CheckpointError(f"{folder}: no tensors to write", hint="Give at least one array.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise unwritable(folder, cause) from None
    present = [path.name for path in listed(folder) if path.name == INDEX_NAME or is_weight_name(path.name)]
    if present:
        raise CheckpointError(f"{folder}: already holds weights: {some_of(present)}", hint="Write into a new folder.")
    shards = split_shards(arrays, max_shard_bytes)
    names = shard_names(len(shards))
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    with staged_for(folder, folder) as staging:
        for file, shard in zip(names, shards, strict=True):
            write_tensors(staging / file, folder / file, shard, metadata)
        write_file(staging / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())
        for file in (*names, INDEX_NAME):
            (staging / file).replace(folder / file)


def split_shards(arrays: Mapping[str, mx.array], max_shard_bytes: int) -> list[dict[str, mx.array]]:
    """The arrays in order, cut into shards of at most `max_shard_bytes`; a larger array has a shard of its own."""
    shards: list[dict[str, mx.array]] = [{}]
    filled = 0
    for name, array in arrays.items():
        if shards[-1] and filled + array.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The names of so many files, as Hugging Face gives them."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


@contextmanager
def staged_for(target: Path, folder: Path) -> Iterator[Path]:
    """A folder to write `target` in before it is moved into place in `folder`. Raises `CheckpointError`."""
    try:
        with staging_folder(folder) as staging:
            yield staging
            sync(folder)
    except (OSError, ValueError) as cause:
        raise unwritable(target, cause) from None


def write_tensors(staged: Path, path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Writes what will be `path`, flushes it to disk and reads its header back."""
    import mlx.core as mx

    try:
        mx.save_safetensors(str(staged), dict(arrays), dict(metadata))
        sync(staged)
        written, _ = read_header(staged)
    except (OSError, RuntimeError, ValueError, TypeError, CheckpointError) as cause:
        raise unwritable(path, cause) from None
    if {name: written[name].shape for name in written} != {name: arrays[name].shape for name in arrays}:
        raise unwritable(path, ValueError("the file read back has other tensors"))


def unwritable(path: Path, cause: Exception) -> CheckpointError:
    """The error for a file that cannot be written."""
    return CheckpointError(
        f"{path}: cannot be written: {reason_of(cause)}", hint="Check the folder's permissions and the free space."
    )
