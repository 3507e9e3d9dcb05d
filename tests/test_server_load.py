"""Many clients, slow ones, and those that leave: rows are freed, queues are bounded, and the server ends in peace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from starlette.types import Message

from mlxqwen.engine import generation
from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server import endpoints, wakeups
from mlxqwen.server.event_stream import COMMENT, KeepAlive, in_time
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import PATIENCE, Call, until
from tests.held_model import HeldModel, held_engine
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.serving import CHAT, Served, ask, serving

# Without a limit, and in a window: such a reply is not over before a test is.
LONG: dict[str, Any] = {"ignore_eos": True, "chat_template_kwargs": {"enable_thinking": False}}
FEW: dict[str, Any] = {"max_running": 2, "max_queue": 1, "max_kv_size": 256, "keepalive_seconds": 0.0}


@pytest.fixture(scope="module")
def served(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[Served]:
    with serving(Engine(babbler, tokenizer), **FEW) as made:
        yield made


@pytest.fixture
def held(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[tuple[Served, HeldModel]]:
    """A server, and the model that it waits for."""
    engine, model = held_engine(babbler, tokenizer)
    with serving(engine, prefill_chunk=8, stuck_seconds=0.02, **FEW) as made:
        try:
            yield made, model
        finally:
            model.release()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def rows(served: Served) -> int:
    """Replies of which the engine still knows."""
    scheduler = served.engine.scheduler
    return len(scheduler.running) + len(scheduler.reading) + len(scheduler.waiting)


def test_a_full_queue_is_told(served: Served) -> None:
    async def work() -> None:
        bodies = [ask(stream=True, **LONG, max_tokens=most) for most in (None, None, 5)]
        calls = [Call(served.app, CHAT, body) for body in bodies]
        await until(lambda: served.service.load.replies == 3)
        refused = await Call(served.app, CHAT, ask(**LONG)).end()
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json["error"]["code"] == "queue_full"
        await until(lambda: len(served.engine.scheduler.running) == 2)
        await until(lambda: rows(served) == 3)  # the third is known to the engine once it is rendered
        assert (await Call(served.app, "/health", method="GET").end()).status == 200
        calls[0].leave()
        calls[1].leave()
        await calls[0].end()
        await calls[1].end()
        await calls[2].end()  # which had its turn
        assert calls[2].events[-1]["choices"][0]["finish_reason"] == "length"
        assert (await Call(served.app, CHAT, ask(max_tokens=1)).end()).status == 200

    run(work())
    assert served.service.load.replies == 0
    assert served.refused(ask(n=4))["param"] == "n"  # more than it ever takes


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("state", ["queued", "reading", "speaking"])
def test_a_client_that_leaves_frees_its_rows(held: tuple[Served, HeldModel], stream: bool, state: str) -> None:
    """At once, while the engine is in the midst of a step; and no further one is taken for them."""
    served, model = held
    scheduler = served.engine.scheduler
    text = "strawberry " * 40 if state == "reading" else "strawberry"  # of many chunks, or of few

    async def work() -> None:
        others = [Call(served.app, CHAT, ask(stream=True, **LONG)) for _ in range(2 if state == "queued" else 0)]
        await until(lambda: len(scheduler.running) == len(others))
        model.hold(after={"queued": 0, "reading": 2, "speaking": 10}[state])
        if state == "queued":
            await until(lambda: model.is_held)
        call = Call(served.app, CHAT, ask(text, stream=stream, **LONG))
        listed = {"queued": "waiting", "reading": "reading", "speaking": "running"}[state]
        await until(lambda: model.is_held and len(getattr(scheduler, listed)) == 1)
        assert rows(served) == served.service.load.replies == len(others) + 1
        call.leave()
        await call.end()
        assert served.service.load.replies == len(others)
        assert rows(served) == len(others)
        for other in others:
            other.leave()
            await other.end()
        passes = model.passes
        model.release()
        await until(lambda: scheduler.cache_bytes == 0)
        assert model.passes == passes

    run(work())
    assert rows(served) == 0


def test_the_server_answers_while_a_long_prompt_is_read(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        model.hold(after=2)
        call = Call(served.app, CHAT, ask("strawberry " * 40, max_tokens=1))
        await until(lambda: model.is_held)
        health = Call(served.app, "/health", method="GET")
        metrics = Call(served.app, "/metrics", method="GET")
        refused = Call(served.app, CHAT, ask(n=0))
        assert (await refused.end()).status == 400
        assert (await metrics.end()).status == 200
        assert b"mlxqwen_reading_replies 1.0" in metrics.body
        assert (await health.end()).status in (200, 503)  # which the next test tells apart
        assert model.is_held
        model.release()
        assert (await call.end()).status == 200

    run(work())


def test_an_engine_that_is_stuck_is_told_and_no_sign_of_life_is_given(
    held: tuple[Served, HeldModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "TICK", 0.002)
    served, model = held

    async def health() -> Call:
        return await Call(served.app, "/health", method="GET").end()

    async def work() -> None:
        model.hold(after=2)
        call = Call(served.app, CHAT, ask("strawberry " * 40, stream=True, max_tokens=1))
        await until(lambda: COMMENT in call.sent)
        while (told := await health()).status == 200:
            await asyncio.sleep(0.002)
        assert (told.status, told.json["error"]["code"]) == (503, "engine_stuck")
        async with asyncio.timeout(PATIENCE):
            count = -1
            while count != len(call.sent):
                count = len(call.sent)
                await asyncio.sleep(0.05)
        model.release()
        await call.end()
        assert call.events[-1]["choices"][0]["finish_reason"] == "length"
        await until(lambda: served.engine.scheduler.step_seconds == 0.0)
        assert (await health()).status == 200

    run(work())


def test_a_slow_reader_holds_up_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_UNREAD", 16)
    body = ask(stream=True, **LONG, max_tokens=60)

    async def work() -> None:
        slow = Call(served.app, CHAT, body, reads=False)
        await until(lambda: any(one.is_parked for one in served.engine.scheduler.running))
        other = await Call(served.app, CHAT, body).end()
        assert other.events[-1]["choices"][0]["finish_reason"] == "length"
        (row,) = served.engine.scheduler.running
        assert row.is_parked
        assert len(row.records) <= 17  # and no more is held
        slow.may_read.set()
        await slow.end()
        assert slow.events[-1]["choices"][0]["finish_reason"] == "length"

    run(work())


def test_a_reader_that_stalls_is_hung_up_on(served: Served) -> None:
    async def work() -> None:
        with serving(served.engine, **FEW, stall_seconds=0.05) as strict:
            call = Call(strict.app, CHAT, ask(stream=True, **LONG), reads=False)
            with pytest.raises(TimeoutError):
                await call.end()
            assert strict.service.load.replies == 0
        await until(lambda: rows(served) == 0)

    run(work())


def test_each_call_has_the_time_that_a_client_has_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        loop, now, read = asyncio.get_running_loop(), [0.0], asyncio.Semaphore(0)
        monkeypatch.setattr(loop, "time", lambda: now[0])

        async def send(message: Message) -> None:
            await read.acquire()

        async def sends() -> None:
            async with in_time(send, 1.0) as send_in_time:
                for _ in range(3):
                    await send_in_time({})

        async def at(seconds: float, *, reads: bool = False) -> None:
            now[0] = seconds
            if reads:
                read.release()
            for _ in range(9):
                await asyncio.sleep(0)

        sending = asyncio.ensure_future(sends())
        for seconds, reads in ((0.6, True), (0.9, True), (1.1, False), (1.8, False)):
            await at(seconds, reads=reads)
            assert not sending.done()  # the third call began at 0.9, and has until 1.9
        await at(2.0)
        with pytest.raises(TimeoutError):
            sending.result()

    run(work())


def test_a_client_that_leaves_as_the_last_call_ends_changes_nothing() -> None:
    async def work() -> None:
        errors: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        gone: asyncio.Future[None] = loop.create_future()

        async def send(message: Message) -> None:
            gone.set_result(None)

        async with in_time(send, 1.0, until=gone) as send_in_time:
            await send_in_time({})
        await asyncio.sleep(0)
        assert not errors

    run(work())


def test_a_body_that_does_not_come(served: Served) -> None:
    async def work() -> None:
        with serving(served.engine, body_seconds=0.05) as strict:
            call = await Call(strict.app, CHAT, None).end()
            assert (call.status, call.json["error"]["code"]) == (408, "body_timeout")
            gone = Call(strict.app, CHAT, None)
            gone.leave()
            await gone.end()
            assert strict.service.load.replies == 0

    run(work())


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_ends_a_reply(served: Served, stream: bool) -> None:
    async def work() -> None:
        with serving(served.engine, **FEW, timeout=0.01) as hasty:
            call = await Call(hasty.app, CHAT, ask(stream=stream, **LONG)).end()
            error = call.events[-1]["error"] if stream else call.json["error"]
            assert error["code"] == "deadline_exceeded"
            assert call.status == (200 if stream else 504)
            assert hasty.service.load.replies == 0
        await until(lambda: rows(served) == 0)

    run(work())


def test_the_end_waits_for_replies(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        load = served.service.load
        model.hold()
        call = Call(served.app, CHAT, ask(stream=True, max_tokens=20, ignore_eos=True))
        await until(lambda: model.is_held)
        drain = asyncio.create_task(load.drain(60.0, is_forced=asyncio.Event()))
        await until(lambda: load.is_draining)
        refused = await Call(served.app, CHAT, ask()).end()
        assert (refused.status, refused.json["error"]["code"]) == (503, "server_shutdown")
        assert (await Call(served.app, "/health", method="GET").end()).status == 503
        model.release()
        await asyncio.wait_for(drain, 60)
        assert call.events[-1]["choices"][0]["finish_reason"] == "length"

    run(work())


ENDS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    CHAT: (ask(**LONG), lambda event: event["error"]["code"]),
    "/v1/completions": ({"model": "demo", "prompt": "a", "max_tokens": 10**6}, lambda event: event["error"]["code"]),
    "/v1/responses": ({"model": "demo", "input": "a"}, lambda event: event["response"]["error"]["code"]),
    "/v1/messages": (ask(max_tokens=10**6), lambda event: (event["type"], event["error"]["type"])),
}


@pytest.mark.parametrize("path", ENDS)
def test_the_end_is_told_by_a_proper_event(held: tuple[Served, HeldModel], path: str) -> None:
    served, model = held
    body, told = ENDS[path]

    async def work() -> None:
        model.hold(after=10)
        call = Call(served.app, path, {**body, "stream": True})
        whole = Call(served.app, path, body)
        await until(lambda: model.is_held and served.service.load.replies == 2)
        await served.service.load.drain(0.0, is_forced=asyncio.Event())
        model.release()
        await call.end()
        await whole.end()
        expected = ("error", "overloaded_error") if path == "/v1/messages" else "server_shutdown"
        assert told(call.events[-1]) == expected
        assert whole.status == 503
        assert served.service.load.replies == 0

    run(work())


def test_comments_come_while_nothing_else_does_and_the_engine_works() -> None:
    steps = [0]
    alive = KeepAlive(0.0, 60.0, lambda: steps[0])
    assert alive.is_due()
    patient = KeepAlive(1e6, 60.0, lambda: steps[0])
    assert not patient.is_due()
    alive._moved = time.monotonic() - 1e4  # nothing has moved for long
    assert not alive.is_due()
    steps[0] += 1
    assert alive.is_due()


def test_a_stream_that_waits_gets_comments(
    babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the engine takes: it is held in the midst of a step until the comment has come."""
    monkeypatch.setattr(wakeups, "TICK", 0.002)
    engine, model = held_engine(babbler, tokenizer)

    async def work(served: Served) -> None:
        others = [Call(served.app, CHAT, ask(stream=True, **LONG)) for _ in range(2)]
        await until(lambda: len(engine.scheduler.running) == 2)
        model.hold()
        waiting = Call(served.app, CHAT, ask(stream=True, max_tokens=1))
        await until(lambda: COMMENT in waiting.sent)
        assert len(engine.scheduler.waiting) == 1
        for call in others:
            call.leave()
            await call.end()
        model.release()
        await waiting.end()
        assert waiting.events[-1]["choices"][0]["finish_reason"] == "length"

    with serving(engine, stuck_seconds=1e6, **FEW) as served:
        try:
            run(work(served))
        finally:
            model.release()


def test_a_failure_is_that_requests_alone(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    engine, model = scripted_engine(*demo)

    async def work() -> None:
        with serving(engine) as broken:
            model.fail_after = 3
            for stream in (True, False):
                model.fail_after = 3
                call = await Call(broken.app, CHAT, ask(stream=stream)).end()
                error = call.events[-1]["error"] if stream else call.json["error"]
                assert (error["type"], call.status) == ("server_error", 200 if stream else 500)
            model.fail_after = None
            answered = await Call(broken.app, CHAT, ask(max_tokens=2)).end()
            assert answered.status == 200
            assert broken.service.load.replies == 0

    assert isinstance(model, ScriptedModel)
    run(work())


def test_memory_that_ends_is_told_and_survived(
    demo: tuple[Qwen3ForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = scripted_engine(*demo)

    def no_memory(hidden: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

    async def work() -> None:
        with serving(engine) as broken:
            monkeypatch.setattr(model, "logits", no_memory)
            call = await Call(broken.app, CHAT, ask()).end()
            assert (call.status, call.json["error"]["code"]) == (503, "out_of_memory")
            monkeypatch.undo()
            assert (await Call(broken.app, CHAT, ask(max_tokens=2)).end()).status == 200

    run(work())


def test_bodies_are_bounded_all_together(served: Served) -> None:
    async def work() -> None:
        with serving(served.engine, max_body=1000) as small:
            small.service.load.body_bytes = 8 * 1000 - 10
            refused = await Call(small.app, CHAT, ask(max_tokens=1)).end()
            assert (refused.status, refused.json["error"]["code"]) == (429, "bodies_full")
            small.service.load.body_bytes = 0
            assert (await Call(small.app, CHAT, ask(max_tokens=1)).end()).status == 200
            assert small.service.load.body_bytes == 0

    run(work())


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_reply_gives_its_room_back(
    served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of the server's own")

    monkeypatch.setattr(endpoints, "ChatReply", fail)
    assert served.client.post(CHAT, json=ask(stream=stream, **LONG)).status_code == 500
    assert served.service.load.replies == 0
    assert rows(served) == 0


def test_many_streams_at_once_get_what_each_would_alone(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    async def work() -> None:
        with serving(Engine(babbler, tokenizer), max_running=128) as many:
            bodies = [ask(seed=seed, max_tokens=4, stream=True, ignore_eos=True) for seed in range(128)]
            calls = [Call(many.app, CHAT, body) for body in bodies]
            for call in calls:
                await call.end()
            alone = await Call(many.app, CHAT, bodies[77]).end()

            def pieces(call: Call) -> list[Any]:
                return [event["choices"][0]["delta"] for event in call.events]

            assert all(call.status == 200 for call in calls)
            assert all(call.events[-1]["choices"][0]["finish_reason"] == "length" for call in calls)
            assert pieces(calls[77]) == pieces(alone)

    run(work())
