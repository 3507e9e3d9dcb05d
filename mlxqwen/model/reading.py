"""Reading weights into place: the bytes of a parameter's tensors go one behind the other into the array it will be.

Nothing is read twice or joined afterwards: projections that are laid together, and stacked experts, are rows of one
array from the beginning. Numbers that are converted are read into memory that each layer uses again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from mlxqwen.files.checkpoint import MLX_DTYPES, TensorInfo, TensorReader

__all__ = ["ParameterSource", "WeightReader"]

_ALIGNMENT = 64
_LARGE = 1 << 20
# MLX hands out the memory of these to be written to, which it does not of bfloat16.
_WORDS = {2: mx.uint16, 4: mx.uint32}


class ParameterSource(NamedTuple):
    """The tensors that make up one parameter: a single one, several to be stacked, or rows of a fused one."""

    tensors: tuple[TensorInfo, ...]
    rows: slice | None = None
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        shape = self.tensors[0].shape
        if self.rows is not None:
            half = len(range(*self.rows.indices(shape[1])))
            return (shape[0], half, *shape[2:])
        return (len(self.tensors), *shape) if self.stacked else shape

    def piece(self, index: int, count: int) -> tuple[TensorInfo, int, int]:
        """Where piece `index` of `count` equal ones lies: a tensor, and the first of its bytes and their number."""
        if self.stacked:
            return self.tensors[index], 0, self.tensors[index].nbytes
        info = self.tensors[0]
        nbytes = info.nbytes // count
        if self.rows is None:
            return info, index * nbytes, nbytes
        row_bytes = nbytes // info.shape[1]
        first, stop, _ = self.rows.indices(info.shape[1])
        return info, index * nbytes + first * row_bytes, (stop - first) * row_bytes


class WeightReader:
    """Makes parameters of tensors, in `dtype` but for packed codes.

    Args:
        files: reads the tensors.
        dtype: that the model computes in.
    """

    def __init__(self, files: TensorReader, dtype: mx.Dtype) -> None:
        self.files, self.dtype = files, dtype
        self._passing = mx.zeros(0, dtype=mx.uint8)

    def read(self, parameters: Mapping[str, Sequence[ParameterSource]]) -> dict[str, mx.array]:
        """Read parameters, each of whose sources are rows of one `[..., rows, width]`.

        Raises:
            CheckpointError: a file cannot be read, or has become shorter.
        """
        alike = {name: sources for name, sources in parameters.items() if len(_dtypes(sources)) == 1}
        read = self._read_alike(alike)
        arrays = {name: read[name] if name in read else self._join(sources) for name, sources in parameters.items()}
        mx.eval(arrays)
        return arrays

    def _join(self, sources: Sequence[ParameterSource]) -> mx.array:
        """One parameter of tensors of several dtypes, each read apart."""
        if len(_dtypes(sources)) == 1:
            return self._read_alike({"": sources})[""]
        if len(sources) > 1:
            return mx.concatenate([self._join([source]) for source in sources], axis=-2)
        return mx.stack([self._join([ParameterSource((info,))]) for info in sources[0].tensors])

    def _read_alike(self, parameters: Mapping[str, Sequence[ParameterSource]]) -> dict[str, mx.array]:
        """Parameters that are each of one dtype in the files; evaluated."""
        places: dict[str, mx.array] = {}
        passing: dict[str, tuple[int, int]] = {}
        passing_bytes = 0
        for name, sources in parameters.items():
            stored, shape = _stored(sources), _shape(sources)
            if stored in (mx.uint32, self.dtype):
                places[name] = _room(shape, _WORDS[stored.size])
            else:
                nbytes = prod(shape) * stored.size
                passing[name] = passing_bytes, passing_bytes + nbytes
                passing_bytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._make_passing(passing_bytes)
        passing_memory = _bytes_of(self._passing)
        arrays: dict[str, mx.array] = {}
        for name, sources in parameters.items():
            stored, shape = _stored(sources), _shape(sources)
            if name in places:
                mx.eval(places[name])
                self._fill(_bytes_of(places[name]), sources)
                arrays[name] = places[name].view(stored)
            else:
                start, stop = passing[name]
                self._fill(passing_memory[start:stop], sources)
                arrays[name] = self._passing[start:stop].view(stored).reshape(shape).astype(self.dtype)
                if stop - start >= _LARGE:
                    mx.async_eval(arrays[name])  # MLX's thread converts while this one reads on
        mx.eval(arrays)
        return arrays

    def _fill(self, memory: memoryview, sources: Sequence[ParameterSource]) -> None:
        """Read the rows of all sources, matrix by matrix where there are several stacked."""
        shape, filled = sources[0].shape, 0
        in_turns = len(sources) > 1 or sources[0].stacked or sources[0].rows is not None
        count = prod(shape[:-2]) if in_turns else 1
        for index in range(count):
            for source in sources:
                info, start, nbytes = source.piece(index, count)
                self.files.read_into(memory[filled : filled + nbytes], info, start)
                filled += nbytes

    def _make_passing(self, nbytes: int) -> None:
        """Have so many bytes for numbers in the dtype of their file, by layers of one size in turn."""
        if self._passing.size != nbytes:
            self._passing = mx.zeros(0, dtype=mx.uint8)  # the old one goes before the new one comes
            mx.clear_cache()
            self._passing = _room((nbytes,), mx.uint8)
        mx.eval(self._passing)


def _room(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Memory that MLX's thread makes ready, beside what this thread does."""
    room = mx.zeros(shape, dtype=dtype, stream=mx.cpu)
    mx.async_eval(room)
    return room


def _bytes_of(room: Any) -> memoryview:
    """The memory of an evaluated array, to be written to before anything else refers to it."""
    return memoryview(room).cast("B")


def _dtypes(sources: Sequence[ParameterSource]) -> set[str]:
    return {info.dtype for source in sources for info in source.tensors}


def _stored(sources: Sequence[ParameterSource]) -> mx.Dtype:
    dtype: mx.Dtype = getattr(mx, MLX_DTYPES[sources[0].tensors[0].dtype])
    return dtype


def _shape(sources: Sequence[ParameterSource]) -> tuple[int, ...]:
    """Of all sources, whose rows lie one behind the other."""
    shape = sources[0].shape
    if len(sources) == 1:
        return shape
    return (*shape[:-2], sum(source.shape[-2] for source in sources), shape[-1])
