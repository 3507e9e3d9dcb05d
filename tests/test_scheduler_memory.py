"""Memory: who is let in, who waits, who gives way and is read again, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlxqwen.engine.generation import Generation
from mlxqwen.engine.memory import account, slot_bytes
from mlxqwen.engine.request import Request
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.engine.speculation.prompt_lookup import PromptLookup
from mlxqwen.errors import InsufficientMemoryError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from tests.conftest import VOCAB_SIZE, random_model
from tests.scheduling import KINDS, Forced, alone, asked, constrained, ids, machine, new_scheduler, run, taken

ROW = 256 * 1024
"""Bytes of a row of up to 256 tokens in float32."""

Expected = Callable[[str, list[Request]], list[list[int]]]
SEEDED = SamplingParams(seed=3, temperature=1.5, presence_penalty=1.0, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=2048)


@pytest.fixture(scope="module")
def expected_of(model: Qwen3ForCausalLM) -> Expected:
    """What requests get alone, computed once for each name that a test gives them."""
    found: dict[str, list[list[int]]] = {}

    def expected(name: str, requests: list[Request]) -> list[list[int]]:
        if name not in found:
            found[name] = [alone(model, request) for request in requests]
        return found[name]

    return expected


def text(length: int, start: int = 0) -> list[int]:
    return [(start + n) % VOCAB_SIZE for n in range(length)]


# Beginning


def test_what_does_not_fit_waits_and_begins_when_another_has_ended(model: Qwen3ForCausalLM) -> None:
    requests = [asked(text(20, start), 10, sampling=SEEDED) for start in range(5)]
    expected = [alone(model, request) for request in requests]
    with machine(model, 2 * ROW + ROW // 2):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(request) for request in requests]
        scheduler.step()
        assert len(scheduler.running) == 2
        assert [one.number for one in scheduler.waiting] == [2, 3, 4]
        assert run(scheduler, handles) == expected


def test_prompts_that_are_being_read_are_counted_before_they_have_buffers(model: Qwen3ForCausalLM) -> None:
    """Let in one a step while the first is read; never more than there is room for."""
    with machine(model, 4 * ROW):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(asked(text(250), 3, prefill_chunk=16))]
        for start in range(1, 8):
            scheduler.step()
            handles.append(scheduler.submit(asked(text(250, start), 3, prefill_chunk=16)))
            assert ROW * (len(scheduler.reading) + len(scheduler.running)) <= 4 * ROW
        for tokens, handle in zip(run(scheduler, handles), handles, strict=True):
            assert len(tokens) == 3
            assert handle.error is None


def of_many_lengths(kind: str) -> list[Request]:
    lengths = [250, 20, 255, 500, 100, 252, 251, 30]
    return [asked(text(length, n), 12, cache=KINDS[kind]) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "ring", "4 bits"])
def test_buffers_never_take_more_than_there_is(
    model: Qwen3ForCausalLM, expected_of: Expected, kind: str, is_gpu: bool
) -> None:
    """Rows that join, grow and leave, of lengths on both sides of a step of growth."""
    requests = of_many_lengths(kind)
    expected = expected_of(f"many lengths, {kind}", requests)
    with machine(model, 5 * ROW, is_gpu=is_gpu):
        scheduler = new_scheduler(model, store=1 << 30)
        handles = [scheduler.submit(request) for request in requests]
        found: list[list[int]] = [[] for _ in handles]
        while scheduler.step():
            assert account().left() >= 0
            for tokens, handle in zip(found, handles, strict=True):
                tokens += ids(taken(handle))
        assert [handle.error for handle in handles] == [None] * len(handles)
    assert found == expected


def test_the_store_gives_way_first(model: Qwen3ForCausalLM) -> None:
    with machine(model, 3 * ROW):
        scheduler = new_scheduler(model, store=1 << 30)
        for start in range(6):
            run(scheduler, [scheduler.submit(asked(text(200, start), 2))])
        before = scheduler.store.nbytes
        handles = [scheduler.submit(asked(text(200, 50 + n), 2)) for n in range(2)]
        scheduler.step()
        assert len(scheduler.running) == 2
        assert scheduler.store.nbytes < before
        run(scheduler, handles)


# What can never fit


def test_what_can_never_fit_is_refused_at_once_with_both_numbers(model: Qwen3ForCausalLM) -> None:
    with machine(model, 2 * ROW):
        scheduler = new_scheduler(model)
        with pytest.raises(
            InsufficientMemoryError,
            match=r"^prompt: its cache of 600 tokens takes 0\.8 MB, expected at "
            r"most 0\.5 MB",
        ) as caught:
            scheduler.submit(asked(text(600), 1))
        for way_out in ("--max-kv-size", "--kv-bits", "--force", "force=True"):
            assert way_out in caught.value.hint
        assert not scheduler.has_work
        handle = scheduler.submit(asked(text(400), 2000))  # max_tokens reserve nothing
        scheduler.step()
        assert taken(handle)


def test_a_ring_and_fewer_bits_fit_where_all_tokens_do_not(model: Qwen3ForCausalLM) -> None:
    with machine(model, 2 * ROW):
        scheduler = new_scheduler(model)
        for kind in ("ring", "4 bits"):
            request = asked(text(600), 2, cache=KINDS[kind])
            handle = scheduler.submit(request)
            assert len(run(scheduler, [handle])[0]) == 2


def test_without_the_check_nothing_is_refused(model: Qwen3ForCausalLM) -> None:
    with machine(model, 0):
        scheduler = new_scheduler(model, checks_memory=False)
        request = asked(text(250), 20)  # with a step of growth
        assert run(scheduler, [scheduler.submit(request)]) == [alone(model, request)]


# Growing


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_lone_reply_that_outgrows_the_memory_ends_with_its_text_so_far(
    model: Qwen3ForCausalLM, expected_of: Expected, is_gpu: bool
) -> None:
    request = asked(text(250), 1000)
    (expected,) = expected_of("outgrown", [asked(text(250), 512 - 250 + 1)])
    with machine(model, 2 * ROW, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        handle = scheduler.submit(request)
        (found,) = run(scheduler, [handle])
        assert len(found) >= 6
        assert found == expected[: len(found)]
        assert isinstance(handle.error, InsufficientMemoryError)
        with pytest.raises(InsufficientMemoryError, match=r"^reply: [0-9,]+ tokens behind a prompt of 250 take all"):
            handle.next_token()
        assert scheduler.cache_bytes == 0


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "8 bits", "4 bits"])
@pytest.mark.parametrize("store", [0, 1 << 30])
def test_who_gave_way_goes_on_with_the_same_tokens(
    model: Qwen3ForCausalLM, expected_of: Expected, kind: str, store: int, is_gpu: bool
) -> None:
    common: dict[str, Any] = {"cache": KINDS[kind], "sampling": SEEDED}
    forced = constrained(lambda: Forced({20: 7, 35: 8}))
    requests = [asked(text(230, n), 40, constraints=forced if n == 2 else (), **common) for n in range(3)]
    expected = expected_of(f"gave way, {kind}", requests)
    with machine(model, int(4.6 * 256 * slot_bytes(model, KINDS[kind])), is_gpu=is_gpu):
        scheduler = new_scheduler(model, store=store)
        handles = [scheduler.submit(request) for request in requests]
        found: list[list[int]] = [[] for _ in handles]
        waited = False
        while scheduler.step():
            waited = waited or bool(scheduler.waiting and any(found))
            for tokens, handle in zip(found, handles, strict=True):
                tokens += ids(taken(handle))
        assert waited
        assert [handle.error for handle in handles] == [None] * 3
    assert found == expected


def victims_of(model: Qwen3ForCausalLM, priorities: list[int]) -> list[int]:
    """Which of equal requests have given way, the first one first."""
    gone: list[int] = []
    with machine(model, int(4.6 * ROW)), pytest.MonkeyPatch.context() as patch:
        preempt = Scheduler._preempt

        def noted(self: Scheduler, one: Generation) -> None:
            gone.append(one.number)
            preempt(self, one)

        patch.setattr(Scheduler, "_preempt", noted)
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(asked(text(250, n), 20, priority=one)) for n, one in enumerate(priorities)]
        run(scheduler, handles)
        assert [handle.token_count for handle in handles] == [20] * len(handles)
    return gone


@pytest.mark.parametrize(
    ("priorities", "gone"), [([0, 0, 0], [2, 1]), ([0, 5, 0], [1, 2]), ([5, -5, -5], [0, 2]), ([-1, 0, 1], [2, 1])]
)
def test_the_least_urgent_gives_way_and_of_equals_the_youngest(
    model: Qwen3ForCausalLM, priorities: list[int], gone: list[int]
) -> None:
    assert victims_of(model, priorities)[: len(gone)] == gone


def test_who_gave_way_and_fits_no_empty_machine_ends_with_its_text_so_far(model: Qwen3ForCausalLM) -> None:
    """It runs in buffers of 512 tokens with another; when it has given way it needs one step of growth more."""
    with machine(model, 2 * ROW + ROW // 2):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(asked(text(200), 300)), scheduler.submit(asked(text(200, 1), 400))]
        found = run(scheduler, handles)
        assert len(found[0]) == 300
        assert isinstance(handles[1].error, InsufficientMemoryError)
        assert 300 <= len(found[1]) < 400
        assert found[1] == alone(model, asked(text(200, 1), 400))[: len(found[1])]


@pytest.mark.slow
@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_reply_that_is_far_ahead_of_its_reader_may_give_way(
    model: Qwen3ForCausalLM, expected_of: Expected, is_gpu: bool
) -> None:
    requests = [asked(text(100), 450, sampling=SEEDED), asked(text(100, 1), 350, sampling=SEEDED)]
    expected = expected_of("far ahead", requests)
    with machine(model, int(4.2 * ROW), is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(requests[0])]
        while scheduler.step():  # nobody reads it
            pass
        assert 256 <= len(handles[0]._generation.records) < 300
        handles.append(scheduler.submit(requests[1]))
        second: list[int] = []
        while not handles[1].is_over:
            assert scheduler.step()
            second += ids(taken(handles[1]))
        assert second == expected[1]
        first = ids(taken(handles[0]))
        assert first + run(scheduler, handles)[0] == expected[0]


def test_drafts_and_memory(model: Qwen3ForCausalLM) -> None:
    request = asked(text(20) * 10, 400, drafter=PromptLookup())
    expected = alone(model, asked(text(20) * 10, 400))
    with machine(model, 2 * ROW):
        scheduler = new_scheduler(model)
        handle = scheduler.submit(request)
        (found,) = run(scheduler, [handle])
        assert isinstance(handle.error, InsufficientMemoryError)
        assert found == expected[: len(found)]
        assert len(found) > 40


# Copying


def test_joining_copies_a_row_of_buffers_for_each_row_that_is_there(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are copied as one joins: those of the whole new batch, once, and nothing in the steps between."""
    from mlxqwen.cache import KVCache

    copied: list[int] = []
    assemble = KVCache.assemble

    def counted(self: KVCache, parts: Any) -> None:
        assemble(self, parts)
        copied.append(self.nbytes)

    monkeypatch.setattr(KVCache, "assemble", counted)
    scheduler = new_scheduler(model)
    handles = [scheduler.submit(asked([n], 30)) for n in range(3)]
    for _ in range(5):
        scheduler.step()
    copied.clear()
    handles.append(scheduler.submit(asked([4], 20)))
    for _ in range(5):
        scheduler.step()
    assert copied == [4 * ROW]
    run(scheduler, handles)
