"""A state machine over submit, step, take, cancel, preempt and evict: each reply is what it is alone."""

from __future__ import annotations

import contextlib
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlxqwen.engine.handle import Handle
from mlxqwen.engine.memory import account
from mlxqwen.engine.request import Request
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.errors import InsufficientMemoryError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from tests.conftest import VOCAB_SIZE, random_model
from tests.scheduling import (
    EXACT_KINDS,
    GREEDY,
    KINDS,
    Forced,
    Only,
    alone,
    asked,
    constrained,
    ids,
    machine,
    new_scheduler,
    taken,
)

ROW = 256 * 1024
"""Bytes that a row of up to 256 tokens takes in float32."""

PROMPTS = [[(seed * 31 + n * 7) % VOCAB_SIZE for n in range(300)] for seed in range(3)]
SAMPLING = [
    GREEDY,
    SamplingParams(seed=5),
    SamplingParams(seed=6, temperature=2.0, presence_penalty=1.0, repetition_penalty=1.2),
]
CONSTRAINTS: list[tuple[Any, ...]] = [
    (),
    constrained(lambda: Only(range(0, VOCAB_SIZE, 3))),
    constrained(lambda: Forced({1: 5, 2: 6, 6: 7})),
]
RING_BOUND = {"ring": 1e-3, "ring of 8 bits": 5e-2}
"""How far logits of a ring may be off where a prompt is read in other pieces: by rounding, or by a code of a number."""

MODEL: list[Qwen3ForCausalLM] = []
ALONE: dict[Any, list[int]] = {}


def shared_model() -> Qwen3ForCausalLM:
    if not MODEL:
        MODEL.append(random_model(context=1024))
    return MODEL[0]


class Reply:
    """A handle, what was taken of it, and what it gets alone."""

    def __init__(self, handle: Handle, kind: str, expected: list[int]) -> None:
        self.handle = handle
        self.kind = kind
        self.expected = expected
        self.found: list[int] = []


def assert_as_alone(reply: Reply, *, whole: bool) -> None:
    found, expected = reply.found, reply.expected
    if reply.kind not in EXACT_KINDS and found != expected[: len(found)]:
        place = next(n for n, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other)
        request = reply.handle.request
        text = mx.array([[*request.prompt, *expected[:place]]])
        logits = shared_model()(text, KINDS[reply.kind].make(shared_model()))[0, -1]
        gap = abs((logits[found[place]] - logits[expected[place]]).item())
        assert gap <= RING_BOUND[reply.kind], (reply.kind, place, gap)
        return
    assert found == (expected if whole else expected[: len(found)])


class SchedulerStates(RuleBasedStateMachine):
    """Requests of all kinds of caches on a machine whose memory comes and goes."""

    @initialize(store=st.sampled_from([0, 2 * ROW, 1 << 30]), is_gpu=st.booleans(), most=st.integers(1, 8))
    def begin(self, store: int, is_gpu: bool, most: int) -> None:
        self.stack = contextlib.ExitStack()
        self.resize = self.stack.enter_context(machine(shared_model(), 1 << 30, is_gpu=is_gpu))
        self.scheduler = new_scheduler(shared_model(), store=store, max_running=most)
        self.replies: list[Reply] = []
        self.was_short = False
        self.held = 0

    @rule(
        text=st.integers(0, 2),
        length=st.sampled_from([1, 5, 17, 40, 90, 250, 300]),
        count=st.sampled_from([1, 4, 12, 30]),
        kind=st.sampled_from(list(KINDS)),
        sampling=st.integers(0, 2),
        constraint=st.integers(0, 2),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        chunk=st.sampled_from([None, None, 16, 40]),
        guesses=st.booleans(),
    )
    def submit(
        self,
        text: int,
        length: int,
        count: int,
        kind: str,
        sampling: int,
        constraint: int,
        priority: int,
        chunk: int | None,
        guesses: bool,
    ) -> None:
        if kind not in EXACT_KINDS:  # whose margins are those of a greedy draw
            sampling = constraint = 0
        key = (text, length, count, kind, sampling, constraint)
        common: dict[str, Any] = {
            "sampling": SAMPLING[sampling],
            "constraints": CONSTRAINTS[constraint],
            "cache": KINDS[kind],
            "priority": priority,
        }
        prompt = PROMPTS[text][:length]
        if key not in ALONE:
            with machine(shared_model(), 1 << 30):
                ALONE[key] = alone(shared_model(), asked(prompt, count, **common))
        request: Request = asked(
            prompt, count, prefill_chunk=chunk, drafter=PromptLookup() if guesses else None, **common
        )
        try:
            handle = self.scheduler.submit(request)
        except InsufficientMemoryError:
            assert self.was_short
            return
        self.replies.append(Reply(handle, kind, ALONE[key]))

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            before = account().left()
            self.scheduler.step()
            after = account().left()
            assert after >= min(before, 0), (before, after)

    @precondition(lambda self: self.replies)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        reply = data.draw(st.sampled_from(self.replies))
        reply.found += ids(taken(reply.handle))
        assert_as_alone(reply, whole=False)

    @precondition(lambda self: self.replies)
    @rule(data=st.data(), by_letting_go=st.booleans())
    def cancel(self, data: st.DataObject, by_letting_go: bool) -> None:
        place = data.draw(st.integers(0, len(self.replies) - 1))
        reply = self.replies.pop(place)
        if not by_letting_go:
            self.scheduler.cancel(reply.handle)

    @rule(rows=st.integers(1, 6))
    def run_short_of_memory(self, rows: int) -> None:
        self.was_short = True
        self.resize(rows * ROW)

    @rule()
    def have_memory_again(self) -> None:
        self.resize(1 << 30)

    @rule(nbytes=st.sampled_from([1, ROW, 1 << 30]))
    def evict(self, nbytes: int) -> None:
        self.scheduler.store.shrink(nbytes)

    @invariant()
    def no_error_but_of_memory(self) -> None:
        for reply in getattr(self, "replies", ()):
            if reply.handle.error is not None:
                assert isinstance(reply.handle.error, InsufficientMemoryError)
                assert self.was_short

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        with self.stack:
            self.resize(1 << 30)
            for _ in range(4000):
                if not self.scheduler.step():
                    break
            for reply in self.replies:
                reply.found += ids(taken(reply.handle))
                assert reply.handle.is_over
                assert_as_alone(reply, whole=reply.handle.error is None)
            assert self.scheduler.cache_bytes == 0
            self.replies.clear()


TestSchedulerStates = SchedulerStates.TestCase
TestSchedulerStates.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


class MoreSchedulerStates(SchedulerStates):
    """The same, longer and more often."""


TestMoreSchedulerStates = MoreSchedulerStates.TestCase
TestMoreSchedulerStates.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
pytest.mark.slow(TestMoreSchedulerStates)
