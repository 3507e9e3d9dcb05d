"""Many clients, slow ones, and those that leave: rows are freed, queues are bounded, and the server ends in peace."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from mlxqwen.engine import generation
from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server import endpoints, wakeups
from mlxqwen.server.event_stream import COMMENT, KeepAlive
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.serving import CHAT, Served, ask, serving

LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 480, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def served(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[Served]:
    with serving(Engine(babbler, tokenizer), max_running=2, max_queue=1, keepalive_seconds=0.0) as made:
        yield made


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def rows(served: Served) -> int:
    """Replies of which the engine still knows."""
    scheduler = served.engine.scheduler
    return len(scheduler.running) + len(scheduler.reading) + len(scheduler.waiting)


def test_a_full_queue_is_told(served: Served) -> None:
    async def work() -> None:
        bodies = [ask(stream=True, **{**LONG, "max_tokens": most}) for most in (480, 480, 5)]
        calls = [Call(served.app, CHAT, body) for body in bodies]
        await until(lambda: served.service.load.replies == 3)
        refused = await Call(served.app, CHAT, ask(**LONG)).end()
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json["error"]["code"] == "queue_full"
        await until(lambda: len(served.engine.scheduler.running) == 2)
        assert rows(served) == 3
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
@pytest.mark.parametrize("state", ["queued", "speaking"])
def test_a_client_that_leaves_frees_its_rows(served: Served, stream: bool, state: str) -> None:
    async def work() -> None:
        others = [Call(served.app, CHAT, ask(stream=True, **LONG)) for _ in range(2 if state == "queued" else 0)]
        await until(lambda: len(served.engine.scheduler.running) == len(others))
        call = Call(served.app, CHAT, ask(stream=stream, **LONG))
        await until(lambda: served.service.load.replies == len(others) + 1)
        if state == "speaking":
            await until(lambda: any(one.count > 3 for one in served.engine.scheduler.running))
        call.leave()
        await call.end()
        assert served.service.load.replies <= len(others)
        assert rows(served) <= len(others)  # at once: no step computes it any more
        for other in others:
            other.leave()
            await other.end()

        gc.collect()
        await until(lambda: served.engine.scheduler.cache_bytes == 0)  # rows among others leave in the next step

    run(work())
    assert rows(served) == 0


def test_a_client_that_leaves_while_its_prompt_is_read(served: Served) -> None:
    async def work() -> None:
        with serving(served.engine, prefill_chunk=8) as slow:
            call = Call(slow.app, CHAT, ask("strawberry " * 40, stream=True, max_tokens=5))
            await until(lambda: slow.engine.scheduler.reading)
            call.leave()
            await call.end()
            await until(lambda: rows(slow) == 0)
            assert not call.events[1:]

    run(work())


def test_the_server_answers_while_a_long_prompt_is_read(served: Served) -> None:
    async def work() -> None:
        with serving(served.engine, prefill_chunk=1) as slow:
            call = Call(slow.app, CHAT, ask("strawberry " * 60, max_tokens=1, cache_salt="of its own"))
            await until(lambda: slow.engine.scheduler.reading)
            before = slow.engine.scheduler.steps
            health = await Call(slow.app, "/health", method="GET").end()
            metrics = await Call(slow.app, "/metrics", method="GET").end()
            assert (health.status, metrics.status) == (200, 200)
            assert b"mlxqwen_reading_replies 1.0" in metrics.body
            assert slow.engine.scheduler.steps - before < 60  # it was not waited for
            assert (await call.end()).status == 200

    run(work())


def test_a_slow_reader_holds_up_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_UNREAD", 16)
    body = ask(stream=True, **{**LONG, "max_tokens": 60})

    async def work() -> None:
        slow = Call(served.app, CHAT, body, reads=False)
        other = await Call(served.app, CHAT, body).end()
        assert other.events[-1]["choices"][0]["finish_reason"] == "length"
        (row,) = served.engine.scheduler.running
        await until(lambda: row.is_parked)
        assert len(row.records) <= 17  # and no more is held
        slow.may_read.set()
        await slow.end()
        assert slow.events[-1]["choices"][0]["finish_reason"] == "length"

    run(work())


def test_a_reader_that_stalls_is_hung_up_on(served: Served) -> None:
    async def work() -> None:
        with serving(served.engine, stall_seconds=0.05) as strict:
            call = Call(strict.app, CHAT, ask(stream=True, **LONG), reads=False)
            with pytest.raises(TimeoutError):
                await call.end()
            assert strict.service.load.replies == 0
        await until(lambda: rows(served) == 0)

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
        with serving(served.engine, timeout=0.01) as hasty:
            call = await Call(hasty.app, CHAT, ask(stream=stream, **LONG)).end()
            error = call.events[-1]["error"] if stream else call.json["error"]
            assert error["code"] == "deadline_exceeded"
            assert call.status == (200 if stream else 504)
            assert hasty.service.load.replies == 0
        await until(lambda: rows(served) == 0)

    run(work())


def test_the_end_waits_for_replies_and_then_tells_them(served: Served) -> None:
    async def work() -> None:
        with serving(served.engine) as ending:
            load, forced = ending.service.load, asyncio.Event()
            call = Call(ending.app, CHAT, ask(stream=True, max_tokens=20, ignore_eos=True))
            await until(lambda: load.replies == 1)
            drain = asyncio.create_task(load.drain(60.0, is_forced=forced))
            await until(lambda: load.is_draining)
            refused = await Call(ending.app, CHAT, ask()).end()
            assert (refused.status, refused.json["error"]["code"]) == (503, "server_shutdown")
            assert (await Call(ending.app, "/health", method="GET").end()).status == 503
            await asyncio.wait_for(drain, 60)
            assert call.events[-1]["choices"][0]["finish_reason"] == "length"
        with serving(served.engine) as ending:
            call = Call(ending.app, CHAT, ask(stream=True, **LONG))
            await until(lambda: len(call.sent) > 2)
            await ending.service.load.drain(0.0, is_forced=asyncio.Event())
            await call.end()
            assert call.events[-1]["error"]["code"] == "server_shutdown"
            assert call.body.endswith(b"data: [DONE]\n\n")

    run(work())


def test_comments_come_while_nothing_else_does_and_the_engine_works() -> None:
    steps = [0]
    alive = KeepAlive(0.0, lambda: steps[0])
    assert alive.is_due()
    patient = KeepAlive(1e6, lambda: steps[0])
    assert not patient.is_due()
    alive._moved = time.monotonic() - 1e4  # nothing has moved for long
    assert not alive.is_due()
    steps[0] += 1
    assert alive.is_due()


def test_a_stream_that_waits_gets_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "TICK", 0.002)

    async def work() -> None:
        others = [Call(served.app, CHAT, ask(stream=True, **LONG)) for _ in range(2)]
        await until(lambda: len(served.engine.scheduler.running) == 2)
        waiting = Call(served.app, CHAT, ask(stream=True, max_tokens=1))
        await until(lambda: COMMENT in waiting.sent)
        for call in others:
            call.leave()
            await call.end()
        await waiting.end()
        assert waiting.events[-1]["choices"][0]["finish_reason"] == "length"

    run(work())


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
