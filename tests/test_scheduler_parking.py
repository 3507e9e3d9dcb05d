"""Replies far ahead of their readers wait, and give up their rows while others need them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxqwen.cache import make_cache
from mlxqwen.engine import driver, generation
from mlxqwen.engine.memory import slot_bytes
from mlxqwen.engine.request import CacheKind
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from tests.conftest import random_model
from tests.scheduling import KINDS, alone, asked, has_work, ids, machine, new_scheduler, run, taken, watched

MAX_UNREAD = generation.MAX_UNREAD // 4
SEEDED = SamplingParams(seed=3, temperature=1.5, presence_penalty=0.5)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=1024)


@pytest.fixture(autouse=True)
def few_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply waits at a fourth of what it may have unread elsewhere: all is the same, sooner."""
    monkeypatch.setattr(generation, "MAX_UNREAD", MAX_UNREAD)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_reply_that_nobody_reads_waits(model: Qwen3ForCausalLM, is_gpu: bool) -> None:
    request = asked([1], 150, sampling=SEEDED)
    expected = alone(model, request)
    with machine(model, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        handle = scheduler.submit(request)
        steps = 0
        while scheduler.step():
            steps += 1
        assert steps == MAX_UNREAD
        assert has_work(scheduler) is False
        found = [handle.next_token().token for _ in range(MAX_UNREAD // 2)]
        assert has_work(scheduler) is False  # half of it is still there
        found += [handle.next_token().token]
        assert has_work(scheduler)
        assert found + [handle.next_token().token for _ in range(150 - len(found))] == expected


@pytest.mark.parametrize("is_gpu", [False, True])
def test_others_go_on_beside_one_that_waits_for_its_reader(model: Qwen3ForCausalLM, is_gpu: bool) -> None:
    unread, read = asked([1], 100, sampling=SEEDED), asked([2], 100, sampling=SEEDED)
    expected = [alone(model, request) for request in (unread, read)]
    with machine(model, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(request) for request in (unread, read)]
        shapes: list[tuple[int, ...]] = []
        with watched(shapes.append):
            found: list[int] = []
            while not handles[1].is_over:
                assert scheduler.step()
                found += ids(taken(handles[1]))
        assert found == expected[1]
        assert shapes[-25:] == [(1, 1)] * 25  # nobody computes for the one that waits
        first = ids(taken(handles[0]))
        assert MAX_UNREAD <= len(first) <= MAX_UNREAD + 2
        assert first + run(scheduler, handles)[0] == expected[0]


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "4 bits"])
@pytest.mark.parametrize("store", [0, 1 << 30])
def test_a_row_is_given_up_while_others_wait(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, kind: str, store: int, is_gpu: bool
) -> None:
    monkeypatch.setattr("mlxqwen.engine.generation.MAX_UNREAD", 16)
    requests = [asked([n] * 20, 50, sampling=SEEDED, cache=KINDS[kind]) for n in (1, 2)]
    expected = [alone(model, request) for request in requests]
    with machine(model, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(model, store=store, max_running=1)
        handles = [scheduler.submit(request) for request in requests]
        found: list[list[int]] = [[], []]
        for place in (1, 0):  # the last one first; nobody reads the others
            while found[place] == [] or not handles[place].is_over:
                found[place] += ids(taken(handles[place]))
                assert scheduler.step() or handles[place].is_over
                assert len(scheduler.running) + len(scheduler.reading) <= 1
    assert found == expected


def test_a_row_that_was_given_up_is_not_read_again_before_anybody_reads_it(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, max_running=1)
    handles = [scheduler.submit(asked([n] * 20, 100)) for n in (1, 2)]
    shapes: list[tuple[int, ...]] = []
    with watched(shapes.append):
        while not handles[1].is_over:
            assert scheduler.step()
            taken(handles[1])
        assert not scheduler.step()
    assert [shape for shape in shapes if shape != (1, 1)] == [(1, 20)] * 2


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("is_gpu", [False, True])
def test_two_iterators_taken_in_turn_do_not_stand_still(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, rows: int, is_gpu: bool
) -> None:
    """Whether they run beside each other, or one has to wait until the other has given up its row."""
    with machine(model, 1 << 30, is_gpu=is_gpu):
        scheduler = new_scheduler(model, max_running=rows)
        monkeypatch.setattr("mlxqwen.engine.token_stream.scheduler_of", lambda _: scheduler)
        streams = [generate_tokens(model, [n], sampling=SEEDED, max_tokens=80) for n in (1, 2)]
        pairs = list(zip(*streams, strict=True))
    for place in range(2):
        assert [pair[place][1].token for pair in pairs] == alone(model, asked([place + 1], 80, sampling=SEEDED))


def test_one_iterator_is_read_to_its_end_while_another_has_only_begun(model: Qwen3ForCausalLM) -> None:
    first, second = (generate_tokens(model, [n], sampling=SEEDED, max_tokens=100) for n in (1, 2))
    begun = [next(first)[1].token]
    whole = [token.token for _, token in second]
    assert whole == alone(model, asked([2], 100, sampling=SEEDED))
    assert begun + [token.token for _, token in first] == alone(model, asked([1], 100, sampling=SEEDED))


def test_rings_and_guesses_go_on_where_they_waited(model: Qwen3ForCausalLM) -> None:
    from mlxqwen.engine.speculation.prompt_lookup import PromptLookup

    for kind in (CacheKind(), KINDS["ring"]):
        request = asked([1, 2, 1, 2], 125, cache=kind, drafter=PromptLookup())
        scheduler = new_scheduler(model)
        handle = scheduler.submit(request)
        while scheduler.step():
            pass
        found = ids(taken(handle))
        assert MAX_UNREAD <= len(found) <= MAX_UNREAD + 9
        assert found + run(scheduler, [handle])[0] == alone(model, asked([1, 2, 1, 2], 125, cache=kind))


def test_a_thread_that_waits_for_memory_that_nobody_gives_back_is_told(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as where the waiting thread takes the steps itself, but others may still come to read."""
    monkeypatch.setattr(driver, "PATIENCE", 0.2)
    row = slot_bytes(model, CacheKind()) * 512
    with machine(model, row + row // 2):
        scheduler = new_scheduler(model)
        unread = scheduler.submit(asked([1] * 200, 300, cache=make_cache(model)))
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(unread.next_token).result().finish_reason
        while scheduler.step():
            pass
        waits = scheduler.submit(asked([2] * 300, 4))
        with pytest.raises(OptionError, match="cannot go on, as nobody gives back the memory"):
            waits.next_token()
        assert not waits.is_over
        unread.cancel()
        del unread
        assert len(ids([waits.next_token() for _ in range(4)])) == 4
        scheduler.close()


def test_a_reader_that_only_polls_lets_a_parked_reply_go_on(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    scheduler.driver.start(scheduler)
    handle = scheduler.submit(asked([1, 2, 3], MAX_UNREAD + 20))
    until = time.monotonic() + 20
    generation = handle.generation_of(scheduler)
    while not generation.is_parked and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)  # its thread waits for work, for a minute
    while not handle.is_over and time.monotonic() < until:
        while handle.poll() is not None:
            pass
        time.sleep(0.001)
    scheduler.close()
    assert handle.token_count == MAX_UNREAD + 20
