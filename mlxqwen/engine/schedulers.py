"""The scheduler of each model of this process: all callers of a model share it."""

from __future__ import annotations

import threading
import weakref

from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = ["close_scheduler", "scheduler_of"]

_lock = threading.Lock()
_schedulers: dict[int, tuple[weakref.ref[Qwen3ForCausalLM], Scheduler]] = {}


def scheduler_of(model: Qwen3ForCausalLM) -> Scheduler:
    """The one scheduler of `model`, which lives as long as the model."""
    key = id(model)
    with _lock:
        reference, scheduler = _schedulers.get(key, (None, None))
        if reference is None or scheduler is None or reference() is not model or scheduler.is_closed:
            scheduler = Scheduler(model)
            _schedulers[key] = weakref.ref(model, lambda dead: _forget(key, dead)), scheduler
        return scheduler


def close_scheduler(scheduler: Scheduler) -> None:
    """Close a scheduler, once; the next call of `scheduler_of` makes a new one."""
    with _lock:
        for key, (_, other) in list(_schedulers.items()):
            if other is scheduler:
                del _schedulers[key]
    if not scheduler.is_closed:
        scheduler.close()


def _forget(key: int, dead: weakref.ref[Qwen3ForCausalLM]) -> None:
    reference, _ = _schedulers.get(key, (None, None))
    if reference is dead:
        del _schedulers[key]
