"""Steps of the scheduler: who begins, who waits, and how much of a prompt is read between two tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.running import RunningBatch
from mlxqwen.engine.scheduler import Scheduler
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.conftest import VOCAB_SIZE, random_model
from tests.scheduling import KINDS, alone, asked, has_work, ids, machine, new_scheduler, run, taken, watched


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=2048)


def steps_until_over(scheduler: Scheduler, handles: list[Handle]) -> list[list[int]]:
    """For each step, the places of the handles that got a token."""
    told = []
    while not all(handle.is_over for handle in handles):
        assert scheduler.step()
        told.append([place for place, handle in enumerate(handles) if taken(handle)])
    return told


# How long a reply waits


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "ring", "8 bits"])
def test_a_running_reply_waits_for_no_more_than_a_chunk_of_a_prompt(
    model: Qwen3ForCausalLM, kind: str, is_gpu: bool
) -> None:
    chunk, chunks = 32, 20
    with machine(model, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        running = scheduler.submit(asked([1, 2, 3], 60, cache=KINDS[kind]))
        fed: list[int] = []
        read_at: list[int] = []
        with watched(lambda shape: fed.append(shape[1] if shape[1] > 1 else 0)):
            joining = None
            while not running.is_over:
                scheduler.step()
                read_at += [sum(fed)] * len(taken(running))
                if joining is None and len(read_at) == 5:
                    joining = scheduler.submit(
                        asked(
                            [n % VOCAB_SIZE for n in range(chunk * chunks)], 3, cache=KINDS[kind], prefill_chunk=chunk
                        )
                    )
        assert joining is not None
        assert len(taken(joining)) == 3
    between = [after - before for before, after in pairwise(read_at)]
    assert max(between) == chunk
    assert sum(between) in (chunk * chunks, chunk * chunks - 1)  # a ring's last token is read by itself


def test_every_running_reply_gets_a_token_in_every_step(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    handles = [scheduler.submit(asked([place], 6)) for place in range(4)]
    assert steps_until_over(scheduler, handles) == [[0, 1, 2, 3]] * 6


def test_prompts_of_many_requests_share_one_budget_a_step(model: Qwen3ForCausalLM) -> None:
    """Two chunks of prompts that could be read together, and one that could not."""
    scheduler = new_scheduler(model)
    fed: list[int] = []
    handles = [scheduler.submit(asked([place] * 30, 4, prefill_chunk=64)) for place in (1, 2, 3, 4, 5)]
    with watched(lambda shape: fed.append(shape[0] * shape[1] if shape[1] > 1 else 0)):
        while not all(handle.is_over for handle in handles):
            before = len(fed)
            scheduler.step()
            assert sum(fed[before:]) <= 64
            for handle in handles:
                taken(handle)
    assert sum(fed) == 5 * 30


def test_prompts_that_end_together_join_in_one_copy(model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts that are read apart, as their lengths differ, in the step of one chunk."""
    merged: list[int] = []
    merge = RunningBatch.merge

    def counted(self: RunningBatch, others: Sequence[RunningBatch]) -> None:
        merged.append(len(others))
        merge(self, others)

    monkeypatch.setattr(RunningBatch, "merge", counted)
    scheduler, requests = new_scheduler(model), [asked([1] * length, 4) for length in (40, 2, 100)]
    handles = [scheduler.submit(request) for request in requests]
    assert scheduler.step()
    assert (len(scheduler.running), merged) == (3, [2])
    assert run(scheduler, handles) == [alone(model, request) for request in requests]


# Who begins


def begun_in_order(scheduler: Scheduler, handles: list[Handle]) -> list[int]:
    order: list[int] = []
    while not all(handle.is_over for handle in handles):
        assert scheduler.step()
        order += [place for place, handle in enumerate(handles) if taken(handle) and place not in order]
    return order


def test_first_come_first_served(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, max_running=1)
    handles = [scheduler.submit(asked([place] * (20 - place), 2)) for place in range(5)]
    assert begun_in_order(scheduler, handles) == [0, 1, 2, 3, 4]


def test_lower_priorities_go_first_and_equals_in_their_order(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, max_running=1)
    priorities = [0, 100, -1, 0, -100, -1]
    handles = [scheduler.submit(asked([place], 2, priority=one)) for place, one in enumerate(priorities)]
    assert begun_in_order(scheduler, handles) == [4, 2, 5, 0, 3, 1]


def test_prompts_are_read_in_the_order_of_their_priorities(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    handles = [
        scheduler.submit(asked([place] * 100, 1, priority=one, prefill_chunk=32))
        for place, one in enumerate([5, 0, -5])
    ]
    assert begun_in_order(scheduler, handles) == [2, 1, 0]


def test_what_waits_preempts_nobody(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, max_running=1)
    first = scheduler.submit(asked([1], 5, priority=100))
    scheduler.step()
    urgent = scheduler.submit(asked([2], 2, priority=-100))
    assert len(taken(first)) == 1
    assert steps_until_over(scheduler, [first, urgent]) == [[0]] * 4 + [[1]] * 2


@pytest.mark.parametrize("most", [1, 2, 3])
def test_so_many_run_at_once(model: Qwen3ForCausalLM, most: int) -> None:
    scheduler = new_scheduler(model, max_running=most)
    requests = [asked([place] * (place + 1), 3 + place) for place in range(7)]
    handles = [scheduler.submit(request) for request in requests]
    found: list[list[GeneratedToken]] = [[] for _ in handles]
    rows: list[int] = []
    with watched(lambda shape: rows.append(shape[0])):
        while not all(handle.is_over for handle in handles):
            scheduler.step()
            assert len(scheduler.running) + len(scheduler.reading) <= most
            for tokens, handle in zip(found, handles, strict=True):
                tokens += taken(handle)
    assert max(rows) == most
    assert [ids(tokens) for tokens in found] == [alone(model, request) for request in requests]


@pytest.mark.parametrize("priority", [-101, 101, 1.5, True, None, "0"])
def test_priorities_out_of_range(priority: Any) -> None:
    with pytest.raises(OptionError, match=r"^priority: (found|expected)"):
        asked([1], priority=priority)


def test_a_thousand_requests_at_once(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    requests = [asked([place % VOCAB_SIZE, place // VOCAB_SIZE], 2) for place in range(1000)]
    found = run(scheduler, [scheduler.submit(request) for request in requests])
    assert all(len(tokens) == 2 for tokens in found)
    for place in range(0, 1000, 97):
        assert found[place] == alone(model, requests[place])
    assert scheduler.cache_bytes == 0
    assert [*scheduler.waiting, *scheduler.reading, *scheduler.running] == []


def test_nothing_is_done_where_nothing_waits(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    assert not scheduler.step()
    assert has_work(scheduler) is False
    handle = scheduler.submit(asked([1], 1))
    assert has_work(scheduler)
    run(scheduler, [handle])
    assert not scheduler.step()


def test_waiting_for_work_ends_with_a_request_of_another_thread_or_with_its_time(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    assert not scheduler.wait(timeout=0.01)
    handles: list[Handle] = []
    caller = threading.Timer(0.05, lambda: handles.append(scheduler.submit(asked([1, 2], 3))))
    caller.start()
    assert scheduler.wait(timeout=60.0)
    caller.join()
    while scheduler.step():
        pass
    assert ids(taken(handles[0])) == alone(model, asked([1, 2], 3))
    closing = threading.Timer(0.05, scheduler.close)
    closing.start()
    scheduler.wait(timeout=60.0)
    assert scheduler.is_closed
    closing.join()


def test_a_step_in_which_one_is_let_go_is_not_the_last(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = new_scheduler(model, max_running=1)
    handles = [scheduler.submit(asked([1] * 64, 4, prefill_chunk=16)), scheduler.submit(asked([2] * 8, 4))]
    expected = alone(model, asked([2] * 8, 4))
    assert scheduler.step()
    admit = Scheduler._admit

    def admit_then_let_go(self: Scheduler) -> bool:
        told = admit(self)
        del handles[:-1]  # as the garbage collector may at any moment
        return told

    monkeypatch.setattr(Scheduler, "_admit", admit_then_let_go)
    found = []
    while scheduler.step():
        found += ids(taken(handles[0]))
    assert found + ids(taken(handles[0])) == expected
    assert handles[0].is_over


# Padding


@pytest.mark.parametrize("is_gpu", [False, True])
def test_rows_of_very_different_lengths_run_in_groups(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, is_gpu: bool
) -> None:
    """What a pass's buffers hold beyond the rows' own slots stays below a quarter of them."""
    forward, wasted = RunningBatch._forward, []

    def watched_forward(batch: RunningBatch, tokens: mx.array) -> mx.array:
        own = [-(-offset // 256) * 256 for offset in batch.cache.offsets]
        wasted.append(1 - sum(own) / (len(own) * batch.cache.capacity))
        return forward(batch, tokens)

    monkeypatch.setattr(RunningBatch, "_forward", watched_forward)
    with machine(model, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        requests = [asked([place] * length, 8) for place, length in enumerate([800, 10, 700, 300, 20, 500])]
        handles = [scheduler.submit(request) for request in requests]
        found: list[list[int]] = [[] for _ in handles]
        while not all(handle.is_over for handle in handles):
            scheduler.step()
            for tokens, handle in zip(found, handles, strict=True):
                tokens += ids(taken(handle))
    assert 0 < max(wasted) < 0.25
    assert found == [alone(model, request) for request in requests]
