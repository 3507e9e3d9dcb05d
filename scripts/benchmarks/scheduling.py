"""What a step of the scheduler costs the host with many replies running, beside one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.primitives import write_model
from benchmarks.settings import Settings
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.request import Request
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams

__all__ = ["Running", "scheduler"]

_SIZES = (1, 8, 32, 128)
_LAYERS = (1, 28)
_STEPS = 12  # measured together
_WARM = 20  # steps until all prompts are read, and what is compiled is compiled


def scheduler(settings: Settings) -> Iterator[Comparison]:
    """Processor time of the thread that takes a step: a narrow model's graph included, its kernels not."""
    for layers in _LAYERS:
        with TemporaryDirectory() as folder:
            write_model(Path(folder), experts=False, bits=None, layers=layers)
            model = load_model(Path(folder))
        name = f"scheduler: host time of a step, {layers} layer{'s' * (layers > 1)}"
        settings.tell(name)
        sides = [Running(model, size) for size in _SIZES]
        times = take_turns([partial(side.microseconds, _STEPS) for side in sides], settings.turns(9))
        yield from compared(f"{name}, 1 running", "µs", {"mlxqwen": times[0]})
        for size, numbers in zip(_SIZES[1:], times[1:], strict=True):
            yield from compared(f"{name}, {size} running", "µs", {"mlxqwen": numbers, "1 running": times[0]})


class Running:
    """So many replies of one model, drawn with the card's parameters and seeds, as token ids alone."""

    def __init__(self, model: Qwen3ForCausalLM, rows: int) -> None:
        self.scheduler = Scheduler(model)
        self.handles: list[Handle] = []
        for row in range(rows):
            sampling = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, seed=row)
            self.handles.append(self.scheduler.submit(Request(prompt=(row + 1, 2, 3, 4), sampling=sampling)))
        self.microseconds(_WARM)

    def microseconds(self, steps: int) -> float:
        """Of the calling thread's processor time, a step."""
        seconds = 0.0
        for _ in range(steps):
            started = time.thread_time()
            self.scheduler.step()
            seconds += time.thread_time() - started
            for handle in self.handles:
                handle.poll()
        return 1e6 * seconds / steps
