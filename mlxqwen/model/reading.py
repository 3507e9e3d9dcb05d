"""Reading weights into place: the bytes of a parameter's tensors go one behind the other into the array it will be.

Nothing is read twice or joined afterwards: projections that are laid together, and stacked experts, are rows of one
array from the beginning. Several threads read a piece at a time each. Numbers that are converted pass through a little
memory that each thread uses again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from types import TracebackType
from typing import Any, NamedTuple

import mlx.core as mx

from mlxqwen.daemons import Daemon
from mlxqwen.files.checkpoint import MLX_DTYPES, TensorInfo, TensorReader, blank_arrays, have_pages

__all__ = ["ParameterSource", "WeightReader"]

_PIECE = 1 << 20
"""Bytes of a parameter that a thread reads at once: they are still in the processor's cache when they are converted."""

_LEAST_OF_A_THREAD = 1 << 22
"""Bytes of a layer for each thread that takes part: about 2 ms. To begin and end takes a tenth of that."""

_WRITABLE = {mx.bfloat16: mx.uint16}
"""Dtypes whose memory MLX does not hand out, and what such arrays are while they are written to."""


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

    @property
    def is_packed(self) -> bool:
        """Whether these are packed codes, which no dtype but their own is for."""
        return self.tensors[0].dtype == "U32"

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
    """Makes parameters of tensors, in `dtype` but for packed codes. A context that closes the files.

    Args:
        dtype: that the model computes in.
        threads: that read at once.
    """

    def __init__(self, dtype: mx.Dtype, threads: int = 1) -> None:
        self.dtype = dtype
        self._files = ExitStack()
        self._readers = [_PieceReader(self._files.enter_context(TensorReader()), dtype) for _ in range(threads)]

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def read(
        self, parameters: Mapping[str, Sequence[ParameterSource]], together: Collection[str] = ()
    ) -> dict[str, mx.array]:
        """Read parameters, each of whose sources are rows of one `[..., rows, width]`.

        Args:
            parameters: their sources.
            together: parameters whose memory may be one.

        Raises:
            CheckpointError: a file cannot be read, or has become shorter.
        """
        dtypes = {name: mx.uint32 if sources[0].is_packed else self.dtype for name, sources in parameters.items()}
        forms = {name: (_shape(parameters[name]), _writable(dtype)) for name, dtype in dtypes.items()}
        blank = blank_arrays(forms, together)
        pieces = [
            piece
            for name, sources in parameters.items()
            for piece in _pieces(_bytes_of(blank[name]), sources, dtypes[name])
        ]
        self._read_all(_tasks(pieces), sum(array.nbytes for array in blank.values()))
        del pieces  # they refer to the memory
        arrays = {name: blank.pop(name) for name in parameters}
        if self.dtype in _WRITABLE:
            arrays = {name: array.view(dtypes[name]) for name, array in arrays.items()}
            mx.eval(arrays)
        return arrays

    def _read_all(self, tasks: Sequence[Sequence[_Piece]], nbytes: int) -> None:
        """Do all tasks, in this thread and in others beside it where there is enough to do."""
        left = deque(enumerate(tasks))
        errors: dict[int, BaseException] = {}

        def take_turns(reader: _PieceReader) -> None:
            while left:
                try:
                    number, task = left.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    reader.read(task)
                except BaseException as error:
                    errors[number] = error
                    left.clear()

        count = max(1, min(len(self._readers), nbytes // _LEAST_OF_A_THREAD))
        beside: list[Daemon] = []
        try:
            for reader in self._readers[1:count]:
                beside.append(Daemon(partial(take_turns, reader)))
            take_turns(self._readers[0])
        finally:
            left.clear()
            for daemon in beside:
                while daemon.is_alive():
                    daemon.join(1)
        if errors:
            raise errors[min(errors)]  # of what was begun first, all of which has ended


class _Piece(NamedTuple):
    """Bytes of a tensor, and where they become numbers of a parameter.

    Args:
        memory: of the parameter, as bytes.
        tensor, start, nbytes: in its file.
        converted: whether the parameter has another dtype.
    """

    memory: memoryview
    tensor: TensorInfo
    start: int
    nbytes: int
    converted: bool


class _PieceReader:
    """What one thread reads with: its files, and memory for numbers that it converts."""

    def __init__(self, files: TensorReader, dtype: mx.Dtype) -> None:
        self._files, self._dtype = files, dtype
        self._passing = mx.zeros(0, dtype=mx.uint8)

    def read(self, pieces: Sequence[_Piece]) -> None:
        """Read pieces that are of one dtype in their files, and all converted or all not."""
        for piece in pieces:
            have_pages(piece.memory)
        if pieces[0].converted:
            self._convert(pieces)
            return
        for piece in pieces:
            self._files.read_into(piece.memory, piece.tensor, piece.start)

    def _convert(self, pieces: Sequence[_Piece]) -> None:
        nbytes, filled = sum(piece.nbytes for piece in pieces), 0
        if self._passing.size < nbytes:
            self._passing = mx.zeros(nbytes, dtype=mx.uint8, stream=mx.cpu)
            mx.eval(self._passing)
        passing = _bytes_of(self._passing)
        for piece in pieces:
            self._files.read_into(passing[filled : filled + piece.nbytes], piece.tensor, piece.start)
            filled += piece.nbytes
        # Each step is sent to the processor: `mx.stream` would set the default device of all threads.
        stored = mx.as_strided(self._passing, (filled,), stream=mx.cpu).view(_dtype_of(pieces[0].tensor), stream=mx.cpu)
        converted = stored.astype(self._dtype, stream=mx.cpu).view(_writable(self._dtype), stream=mx.cpu)
        mx.eval(converted)
        numbers, copied = _bytes_of(converted), 0
        for piece in pieces:
            piece.memory[:] = numbers[copied : copied + len(piece.memory)]
            copied += len(piece.memory)


def _pieces(memory: memoryview, sources: Sequence[ParameterSource], dtype: mx.Dtype) -> Iterator[_Piece]:
    """The pieces of a parameter: the rows of all sources, matrix by matrix where there are several stacked."""
    shape, filled = sources[0].shape, 0
    in_turns = len(sources) > 1 or sources[0].stacked or sources[0].rows is not None
    count = prod(shape[:-2]) if in_turns else 1
    for index in range(count):
        for source in sources:
            tensor, start, nbytes = source.piece(index, count)
            stored = _dtype_of(tensor)
            most = _PIECE // dtype.size * stored.size
            for first in range(start, start + nbytes, most):
                length = min(most, start + nbytes - first)
                stop = filled + length // stored.size * dtype.size
                yield _Piece(memory[filled:stop], tensor, first, length, stored != dtype)
                filled = stop


def _tasks(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """The pieces, small ones of one dtype together: each task is one conversion."""
    tasks: list[list[_Piece]] = []
    begun: dict[str, tuple[list[_Piece], int]] = {}
    for piece in pieces:
        task, nbytes = begun.get(piece.tensor.dtype, ([], _PIECE))
        if nbytes + len(piece.memory) > _PIECE:
            task, nbytes = [], 0
            tasks.append(task)
        task.append(piece)
        begun[piece.tensor.dtype] = task, nbytes + len(piece.memory)
    return tasks


def _bytes_of(room: Any) -> memoryview:
    """The memory of an evaluated array, to be written to before anything else refers to it."""
    return memoryview(room).cast("B")


def _writable(dtype: mx.Dtype) -> mx.Dtype:
    return _WRITABLE.get(dtype, dtype)


def _dtype_of(tensor: TensorInfo) -> mx.Dtype:
    dtype: mx.Dtype = getattr(mx, MLX_DTYPES[tensor.dtype])
    return dtype


def _shape(sources: Sequence[ParameterSource]) -> tuple[int, ...]:
    """Of all sources, whose rows lie one behind the other."""
    shape = sources[0].shape
    if len(sources) == 1:
        return shape
    return (*shape[:-2], sum(source.shape[-2] for source in sources), shape[-1])
