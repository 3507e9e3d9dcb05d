"""How replies end before their time: cancelled, left, closed, a callback that raises; and what stays in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxqwen import Conversation, Engine, batch_generate, stream_generate
from mlxqwen.engine.schedulers import scheduler_of
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scheduling import alone, asked, ids, machine, new_scheduler, run, taken, watched

SEEDED = SamplingParams(seed=3, temperature=1.5, presence_penalty=0.5)
QUESTION: list[Any] = [{"role": "user", "content": "How many r's in strawberry?"}]


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model(context=512)


# Cancelling


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("how", ["cancel", "let go"])
def test_a_row_leaves_within_one_step(model: Qwen3ForCausalLM, how: str, is_gpu: bool) -> None:
    requests = [asked([n], 20, sampling=SEEDED) for n in range(3)]
    expected = [alone(model, request) for request in requests]
    rows: list[int] = []
    with machine(model, 1 << 32, is_gpu=is_gpu), watched(lambda shape: rows.append(shape[0])):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(request) for request in requests]
        for _ in range(4):
            scheduler.step()
        if how == "cancel":
            before = len(ids(taken(handles[1])))
            scheduler.cancel(handles[1])
        gone = handles.pop(1)
        if how == "let go":
            before = 4
            del gone
        rows.clear()
        found = run(scheduler, handles)
    assert before == 4
    assert rows[0] == 2
    assert found == [expected[0], expected[2]]


def test_a_cancelled_handle_tells_nothing_more(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model)
    handle = scheduler.submit(asked([1], 20))
    handle.next_token()
    handle.cancel()
    handle.cancel()
    with pytest.raises(StopIteration):
        handle.next_token()
    with pytest.raises(OptionError, match=r"^handle: found a request that was cancelled"):
        handle.result()
    assert not scheduler.step()
    assert scheduler.cache_bytes == 0


def test_a_request_is_cancelled_wherever_it_is(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, max_running=2)
    running, reading, waiting, last = (
        scheduler.submit(asked([n] * length, 5, prefill_chunk=32)) for n, length in enumerate([1, 200, 1, 1])
    )
    scheduler.step()
    assert [len(scheduler.running), len(scheduler.reading), len(scheduler.waiting)] == [1, 1, 2]
    for handle in (running, reading, waiting):
        handle.cancel()
    scheduler.step()
    assert [one.number for one in scheduler.running] == [3]
    assert len(run(scheduler, [last])[0]) == 5


def test_a_foreign_handle_is_refused(model: Qwen3ForCausalLM) -> None:
    one, other = new_scheduler(model), new_scheduler(model)
    handle = one.submit(asked([1], 3))
    with pytest.raises(OptionError, match=r"^handle: found one of another scheduler"):
        other.cancel(handle)
    assert len(run(one, [handle])[0]) == 3


# Closing


def test_a_close_ends_what_runs_reads_and_waits(model: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(model, max_running=2)
    handles = [scheduler.submit(asked([n] * length, 5, prefill_chunk=32)) for n, length in enumerate([1, 200, 1])]
    scheduler.step()
    scheduler.close()
    scheduler.close()
    assert len(taken(handles[0])) == 1  # what was told is there
    for handle in handles:
        with pytest.raises(OptionError, match=r"^engine: closed before this reply was over"):
            handle.next_token()
    with pytest.raises(OptionError, match=r"^engine: found a request after close\(\), expected an open one") as error:
        scheduler.submit(asked([1]))
    assert error.value.hint
    assert scheduler.cache_bytes == 0


def test_a_closed_engine_refuses_and_a_new_one_does_not(tokenizer: Tokenizer) -> None:
    babbler = random_model(vocab_size=tokenizer.vocab_size, context=512)
    with Engine(babbler, tokenizer) as engine:
        events = engine.stream(QUESTION, max_tokens=20)
        next(events)
    with pytest.raises(OptionError, match=r"^engine: closed"):
        for _ in events:
            pass
    with pytest.raises(OptionError, match=r"^engine: found in use after close\(\), expected an open one"):
        engine.chat(QUESTION)
    assert Engine(babbler, tokenizer).chat(QUESTION, max_tokens=2) is not None


# Callbacks


def test_progress_is_told_by_who_iterates_and_grows(model: Qwen3ForCausalLM) -> None:
    told: list[tuple[int, int]] = []
    stream = generate_tokens(
        model, list(range(90)), max_tokens=2, prefill_chunk=20, on_prefill=lambda *done: told.append(done)
    )
    assert told == []
    list(stream)
    assert told == [(0, 90), (20, 90), (40, 90), (60, 90), (80, 90), (90, 90)]


def test_progress_is_not_told_again_after_giving_way(model: Qwen3ForCausalLM) -> None:
    row = 256 * 1024
    told: list[list[int]] = [[], [], []]
    with machine(model, int(4.6 * row)):
        scheduler = new_scheduler(model)
        handles = [scheduler.submit(asked([n] * 240, 40, prefill_chunk=64, reports_progress=True)) for n in range(3)]
        for handle, own in zip(handles, told, strict=True):
            handle.on_prefill = lambda done, _, own=own: own.append(done)
        found = run(scheduler, handles)
    assert [len(tokens) for tokens in found] == [40] * 3
    for own in told:
        assert own[0] == 0
        assert own[-1] == 240
        assert all(before < after for before, after in pairwise(own))


def test_a_callback_that_raises_ends_its_own_reply_alone(model: Qwen3ForCausalLM) -> None:
    def refuse(done: int, total: int) -> None:
        if done:
            raise RuntimeError("a callback's own")

    expected = alone(model, asked([1], 10))
    good = generate_tokens(model, [1], sampling=SamplingParams(temperature=0), max_tokens=10)
    first = next(good)[1].token
    bad = generate_tokens(model, [2], max_tokens=10, on_prefill=refuse)
    with pytest.raises(RuntimeError, match="a callback's own"):
        next(bad)
    del bad
    assert [first, *(token.token for _, token in good)] == expected
    assert not scheduler_of(model).step()


def test_a_callback_may_ask_the_same_model(model: Qwen3ForCausalLM) -> None:
    inner: list[list[int]] = []

    def ask(done: int, total: int) -> None:
        inner.append([token.token for _, token in generate_tokens(model, [3], sampling=SEEDED, max_tokens=5)])

    outer = generate_tokens(model, [1, 2], sampling=SEEDED, max_tokens=5, on_prefill=ask)
    assert [token.token for _, token in outer] == alone(model, asked([1, 2], 5, sampling=SEEDED))
    assert inner == [alone(model, asked([3], 5, sampling=SEEDED))] * 2


# Memory: by reference counts alone


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def left_early(events: Any, count: int) -> None:
    for _ in range(count):
        next(events, None)


DOORS: dict[str, Callable[[Engine], object]] = {
    "chat": lambda engine: engine.chat(QUESTION, max_tokens=30),
    "stream": lambda engine: list(engine.stream(QUESTION, max_tokens=30)),
    "stream, left": lambda engine: left_early(engine.stream(QUESTION, max_tokens=30), 4),
    "stream, closed": lambda engine: cast(Any, engine.stream(QUESTION, max_tokens=30)).close(),
    "stream_generate": lambda engine: list(stream_generate(engine.model, engine.tokenizer, "a", max_tokens=30)),
    "stream_generate, left": lambda engine: left_early(
        stream_generate(engine.model, engine.tokenizer, "a", max_tokens=30), 4
    ),
    "batch": lambda engine: batch_generate(engine.model, engine.tokenizer, ["a", "b c", "d"], max_tokens=20),
    "batch, left": lambda engine: left_early(engine.batch([QUESTION] * 3, max_tokens=20), 1),
    "conversation": lambda engine: Conversation(engine, max_tokens=20).chat("Hello"),
    "conversation, left": lambda engine: left_early(Conversation(engine, max_tokens=20).stream("Hello"), 3),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_reply_leaves_no_memory_behind(small: tuple[Qwen3ForCausalLM, Tokenizer], door: str) -> None:
    """Behind the first ones, which fill the store with the same blocks, as much is held as after many more."""
    engine = Engine(*small)
    held: list[int] = []
    with no_collector():
        for _ in range(10):
            DOORS[door](engine)
            scheduler_of(engine.model).step()  # rows that were left go in the next step
            mx.synchronize()
            mx.clear_cache()
            held.append(mx.get_active_memory() - scheduler_of(engine.model).store.held_nbytes)
    assert max(held[3:]) <= min(held) + 65536
    assert scheduler_of(engine.model).cache_bytes == 0


@pytest.mark.parametrize(("count", "at_a_time"), [(300, 1), (2000, 20)])
def test_hundreds_of_replies_leave_memory_flat(count: int, at_a_time: int) -> None:
    """One by one, and thousands in waves that share a batch."""
    small = random_model(layers=1, vocab_size=50)
    scheduler = scheduler_of(small)
    scheduler.use_store(1 << 19)
    held: list[int] = []
    with no_collector():
        for wave in range(count // at_a_time):
            numbers = range(wave * at_a_time, (wave + 1) * at_a_time)
            handles = [scheduler.submit(asked([n % 50, n // 50, *range(20)], 2)) for n in numbers]
            assert [len(tokens) for tokens in run(scheduler, handles)] == [2] * at_a_time
            handles.clear()
            if at_a_time > 1 or wave % 15 == 14:
                mx.synchronize()
                mx.clear_cache()
                held.append(mx.get_active_memory())
    assert 1 << 18 < scheduler.store.nbytes <= 1 << 19
    assert max(held[10:]) <= max(held[5:10]) + 65536
