"""What tests of the scheduler share: requests, what each gets alone, constraints, and machines of any memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.device import Device
from mlxqwen.engine import memory
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.memory import weight_bytes
from mlxqwen.engine.request import CacheKind, Request
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.model.qwen3 import Qwen3ForCausalLM, Qwen3Model
from mlxqwen.sampling.constraint import Constraint, pack_mask
from mlxqwen.sampling.params import SamplingParams
from tests.conftest import VOCAB_SIZE

GREEDY = SamplingParams(temperature=0)
GPU = Device("a GPU", is_gpu=True, memory=1 << 34, usable_memory=1 << 34)
KINDS = {
    "linear": CacheKind(),
    "8 bits": CacheKind(kv_bits=8, kv_group_size=32),
    "4 bits": CacheKind(kv_bits=4, kv_group_size=32),
    "ring": CacheKind(max_kv_size=24, keep=2),
    "ring of 8 bits": CacheKind(max_kv_size=24, keep=2, kv_bits=8, kv_group_size=32),
}
EXACT_KINDS = ("linear", "8 bits", "4 bits")
"""Kinds whose logits do not depend, to the last bit, on how many tokens go through the model together."""


def asked(prompt: Sequence[int], count: int = 8, **options: Any) -> Request:
    """A request of ids alone, by default greedy."""
    options.setdefault("sampling", GREEDY)
    return Request(prompt=tuple(prompt), max_tokens=count, **options)


def new_scheduler(model: Qwen3ForCausalLM, *, store: int = 0, **options: Any) -> Scheduler:
    """A scheduler beside the model's own, with a store of so many bytes."""
    scheduler = Scheduler(model, **options)
    scheduler.use_store(store)
    return scheduler


def has_work(scheduler: Scheduler) -> bool:
    """What the scheduler says; a call, as type checkers take a property for what it was."""
    return scheduler.has_work


def taken(handle: Handle) -> list[GeneratedToken]:
    """All that is there."""
    found = []
    while (token := handle.poll()) is not None:
        found.append(token)
    return found


def ids(tokens: Iterable[GeneratedToken]) -> list[int]:
    return [one.token for one in tokens]


def run(scheduler: Scheduler, handles: Sequence[Handle]) -> list[list[int]]:
    """Steps until nothing is left to do → the tokens of each."""
    found: list[list[int]] = [[] for _ in handles]
    worked = True
    while worked:
        worked = scheduler.step()
        for tokens, handle in zip(found, handles, strict=True):
            tokens += ids(taken(handle))
    return found


def alone(model: Qwen3ForCausalLM, request: Request) -> list[int]:
    """What a request gets where nobody else runs, and nothing is shared."""
    scheduler = new_scheduler(model, checks_memory=False)
    handle = scheduler.submit(request)
    (found,) = run(scheduler, [handle])
    assert handle.error is None
    return found


class Only:
    """A constraint: these tokens and no others."""

    def __init__(self, allowed: Collection[int]) -> None:
        self.allowed = frozenset(allowed)
        self.seen: list[int] = []

    def mask(self) -> mx.array:
        return pack_mask(self.allowed, VOCAB_SIZE)

    def settle(self, drawn: int) -> int:
        return drawn

    def advance(self, token: int) -> None:
        if token not in self.allowed:
            raise ValueError(f"{token} is not allowed")
        self.seen.append(token)

    def fork(self) -> Only:
        return Only(self.allowed)


class Forced:
    """A constraint: at these places of the reply stand these tokens, whatever is drawn."""

    def __init__(self, tokens: dict[int, int]) -> None:
        self.tokens = tokens
        self.place = 0

    def mask(self) -> None:
        return None

    def settle(self, drawn: int) -> int:
        return drawn if drawn < 0 else self.tokens.get(self.place, drawn)

    def advance(self, token: int) -> None:
        self.place += 1

    def fork(self) -> Forced:
        copy = Forced(self.tokens)
        copy.place = self.place
        return copy


class ForcedUnless(Forced):
    """Forced tokens, which give way to the model's own where that is one of `unless`."""

    def __init__(self, place: int, tokens: Sequence[int], unless: Collection[int]) -> None:
        super().__init__({place + n: token for n, token in enumerate(tokens)})
        self.at, self.unless = place, unless

    def settle(self, drawn: int) -> int:
        if self.place == self.at and drawn in self.unless:
            self.tokens = {}
        return super().settle(drawn)

    def fork(self) -> ForcedUnless:
        copy = ForcedUnless(self.at, [], self.unless)
        copy.tokens, copy.place = self.tokens, self.place
        return copy


def constrained(make: Callable[[], Constraint]) -> tuple[Any, ...]:
    """Factories for a request, of one constraint."""
    return (lambda pipeline: make(),)


@contextmanager
def machine(model: Qwen3ForCausalLM, cache_bytes: int, *, is_gpu: bool = False) -> Iterator[Callable[[int], None]]:
    """Let this be a machine that has so many bytes for caches beside the weights → sets another number.

    Only schedulers that are made within count.
    """
    with pytest.MonkeyPatch.context() as patch:
        own = memory.MemoryAccount(_machine(model, cache_bytes, is_gpu))
        device = [own.device]
        for module in [module for name, module in sys.modules.items() if name.startswith("mlxqwen")]:
            if hasattr(module, "current_device"):
                patch.setattr(module, "current_device", lambda: device[0])
        patch.setattr(memory, "_account", own)

        def resize(cache_bytes: int) -> None:
            device[0] = _machine(model, cache_bytes, is_gpu)

        yield resize


def _machine(model: Qwen3ForCausalLM, cache_bytes: int, is_gpu: bool) -> Device:
    usable = weight_bytes(model) + memory._WORK_SPACE + cache_bytes
    return Device("a machine", is_gpu, memory=1 << 40, usable_memory=usable)


@contextmanager
def watched(before: Callable[[tuple[int, ...]], None]) -> Iterator[None]:
    """Call `before` with the shape `(rows, tokens)` of each step of a model; what it raises the model raises."""
    step = Qwen3Model.__call__

    def recorded(self: Qwen3Model, tokens: mx.array, *args: Any, **options: Any) -> mx.array:
        before(tokens.shape)
        return step(self, tokens, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3Model, "__call__", recorded)
        yield


@contextmanager
def own_scheduler(model: Qwen3ForCausalLM, *, is_gpu: bool = False, **options: Any) -> Iterator[Scheduler]:
    """Let what is generated within have a scheduler of its own, which shares nothing."""
    with machine(model, 1 << 32, is_gpu=is_gpu), pytest.MonkeyPatch.context() as patch:
        scheduler = new_scheduler(model, **options)
        patch.setattr("mlxqwen.engine.token_stream.scheduler_of", lambda _: scheduler)
        yield scheduler
