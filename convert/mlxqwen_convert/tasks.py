"""A conversion cut into tasks, each some rows of one matrix, which workers take in turn."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from mlxqwen.device import usable_cores
from mlxqwen.shutdown import NATIVE_WORK
from mlxqwen_convert.plan import Plan, PlannedModule
from mlxqwen_convert.readers import AwqReader, GptqReader, PackedReader, Reader

__all__ = [
    "Allowance",
    "Task",
    "chunks_of",
    "computing",
    "computing_on",
    "cores",
    "is_read_by_columns",
    "run",
    "smallest_chunk",
    "tasks_of",
]

# Weights of one task: what is done again, at worst, by each worker after an interruption. More where there would be
# too many tasks to remember.
WEIGHTS_PER_TASK = 1 << 22
_MOST_TASKS = 1 << 14
# Rows of a task are a multiple of this, so that columns of packed words and rows of FP8 blocks are never cut.
ROW_STEP = 32
# Rows of a chunk are a multiple of this where a packed word holds several of them.
_WORD_ROWS = 8
# With more, chunks become so small that weights of FP8, AWQ and GPTQ take as much longer as there are threads more.
MAX_WORKERS = 16

_DEFAULT_DEVICE = threading.Lock()

T = TypeVar("T")


def cores() -> int:
    """Workers that this machine has cores for; on Linux those that this process may use, as for products on the CPU."""
    available = usable_cores() if sys.platform.startswith("linux") else os.cpu_count() or 1
    return max(1, min(available, MAX_WORKERS))


@dataclass(frozen=True, slots=True)
class Task:
    """Rows `start:stop` of matrix `part` of module number `module`."""

    module: int
    part: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.module}.{self.part}.{self.start}-{self.stop}"


def tasks_of(plan: Plan) -> Iterator[Task]:
    """All tasks of a plan, in the order of the output's bytes."""
    weights = max(WEIGHTS_PER_TASK, plan.parameters // _MOST_TASKS)
    for number, planned in enumerate(plan.modules):
        rows, width = planned.module.rows, planned.module.width
        step = max(ROW_STEP, weights // width // ROW_STEP * ROW_STEP)
        for part in range(len(planned.parts)):
            for start in range(0, rows, step):
                yield Task(number, part, start, min(start + step, rows))


def chunks_of(planned: PlannedModule, task: Task, weights: int) -> Iterator[tuple[int, int]]:
    """The rows of a task, as many at a time as hold no more than so many weights."""
    step = max(smallest_chunk(planned.readers[task.part]), weights // planned.module.width)
    step = step // ROW_STEP * ROW_STEP or step // _WORD_ROWS * _WORD_ROWS or step
    for start in range(task.start, task.stop, step):
        yield start, min(start + step, task.stop)


def smallest_chunk(reader: Reader) -> int:
    """Rows that are read at once, at least: where a word of the source holds parts of several, as many."""
    is_packed = is_read_by_columns(reader) or (isinstance(reader, PackedReader) and not reader.symmetric)
    return _WORD_ROWS if is_packed else 1


def is_read_by_columns(reader: Reader) -> bool:
    """Whether the rows of the weight are columns of the source's tensors."""
    return isinstance(reader, AwqReader | GptqReader)


class Allowance:
    """Weights that all workers together may have in their hands; who finds too few left waits for others to be done."""

    def __init__(self, weights: int) -> None:
        self._weights = self._left = weights
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextmanager
    def taken(self, weights: int) -> Iterator[None]:
        """Have so many in hand meanwhile; more than there are at all are had alone."""
        weights = min(weights, self._weights)
        with self._turn, self._changed:  # in turn, or small chunks would go on passing a large one
            self._changed.wait_for(lambda: weights <= self._left)
            self._left -= weights
        try:
            yield
        finally:
            with self._changed:
                self._left += weights
                self._changed.notify()


@contextmanager
def computing_on(device: mx.Device) -> Iterator[None]:
    """Meanwhile MLX computes on `device`, whichever thread asks; who enters it meanwhile waits, for any device.

    MLX has one default device for all threads. `mx.stream` sets it, too, and sets it back to what the thread found:
    workers that used it would end at different times, and leave behind the device of each other.
    """
    with _DEFAULT_DEVICE:
        before = mx.default_device()
        mx.set_default_device(device)
        try:
            yield
        finally:
            mx.set_default_device(before)


def computing(
    device: mx.Device, turn: AbstractContextManager[object] | None
) -> tuple[AbstractContextManager[object], Callable[[], AbstractContextManager[object]]]:
    """What is entered around all tasks, and around each of them, so that MLX computes them on `device`.

    Args:
        device: that computes.
        turn: nobody else in the process computes while it is held. So those who compute on another device go on between
            two tasks, of which one is done at a time.
    """
    if turn is None or mx.default_device() == device:
        return computing_on(device), nullcontext

    @contextmanager
    def one_task() -> Iterator[None]:
        with turn, computing_on(device):
            yield

    return nullcontext(), one_task


def run(work: Callable[[Task], T], tasks: Iterator[Task], workers: int, done: Callable[[Task, T], None]) -> None:
    """Do `work` on every task, a thread for each worker. MLX has a default stream for each of them.

    `done` is called with each task and its result, by one thread at a time. The first error ends it all and is raised
    here, as is a KeyboardInterrupt; either way no worker is left running.
    """
    lock, stop = threading.Lock(), threading.Event()
    ended = threading.Semaphore(0)
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            with NATIVE_WORK:
                while not stop.is_set():
                    NATIVE_WORK.pause()
                    with lock:
                        task = next(tasks, None)
                    if task is None:
                        return
                    result = work(task)
                    with lock:
                        done(task, result)
        except BaseException as failure:  # carried over to the caller's thread
            failures.append(failure)
            stop.set()
        finally:
            # Left to the end of the thread, this would race with the end of the process, and abort it.
            mx.clear_streams()
            ended.release()

    running = 0
    try:
        for number in range(workers):
            threading.Thread(target=loop, name=f"convert-{number}", daemon=True).start()
            running += 1
        while running:  # in short waits, so that Ctrl-C is heard
            running -= ended.acquire(timeout=0.1)
            NATIVE_WORK.pause()
    finally:
        stop.set()
        for _ in range(running):
            ended.acquire()
    if failures:
        raise failures[0]
