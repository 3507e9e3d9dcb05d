"""Two models of one server share a small machine's memory: who waits, who goes for whom, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlxqwen.device import current_device
from mlxqwen.engine import generation
from mlxqwen.engine.driver import Driver
from mlxqwen.engine.memory import MemoryAccount, account, slot_bytes, weight_bytes
from mlxqwen.engine.request import CacheKind
from mlxqwen.errors import InsufficientMemoryError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server import answers, service, wakeups
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.conftest import VOCAB_SIZE, random_model
from tests.scheduling import alone, asked, ids, machine, new_scheduler, taken
from tests.several_models import LONG, Several, model_of, several

COMPLETIONS = "/v1/completions"
BIG: dict[str, Any] = {"prompt": [5] * 470, "max_tokens": 2, "ignore_eos": True}  # whose buffers hold 512 tokens


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (answers, service, wakeups):
        monkeypatch.setattr(module, "TICK", 0.002)
    monkeypatch.setattr(generation, "MAX_UNREAD", 16)
    monkeypatch.setattr("mlxqwen.server.registry._SPARE_SHARE", 1 << 40)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@contextmanager
def beside_both(tokenizer: Tokenizer, tokens: int) -> Iterator[Several]:
    """Where caches have room for so many tokens beside both models."""
    model = model_of(tokenizer)
    room = weight_bytes(model) + tokens * slot_bytes(model, CacheKind())
    with machine(model, room), several(tokenizer, keepalive_seconds=0.0) as made:
        yield made


async def running(served: Several, name: str) -> Call:
    """A reply that goes on once it is read, as soon as it has begun."""
    call = served.ask(name, reads=False, **LONG)
    await until(lambda: served.models.find(name).users)
    await until(lambda: served.models.loaded and any(one.engine.scheduler.running for one in served.models.loaded))
    return call


async def finished(call: Call) -> str:
    """The finish reason of a reply, streamed or whole."""
    call.may_read.set()
    await call.end()
    assert call.status == 200, call.body
    body = call.events[-1] if call.headers["content-type"].startswith("text/event-stream") else call.json
    reason: str = body["choices"][0]["finish_reason"]
    return reason


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_has_room_once_another_model_has_gone_waits_for_its_replies(
    tokenizer: Tokenizer, stream: bool
) -> None:
    async def work(served: Several) -> None:
        assert (await served.ask("b").end()).status == 200
        first = await running(served, "a")
        big = Call(served.app, COMPLETIONS, {"model": "b", "stream": stream, **BIG})
        await until(lambda: served.models.find("a").is_leaving)
        assert served.states()["b"] == "loaded"
        later = served.ask("a")  # has its turn behind the one that came before it
        await until(lambda: served.models.find("a").waiting)
        if stream:
            await until(lambda: big.body.count(b": waiting\n\n") > 1)
        assert not big.task.done()
        assert not later.task.done()
        assert await finished(first) == await finished(big) == await finished(later) == "length"
        assert served.states()["a"] == "loaded"
        assert served.weights["a"].loads == 2

    with beside_both(tokenizer, 300) as served:
        run(work(served))
    assert served.service.load.replies == 0


def test_who_leaves_while_it_waits_for_memory_drives_nobody_out(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        assert (await served.ask("b").end()).status == 200
        first = await running(served, "a")
        big = Call(served.app, COMPLETIONS, {"model": "b", **BIG})
        await until(lambda: served.models.find("a").is_leaving)
        big.leave()
        await big.end()
        await until(lambda: not served.models.find("a").is_leaving)
        assert served.service.load.replies == 1
        assert (await served.ask("a").end()).status == 200
        assert await finished(first) == "length"
        assert served.weights["a"].loads == 1

    with beside_both(tokenizer, 300) as served:
        run(work(served))


def test_prompts_of_both_models_that_have_no_room_beside_the_other_take_turns(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        for name in "ab":
            assert (await served.ask(name).end()).status == 200
        calls = [Call(served.app, COMPLETIONS, {"model": name, **BIG}) for name in "abab"]
        assert [await finished(call) for call in calls] == ["length"] * 4

    with beside_both(tokenizer, 300) as served:
        run(work(served))
    assert served.service.load.replies == 0


@pytest.mark.parametrize("is_beside", [True, False])
def test_what_never_fits_is_refused_at_once_with_both_numbers(tokenizer: Tokenizer, is_beside: bool) -> None:
    """The numbers are those of the machine, whatever else it holds now."""
    model = model_of(tokenizer)
    room = 400 * slot_bytes(model, CacheKind())

    async def work(served: Several) -> None:
        if is_beside:
            assert (await served.ask("a").end()).status == 200
        refused = await Call(served.app, COMPLETIONS, {"model": "b", "stream": True, **BIG}).end()
        error = (refused.json if refused.status == 503 else refused.events[-1])["error"]
        assert error["code"] == "out_of_memory"
        assert f"its cache of 470 tokens takes 0.3 MB, expected at most {room / 1e6:.1f} MB" in error["message"]

    with machine(model, room), several(tokenizer) as served:
        run(work(served))
    assert served.service.load.replies == 0


def test_replies_of_both_models_that_outgrow_the_memory_are_all_answered(tokenizer: Tokenizer) -> None:
    """Each grows to what the machine holds of one alone: one gives way, and goes on where it stood."""
    body: dict[str, Any] = {"max_tokens": 300, "temperature": 0.0, "ignore_eos": True}

    def said(call: Call) -> str:
        content: str = call.json["choices"][0]["message"]["content"]
        return content

    async def work(served: Several) -> None:
        apart = {name: said(await served.ask(name, **body).end()) for name in "ab"}
        calls = {name: served.ask(name, **body) for name in "ab"}
        for name, call in calls.items():
            assert await finished(call) == "length"
            assert said(call) == apart[name]

    with beside_both(tokenizer, 700) as served:
        run(work(served))
    assert served.service.load.replies == 0


def test_of_two_replies_that_each_need_the_other_s_weights_to_go_the_later_is_told(tokenizer: Tokenizer) -> None:
    """Neither could ever go on: both hold their models."""
    body: dict[str, Any] = {"max_tokens": 300, "temperature": 0.0, "ignore_eos": True}

    async def work(served: Several) -> None:
        assert (await served.ask("b").end()).status == 200
        first = served.ask("a", **body)
        await until(lambda: (a := served.models.find("a").model) and a.engine.scheduler.running)
        second = await served.ask("b", **body).end()
        assert (second.status, second.json["error"]["code"]) == (503, "out_of_memory")
        assert second.headers["retry-after"] == "10"
        told = second.json["error"]["message"]
        assert "have outgrown the memory beside another model, of which an earlier reply waits" in told
        assert told.endswith("Ask again: the other goes on first, and this one then has its memory.")
        assert await finished(first) == "length"
        assert await finished(served.ask("b", **body)) == "length"

    with beside_both(tokenizer, 300) as served:
        run(work(served))
    assert served.service.load.replies == 0


def test_weights_that_are_being_read_count_before_they_are_there(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        assert (await served.ask("a").end()).status == 200
        beside_one = account().most()
        served.weights["b"].may_end.clear()
        other = served.ask("b")
        await until(lambda: account().reserved)
        assert account().most() == beside_one - weight_bytes(model_of(tokenizer))
        big = Call(served.app, COMPLETIONS, {"model": "a", **BIG})
        await until(lambda: served.models.find("a").waiting)  # behind the load, as it has no room beside it
        served.weights["b"].may_end.set()
        assert await finished(other) == await finished(big) == "length"
        assert account().reserved == {}

    with beside_both(tokenizer, 300) as served:
        run(work(served))


def test_a_model_whose_memory_a_reply_waits_for_answers_nobody_new_before_it(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        assert (await served.ask("b").end()).status == 200
        entry = served.models.find("b")
        assert entry.model is not None
        scheduler = entry.model.engine.scheduler
        grows = served.ask("a", reads=False, stream=True, max_tokens=300, ignore_eos=True)
        await until(lambda: served.models.find("a").users)
        a = served.models.find("a").model
        assert a is not None
        await until(lambda: a.engine.scheduler.running)
        first = served.ask("b", reads=False, **LONG)
        await until(lambda: entry.users)
        grows.may_read.set()
        await until(lambda: account().is_wanted(scheduler))
        later = served.ask("b", **LONG)
        await until(lambda: entry.waiting)
        assert await finished(first) == await finished(grows) == "length"
        assert await finished(later) == "length"
        assert served.weights["b"].loads == 2

    with beside_both(tokenizer, 300) as served:
        run(work(served))
    assert served.service.load.replies == 0


def test_memory_of_two_models_is_never_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "has_daemon", True)
    models = [random_model(context=1024, layers=1) for _ in range(2)]
    lengths = [(0, 200), (1, 200), (0, 700), (1, 100), (1, 300), (0, 100), (1, 600), (0, 250)]
    requests = [asked(text(length, place), 12) for place, (_, length) in enumerate(lengths)]
    expected = [alone(models[of], request) for (of, _), request in zip(lengths, requests, strict=True)]
    with machine(models[0], weight_bytes(models[1]) + 5 * row_bytes(models[0])):
        schedulers = [new_scheduler(model) for model in models]
        handles = [schedulers[of].submit(request) for (of, _), request in zip(lengths, requests, strict=True)]
        found: list[list[int]] = [[] for _ in handles]
        while not all(handle.is_over for handle in handles):
            moved = [scheduler.step() for scheduler in schedulers]
            assert any(moved)
            assert account().left() >= 0
            for tokens, handle in zip(found, handles, strict=True):
                tokens += ids(taken(handle))
    assert found == expected


def test_who_waits_for_memory_is_not_overtaken_by_a_small_prompt_of_another_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Driver, "has_daemon", True)
    models = [random_model(context=1024, layers=1) for _ in range(2)]
    with machine(models[0], weight_bytes(models[1]) + 3 * row_bytes(models[0])):
        first, second = (new_scheduler(model) for model in models)
        running = first.submit(asked(text(200), 20))
        first.step()
        large = second.submit(asked(text(700), 2))
        second.step()
        small = first.submit(asked(text(100), 2))  # which has room, but came later
        while not running.is_over:
            assert first.step()
            second.step()
            taken(running)
            assert not small.has_begun or large.has_begun
        assert not small.has_begun
        while second.step():
            taken(large)
        while first.step():
            taken(small)
        assert large.is_over
        assert small.is_over
        assert large.error is small.error is None


def row_bytes(model: Qwen3ForCausalLM) -> int:
    """Bytes of a row of up to 256 tokens."""
    return 256 * slot_bytes(model, CacheKind())


def text(length: int, start: int = 0) -> list[int]:
    return [(start + n) % VOCAB_SIZE for n in range(length)]


def test_a_prompt_of_a_library_s_other_model_is_refused_as_before(tokenizer: Tokenizer) -> None:
    """Nobody unloads a model that the caller holds."""
    model, other = model_of(tokenizer), model_of(tokenizer)
    with machine(model, weight_bytes(model) + 300 * slot_bytes(model, CacheKind())):
        scheduler, _other = new_scheduler(model), new_scheduler(other)
        with pytest.raises(InsufficientMemoryError, match="its cache of 470 tokens"):
            scheduler.submit(asked([5] * 470, 2))


class Nothing:
    """Stands for a scheduler that holds nothing."""


def test_models_that_come_and_go_while_another_thread_counts() -> None:
    counted, has_ended = MemoryAccount(current_device()), threading.Event()
    stay: list[Any] = [Nothing() for _ in range(3000)]
    for one in stay:
        counted.add(one)

    def come_and_go() -> None:
        while not has_ended.is_set():
            one: Any = Nothing()
            counted.add(one)
            counted.remove(one)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert all(len(list(counted.schedulers)) >= len(stay) for _ in range(200))
    finally:
        has_ended.set()
        thread.join()
