"""What a conversion holds in memory, and how much of it is left for weights on their way."""

from __future__ import annotations

from mlxqwen_convert.pipeline import numpy_target
from mlxqwen_convert.plan import Plan
from mlxqwen_convert.source_files import SMALL_STRIP, STRIP_BYTES
from mlxqwen_convert.tasks import is_read_by_columns, smallest_chunk, tasks_of

__all__ = ["buffer_bytes", "expected_peak", "numpy_bytes", "strip_bytes", "weights_in_flight"]

# What the tables of a large model leave of this goes to the chunks: larger ones are quicker.
_AIM_BYTES = 84 << 20
_MOST_IN_FLIGHT, _FEWEST_IN_FLIGHT = 5 << 17, 1 << 17
# Measured: Python and MLX, a tensor of the source, a finished task, and a weight in the hands of a worker with all
# that is made of it.
_BASE_BYTES, _TENSOR_BYTES, _TASK_BYTES, _WEIGHT_BYTES = 33 << 20, 480, 500, 75
# NumPy, which is loaded where it is of use.
_NUMPY_BYTES = 15 << 20
# Its buffers, those of all threads together, at most: alone, and where MLX has its own beside them; and at least.
_NUMPY_CHUNKS_BYTES, _NUMPY_CHUNKS_BESIDE_MLX, _LEAST_NUMPY_CHUNKS_BYTES = 26 << 20, 8 << 20, 2 << 20
# What threads keep to compare codes in, all together.
_KEPT_CODES_BYTES = 6 << 20
# What MLX may keep of them for the next chunk: fresh buffers cost as much time as the arithmetic.
_BUFFER_BYTES = 44
# Strips of what is read by columns, those of all workers together.
_STRIPS_BYTES = 8 << 20


def weights_in_flight(plan: Plan) -> int:
    """Weights that all workers together may have in their hands."""
    room = (_AIM_BYTES - _standing_bytes(plan)) // _WEIGHT_BYTES
    return max(_FEWEST_IN_FLIGHT, min(_MOST_IN_FLIGHT, room))


def buffer_bytes(in_flight: int) -> int:
    """What MLX may keep for the next chunks."""
    return in_flight * _BUFFER_BYTES


def numpy_bytes(plan: Plan, workers: int) -> int:
    """What each of so many threads may hold where NumPy quantizes."""
    return _numpy_chunks_bytes(plan) // workers


def strip_bytes(workers: int) -> int:
    """Bytes of a strip of codes where so many workers have theirs, and smaller ones of zeros and scales."""
    return min(STRIP_BYTES, _STRIPS_BYTES * SMALL_STRIP // ((SMALL_STRIP + 2) * workers))


def expected_peak(plan: Plan) -> int:
    """Bytes that the whole process holds at most, reading everything back included."""
    widest = max(
        smallest_chunk(reader) * planned.module.width for planned in plan.modules for reader in set(planned.readers)
    )
    return _standing_bytes(plan) + max(widest, weights_in_flight(plan)) * _WEIGHT_BYTES


def _standing_bytes(plan: Plan) -> int:
    beside_mlx = len(_by_numpy(plan)) == 2
    return _fixed_bytes(plan) + beside_mlx * _numpy_chunks_bytes(plan)


def _numpy_chunks_bytes(plan: Plan) -> int:
    """What the tables of a large model leave of what NumPy's buffers may take."""
    most = _NUMPY_CHUNKS_BESIDE_MLX if False in _by_numpy(plan) else _NUMPY_CHUNKS_BYTES
    return max(_LEAST_NUMPY_CHUNKS_BYTES, min(most, _AIM_BYTES - _fixed_bytes(plan)))


def _fixed_bytes(plan: Plan) -> int:
    """What does not grow with the chunks."""
    tensors = sum(len(part) for planned in plan.modules for part in planned.parts)
    tasks = sum(1 for _ in tasks_of(plan))
    by_columns = any(is_read_by_columns(planned.readers[0]) for planned in plan.modules)
    by_numpy = True in _by_numpy(plan) or _keeps_codes(plan)
    tables = tensors * _TENSOR_BYTES + tasks * _TASK_BYTES
    return (
        _BASE_BYTES
        + tables
        + by_columns * _STRIPS_BYTES
        + by_numpy * _NUMPY_BYTES
        + _keeps_codes(plan) * _KEPT_CODES_BYTES
    )


def _keeps_codes(plan: Plan) -> bool:
    return any(planned.method == "repack" for planned in plan.modules)


def _by_numpy(plan: Plan) -> set[bool]:
    """Whether NumPy makes the matrices: all, none or some of them."""
    matrices = (planned for planned in plan.modules if planned.module.is_matrix)
    return {numpy_target(plan, planned, part) is not None for planned in matrices for part in range(len(planned.parts))}
