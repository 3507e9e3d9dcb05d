"""Row chunks in, quantized rows out, with a hash of what was written and its error.

No worker ever holds more than a chunk of a task, so that memory depends neither on the model's size nor on its shapes.
"""

from __future__ import annotations

import threading
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from xxhash import xxh3_128

from mlxqwen.files.config import AffineQuantization
from mlxqwen_convert import affine
from mlxqwen_convert.affine import Packed
from mlxqwen_convert.errors import ConversionError, VerificationError
from mlxqwen_convert.formats import mlx_dtype
from mlxqwen_convert.names import Part
from mlxqwen_convert.plan import Plan, PlannedModule
from mlxqwen_convert.readers import FloatReader, Fp8Reader, Reader
from mlxqwen_convert.scales import has_infinities
from mlxqwen_convert.source_files import SourceFiles
from mlxqwen_convert.target_files import TargetFiles
from mlxqwen_convert.tasks import Allowance, Task, chunks_of
from mlxqwen_convert.verification import ModuleError, compare, error_of_bfloat16, error_of_kept_codes

if TYPE_CHECKING:
    from mlxqwen_convert.bfloat16 import Quantizer
    from mlxqwen_convert.buffers import Buffers

__all__ = ["NumpyRows", "Written", "check_on_disk", "is_on_disk", "numpy_target", "repacked", "write_task"]

_NUMPY_BITS = (4, 8)
# What a weight takes whose code is kept, beside one that is made of a float.
_REPACKED_SHARE = 1 / 8
# Larger chunks of NumPy's are no quicker.
_LARGEST_NUMPY_CHUNK, _SMALLEST_NUMPY_CHUNK = 1 << 21, 1 << 13
_PIECE = 1 << 16  # weights that MLX makes at once where NumPy leaves them to it


def repacked(
    planned: PlannedModule,
    reader: Reader,
    part: Part,
    files: SourceFiles,
    rows: tuple[int, int],
    dtype: mx.Dtype,
    *,
    check: bool,
) -> Packed:
    """The source's own codes in the target's form: in wider words, or with scales repeated for smaller groups."""
    packed, own, target = reader.packed(files, part, *rows, dtype, check=check), reader.own, planned.target
    if own is None or target is None:
        raise ConversionError(f"{planned.module.path}: has no codes to keep")
    weight, scales, biases = packed
    if own.bits != target.bits:
        weight = affine.pack(affine.unpack(weight, own.bits), target.bits)
    times = own.group_size // target.group_size
    if times > 1:
        scales, biases = mx.repeat(scales, times, axis=1), mx.repeat(biases, times, axis=1)
    return Packed(weight, scales, biases)


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of a finished task: the hash of its bytes, and its error if that was measured."""

    digest: str
    error: ModuleError | None = None

    def as_list(self) -> list[Any]:
        """For the journal, exactly."""
        return [self.digest, *([] if self.error is None else astuple(self.error))]

    @classmethod
    def from_list(cls, known: list[Any]) -> Written:
        """What `as_list` gave. Raises `TypeError` or `ValueError` for anything else."""
        if len(known) == 1:
            return cls(str(known[0]))
        digest, *sums, codes = known
        error, norm, bound = map(float, sums)
        return cls(str(digest), ModuleError(error, norm, bound, int(codes)))


def write_task(
    plan: Plan,
    task: Task,
    source: SourceFiles,
    target: TargetFiles,
    chunk: int,
    measure: bool,
    allowance: Allowance,
    numpy_rows: NumpyRows,
) -> Written:
    """Convert some rows and write them, about `chunk` weights at a time.

    With `measure` their error is found while the source is at hand.
    """
    planned = plan.modules[task.module]
    digests, total = _Digests(planned), ModuleError()
    target_form = numpy_target(plan, planned, task.part)
    make, share = _make_rows, 1.0
    if target_form is not None:
        make, share, chunk = numpy_rows.make, 0.0, numpy_rows.chunk(planned, task.part)  # of memory of their own
    elif planned.method == "repack":
        make, share, chunk = numpy_rows.repack, _REPACKED_SHARE, min(int(chunk / _REPACKED_SHARE), _LARGEST_NUMPY_CHUNK)
    for rows in chunks_of(planned, task, chunk):
        with allowance.taken(int(share * (rows[1] - rows[0]) * planned.module.width)):
            arrays, error = make(plan, task, source, rows, measure)
            for number, (tensor, array) in enumerate(zip(planned.outputs, arrays, strict=True)):
                data = as_bytes(array)
                digests.update(number, data)
                target.write(tensor, task.part * planned.module.rows + rows[0], data)
            total.add(error)
    for tensor in planned.outputs:
        target.begin_flush(tensor, task.part * planned.module.rows + task.start, task.stop - task.start)
    return Written(digests.hexdigest(), total if measure else None)


def numpy_target(plan: Plan, planned: PlannedModule, part: int) -> AffineQuantization | None:
    """The target of a matrix that NumPy quantizes, BF16 or FP8 to nearest codes with BF16 scales; else None."""
    target, reader, options = planned.target, planned.readers[part], plan.options
    if target is None or target.bits not in _NUMPY_BITS or plan.dtype != "BF16":
        return None
    if options.quality or options.device == "gpu":
        return None
    if isinstance(reader, Fp8Reader):
        return target if reader.has_scales_of_groups(target.group_size) else None
    return target if isinstance(reader, FloatReader) and planned.parts[part]["weight"].dtype == "BF16" else None


class NumpyRows:
    """Makes rows of a `numpy_target`, and those whose codes are kept; each thread keeps its buffers for further chunks.

    Attributes:
        bytes_of_thread: what a thread may hold, as given.
    """

    def __init__(self, bytes_of_thread: int) -> None:
        self.bytes_of_thread = bytes_of_thread
        self._chunks: dict[tuple[AffineQuantization, bool], int] = {}
        self._local = threading.local()

    def chunk(self, planned: PlannedModule, part: int) -> int:
        """Weights to be taken at once."""
        from mlxqwen_convert import bfloat16, fp8_rows

        target, is_fp8 = _some(planned.target), isinstance(planned.readers[part], Fp8Reader)
        if (target, is_fp8) not in self._chunks:

            def working_bytes(weights: int) -> int:
                more = fp8_rows.working_bytes(weights, target.group_size) if is_fp8 else 0
                return more + bfloat16.working_bytes(weights, target.group_size, target.bits)

            weights = _LARGEST_NUMPY_CHUNK
            while weights > _SMALLEST_NUMPY_CHUNK and working_bytes(weights) > self.bytes_of_thread:
                weights //= 2
            self._chunks[target, is_fp8] = weights
        return self._chunks[target, is_fp8]

    def make(
        self, plan: Plan, task: Task, source: SourceFiles, rows: tuple[int, int], measure: bool
    ) -> tuple[tuple[Any, ...], ModuleError]:
        """As `_make_rows` does."""
        planned = plan.modules[task.module]
        part, reader, width = planned.parts[task.part], planned.readers[task.part], planned.module.width
        info, target, weights = part["weight"], _some(planned.target), (rows[1] - rows[0]) * width
        quantizer = self._quantizer(weights, target)

        def read(numbers: Any, start: int) -> None:
            source.read_into(as_bytes(numbers), info, numbers.itemsize * (rows[0] * width + start))

        if not isinstance(reader, Fp8Reader):
            found = quantizer.quantize(read, measure=measure)
        else:
            from mlxqwen_convert.fp8_rows import Fp8Rows  # takes NumPy, which not all conversions need

            form, scale = (rows[1] - rows[0], width), reader.scale(source, part, *rows)
            fp8 = Fp8Rows(form, target.group_size, scale, reader.block, rows[0], self._buffers())
            read(fp8.codes, 0)
            found = fp8.quantized(quantizer)
            if found is not None and measure:
                found = fp8.measured(found)
        if found is None:
            return _make_rows_in_pieces(plan, task, source, rows, measure)  # says what is wrong
        return (found.weight, found.scales, found.biases), error_of_bfloat16(found) if measure else ModuleError()

    def repack(
        self, plan: Plan, task: Task, source: SourceFiles, rows: tuple[int, int], measure: bool
    ) -> tuple[tuple[Any, ...], ModuleError]:
        """As `_make_rows` does, where codes are kept."""
        planned, dtype = plan.modules[task.module], mlx_dtype(plan.dtype)
        part, reader, target = planned.parts[task.part], planned.readers[task.part], _some(planned.target)
        packed = repacked(planned, reader, part, source, rows, dtype, check=True)
        infinite = has_infinities(packed.scales) | has_infinities(packed.biases)
        mx.eval(infinite, *packed)  # all at once: each wait costs more than the small sums
        if infinite.item():
            _refuse_infinities(plan, task, source, rows, packed)
        if not measure:
            return packed, ModuleError()
        from mlxqwen_convert.kept_codes import look_at  # takes NumPy, which not all conversions need

        found = look_at(
            reader.source_codes(source, part, *rows), packed, target.bits, target.group_size, self._buffers()
        )
        return packed, error_of_kept_codes(found, planned, plan.dtype, rows)

    def _buffers(self) -> Buffers:
        from mlxqwen_convert.buffers import Buffers

        kept: Buffers = self._local.__dict__.setdefault("buffers", Buffers())
        return kept

    def _quantizer(self, weights: int, target: AffineQuantization) -> Quantizer:
        from mlxqwen_convert.bfloat16 import Quantizer  # takes NumPy, which not all conversions need

        own: dict[str, Any] = self._local.__dict__
        kept: Quantizer | None = own.get("quantizer")
        if kept is None or kept.form != (weights, target.group_size, target.bits):
            kept = own["quantizer"] = None  # lets go of its buffers
            kept = own["quantizer"] = Quantizer(weights, target.group_size, target.bits, self._buffers())
        return kept


def _some(target: AffineQuantization | None) -> AffineQuantization:
    if target is None:
        raise ConversionError("found no target, expected bits and a group size")
    return target


def _make_rows(
    plan: Plan, task: Task, source: SourceFiles, rows: tuple[int, int], measure: bool
) -> tuple[tuple[mx.array, ...], ModuleError]:
    """The target's tensors for some rows of one matrix, and how far they are from the source."""
    planned, dtype = plan.modules[task.module], mlx_dtype(plan.dtype)
    part, reader, target = planned.parts[task.part], planned.readers[task.part], planned.target
    arrays: tuple[mx.array, ...]
    if target is None and isinstance(reader, FloatReader) and part["weight"].dtype == plan.dtype:
        arrays = (reader.stored(source, part, *rows),)
        floats = arrays[0].astype(mx.float32) if measure else mx.array(0.0)
    else:
        # Floats that are not finite show in what is made of them.
        floats = reader.floats(source, part, *rows, check=not isinstance(reader, FloatReader))
        if target is None:
            arrays = (floats.astype(dtype),)
        else:
            arrays = affine.quantize(floats, target.group_size, target.bits, dtype, search=plan.options.quality)
    sums = compare(floats, arrays, planned, plan) if measure else mx.zeros(3)
    infinite = mx.stack([has_infinities(array).astype(mx.float32) for array in arrays if array.dtype != mx.uint32])
    found = mx.concatenate([sums, infinite])
    mx.eval(found, *arrays)  # all at once: each wait costs more than the small sums
    error, norm, bound, *infinities = cast(list[float], found.tolist())
    if any(infinities):
        _refuse_infinities(plan, task, source, rows, arrays)
    return arrays, ModuleError(error, norm, bound)


def _make_rows_in_pieces(
    plan: Plan, task: Task, source: SourceFiles, rows: tuple[int, int], measure: bool
) -> tuple[tuple[mx.array, ...], ModuleError]:
    """As `_make_rows`, for what MLX holds to stay small beside NumPy's buffers."""
    step, total = max(1, _PIECE // plan.modules[task.module].module.width), ModuleError()
    pieces = []
    for start in range(*rows, step):
        arrays, error = _make_rows(plan, task, source, (start, min(start + step, rows[1])), measure)
        pieces.append(arrays)
        total.add(error)
    return tuple(mx.concatenate([*parts]) for parts in zip(*pieces, strict=True)), total


def _refuse_infinities(
    plan: Plan, task: Task, source: SourceFiles, rows: tuple[int, int], arrays: tuple[mx.array, ...]
) -> None:
    """Raise for rows of a target that are not finite: the source's are not, or they are beyond the target's dtype."""
    planned = plan.modules[task.module]
    planned.readers[task.part].floats(source, planned.parts[task.part], *rows, check=True)
    if planned.target is not None:
        affine.check(Packed(*arrays), planned.module.path, task.part * planned.module.rows + rows[0])
    raise ConversionError(
        f"{planned.module.path}: has weights too large for {plan.dtype} (row {rows[0]} and after)",
        hint="Choose another --dtype: bfloat16 or float32.",
    )


def is_on_disk(plan: Plan, task: Task, target: TargetFiles, digest: str) -> bool:
    """Whether what lies on disk for a task has the hash that was noted when it was written."""
    planned = plan.modules[task.module]
    digests = _Digests(planned)
    for number, tensor in enumerate(planned.outputs):
        for piece in target.pieces(tensor, task.part * planned.module.rows + task.start, task.stop - task.start):
            digests.update(number, piece)
    return digests.hexdigest() == digest


def check_on_disk(plan: Plan, task: Task, target: TargetFiles, digest: str) -> None:
    """Raises `VerificationError` unless a task's bytes are on the disk as they were written."""
    if not is_on_disk(plan, task, target, digest):
        raise VerificationError(
            f"{plan.modules[task.module].module.path}: what is on the disk differs from what was written, between rows "
            f"{task.start} and {task.stop}",
            hint="The disk or the memory may be faulty, or something else writes to the output. Convert again.",
        )


class _Digests:
    """A hash for each tensor of a module, so that the result does not depend on how rows were cut into chunks.

    It tells what a faulty disk or an interruption did, no forgery: XXH3 takes a fifteenth of the time of SHA-256.
    """

    def __init__(self, planned: PlannedModule) -> None:
        self._digests = [xxh3_128() for _ in planned.outputs]

    def update(self, number: int, data: bytes | memoryview) -> None:
        self._digests[number].update(data)

    def hexdigest(self) -> str:
        return xxh3_128(b"".join(digest.digest() for digest in self._digests)).hexdigest()


def as_bytes(array: Any) -> memoryview:
    """The bytes of a NumPy or an evaluated MLX array, without a copy where its dtype is one that Python knows."""
    exported = array
    if isinstance(array, mx.array):
        array = mx.contiguous(array)
        exported = array.view(mx.uint16) if array.dtype in (mx.bfloat16, mx.float16) else array
    return memoryview(exported).cast("B")
