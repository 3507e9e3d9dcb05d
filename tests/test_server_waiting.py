"""Streams whose model is not there yet: they begin all the same, and tell of its load, its failure and their end."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mlxqwen.engine import generation
from mlxqwen.errors import CheckpointError, HubError
from mlxqwen.server import answers, load, service, wakeups
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.serving import CHAT, ask
from tests.several_models import LONG, Several, room_for_one, several

TALK: dict[str, Any] = {**ask(), "model": "a", "stream": True}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {**TALK, "max_tokens": 2, "ignore_eos": True},
    "/v1/completions": {"model": "a", "stream": True, "prompt": "one two", "max_tokens": 2, "ignore_eos": True},
    "/v1/messages": {**TALK, "max_tokens": 2},
    "/v1/responses": {"model": "a", "stream": True, "input": "Hi", "max_output_tokens": 2},
}
SIGNS = dict.fromkeys(BODIES, b": waiting\n\n") | {
    "/v1/messages": b'event: ping\ndata: {"type":"ping"}\n\n',
    "/v1/responses": b"event: response.queued\n",
}
AT_ONCE: dict[str, Any] = {"keepalive_seconds": 0.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (answers, service, wakeups):
        monkeypatch.setattr(module, "TICK", 0.002)
    monkeypatch.setattr(generation, "MAX_UNREAD", 16)


@pytest.fixture
def served(tokenizer: Tokenizer) -> Iterator[Several]:
    """A server whose model `a` is not there before the test lets it be."""
    with several(tokenizer, **AT_ONCE) as made:
        made.weights["a"].may_end.clear()
        yield made


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def told(call: Call) -> list[Any]:
    """The events, without ids, times and usage, and without signs of waiting and their numbers."""
    unlike = ("id", "item_id", "created", "created_at", "completed_at", "sequence_number", "usage")

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(one) for name, one in value.items() if name not in unlike}
        return [kept(one) for one in value] if isinstance(value, list) else value

    signs = ("ping", "response.created", "response.queued", "response.in_progress")
    return [kept(event) for event in call.events if event.get("type") not in signs]


async def waiting(served: Several, path: str, **fields: Any) -> Call:
    """A stream that has told twice that it waits."""
    call = Call(served.app, path, {**BODIES[path], **fields})
    await until(lambda: call.body.count(SIGNS[path]) > 1)
    assert call.status == 200
    assert call.headers["content-type"].startswith("text/event-stream")
    return call


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_begins_before_its_model_is_there_and_goes_on_as_any_other(served: Several, path: str) -> None:
    seeded = {} if path == "/v1/messages" else {"seed": 3}

    async def work() -> None:
        call = await waiting(served, path, temperature=0.0, **seeded)
        served.weights["a"].may_end.set()
        await call.end()
        again = await Call(served.app, path, {**BODIES[path], "temperature": 0.0, **seeded}).end()
        assert told(call) == told(again)
        assert told(call)[-1].get("type", "chunk") in ("chunk", "message_stop", "response.incomplete")
        assert served.weights["a"].loads == 1

    run(work())
    assert served.service.load.replies == 0


def test_events_of_a_response_that_waits_have_their_order(served: Several) -> None:
    async def work() -> None:
        call = await waiting(served, "/v1/responses")
        response = call.events[0]["response"]
        assert (response["status"], response["model"], response["usage"]) == ("queued", "a", None)
        shown = await served.get(f"/v1/responses/{response['id']}")
        assert (shown.status, shown.json["status"]) == (200, "queued")
        served.weights["a"].may_end.set()
        await call.end()
        kinds = [event["type"].removeprefix("response.") for event in call.events]
        assert [event["sequence_number"] for event in call.events] == list(range(len(kinds)))
        queued = kinds.index("in_progress")
        assert kinds[:queued] == ["created", *["queued"] * (queued - 1)]
        assert not {"created", "queued"} & set(kinds[queued:])
        assert call.events[-1]["response"]["id"] == response["id"]
        kept = await served.get(f"/v1/responses/{response['id']}")
        assert kept.json["status"] == call.events[-1]["response"]["status"] == "incomplete"

    run(work())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("error", [HubError("Qwen/x: gone"), CheckpointError("/home/me/a: damaged")])
def test_a_load_that_fails_is_an_error_event(served: Several, path: str, error: Exception) -> None:
    async def work() -> None:
        fails = [await waiting(served, path) for _ in range(2)]
        served.weights["a"].fails_with = error
        served.weights["a"].may_end.set()
        for call in fails:
            await call.end()
            last = call.events[-1]
            code = "model_unavailable" if isinstance(error, HubError) else "internal_error"
            if path == "/v1/messages":
                kind = "overloaded_error" if isinstance(error, HubError) else "api_error"
                assert (last["type"], last["error"]["type"]) == ("error", kind)
            elif path == "/v1/responses":
                assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
                assert last["response"]["error"]["code"] == code
            else:
                assert last["error"]["code"] == code
            assert "cannot be loaded" in call.body.decode()
            assert "/home" not in call.body.decode()
            assert call.body.endswith(b"data: [DONE]\n\n") is (path != "/v1/messages")
        served.weights["a"].fails_with = None
        assert (await Call(served.app, path, BODIES[path]).end()).status == 200

    run(work())
    assert served.service.load.replies == 0
    assert served.service.responses.running == {}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("error", [HubError("Qwen/x: gone"), CheckpointError("/home/me/a: damaged")])
def test_a_load_that_fails_is_logged_once_for_all_who_wait(
    served: Several, stream: bool, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        served.weights["a"].fails_with = error
        calls = [served.ask("a", stream=stream) for _ in range(3)]
        await until(lambda: len(served.models.find("a").waiting) == 3)
        if stream:
            await until(lambda: all(call.status == 200 for call in calls))
        served.weights["a"].may_end.set()
        for call in calls:
            await call.end()

    run(work())
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == [f"a: cannot be loaded: {error}"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_wait_for_a_model_is_logged_at_its_beginning_and_end(
    served: Several, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mlxqwen.server")

    async def work() -> None:
        calls = [served.ask("a", stream=stream) for _ in range(3)]
        await until(lambda: len(served.models.find("a").waiting) == 3)
        calls[0].leave()
        await calls[0].end()
        served.now = 12.34
        served.weights["a"].may_end.set()
        for call in calls[1:]:
            await call.end()
        assert (await served.ask("a").end()).status == 200  # which waits for nothing
        served.weights["b"].may_end.clear()
        served.weights["b"].fails_with = HubError("Qwen/x: gone")
        for number in range(2):
            call = served.ask("b", stream=stream)
            await until(lambda: served.models.find("b").waiting)
            served.now += 1.0
            if number == 0:
                call.leave()
            else:
                served.weights["b"].may_end.set()
            await call.end()

    run(work())
    assert [one for one in caplog.messages if " wait" in one] == [
        "a request waits for a, which is not loaded",
        "3 requests waited for a for 12.3 s",
        "a request waits for b, which is not loaded",
        "1 request waited for b for 1.0 s, in vain",
        "a request waits for b, which is not loaded",
        "1 request waited for b for 1.0 s, in vain",
    ]


def test_the_first_token_is_counted_from_the_arrival_and_the_wait_told_apart(
    served: Several, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mlxqwen.server")
    came, waits = SimpleNamespace(perf_counter=lambda: time.perf_counter() - 100), iter([0.0, 50.0])
    monkeypatch.setattr("mlxqwen.server.journal.time", came)
    monkeypatch.setattr(
        answers, "time", SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: next(waits, 0.0))
    )

    async def work() -> None:
        served.weights["a"].may_end.set()
        waits_too = await served.ask("a").end()
        at_once = await served.ask("a").end()
        assert (waits_too.status, at_once.status) == (200, 200)

    run(work())
    first, second = [one for one in caplog.messages if "POST" in one]
    assert re.search(r", first after 10\d\.\d\d s \(50\.00 s of them for its model\), ", first)
    assert re.search(r", first after 10\d\.\d\d s, ", second)
    told = served.service.metrics.page().decode()
    assert "mlxqwen_first_token_seconds_count 2.0" in told
    assert 'mlxqwen_first_token_seconds_bucket{le="60.0"} 0.0' in told
    assert "mlxqwen_model_wait_seconds_sum 50.0\n" in told
    assert "mlxqwen_model_wait_seconds_count 1.0\n" in told


def test_what_is_wrong_with_a_request_is_told_behind_the_load_too(served: Several) -> None:
    async def work() -> None:
        call = await waiting(served, CHAT, top_p=7.0)
        served.weights["a"].may_end.set()
        await call.end()
        assert (call.events[-1]["error"]["type"], call.events[-1]["error"]["param"]) == (
            "invalid_request_error",
            "top_p",
        )

    run(work())
    assert served.service.load.replies == 0


@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_while_the_load_runs_has_gone(
    served: Several, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlxqwen.server")
    entry = served.models.find("a")

    async def work() -> None:
        call = await waiting(served, path)
        assert (served.service.load.replies, len(entry.waiting)) == (1, 1)
        call.leave()
        await call.end()
        assert (served.service.load.replies, len(entry.waiting)) == (0, 0)
        assert served.service.responses.running == {}
        assert b"mlxqwen_aborted_replies_total 1.0" in (await served.get("/metrics")).body
        served.weights["a"].may_end.set()
        await until(lambda: entry.state == "loaded")  # for whoever asks next

    run(work())
    assert any(f"POST '{path}' 200 (client gone)" in line for line in caplog.messages)


def test_one_of_several_that_leaves_does_not_end_the_others(served: Several) -> None:
    async def work() -> None:
        first, second = [await waiting(served, CHAT) for _ in range(2)]
        first.leave()
        await first.end()
        served.weights["a"].may_end.set()
        await second.end()
        assert second.events[-1]["choices"][0]["finish_reason"] == "length"

    run(work())


@pytest.mark.parametrize("code", ["deadline_exceeded", "server_shutdown"])
def test_a_deadline_and_the_end_are_told_to_who_waits(
    tokenizer: Tokenizer, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(served: Several) -> None:
        served.weights["a"].may_end.clear()
        call = await waiting(served, CHAT)
        if code == "server_shutdown":
            await served.service.load.drain(0.0, is_forced=asyncio.Event())
        else:
            monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: 1e12))
        await call.end()
        assert call.events[-1]["error"]["code"] == code
        assert served.service.load.replies == 0

    with several(tokenizer, timeout=1e6, **AT_ONCE) as served:
        run(work(served))


@pytest.mark.parametrize("path", BODIES)
def test_models_that_take_turns(tokenizer: Tokenizer, path: str) -> None:
    async def turn(served: Several, name: str, other: str) -> None:
        entry = served.models.find(other)
        running = served.ask(other, reads=False, **LONG)
        await until(lambda: entry.users)
        call = await waiting(served, path, model=name)
        await until(lambda: entry.is_leaving)
        running.may_read.set()
        await running.end()
        await call.end()
        assert running.events[-1]["choices"][0]["finish_reason"] == "length"
        assert served.states() == {name: "loaded", other: "unloaded"}
        assert b'"error":{' not in call.body

    async def work(served: Several) -> None:
        await turn(served, "a", "b")
        await turn(served, "b", "a")

    with room_for_one(tokenizer, **AT_ONCE) as served:
        run(work(served))
    assert served.service.load.replies == 0


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("background", [False, True])
def test_a_response_that_waits_can_be_ended(served: Several, method: str, background: bool) -> None:
    async def work() -> None:
        call = await waiting(served, "/v1/responses") if not background else None
        if call is None:
            whole = await Call(served.app, "/v1/responses", {"model": "a", "input": "Hi", "background": True}).end()
            assert (whole.status, whole.json["status"]) == (200, "queued")
            name = whole.json["id"]
        else:
            name = call.events[0]["response"]["id"]
        path = f"/v1/responses/{name}"
        ended = await Call(served.app, path if method == "DELETE" else f"{path}/cancel", method=method).end()
        assert ended.status == 200
        if call is not None:
            await call.end()
            assert call.events[-1]["type"] == "response.incomplete"
            assert call.events[-1]["response"]["status"] == "cancelled"
        await until(lambda: not served.service.responses.running)
        shown = await served.get(path)
        assert shown.status == (404 if method == "DELETE" else 200)
        assert method == "DELETE" or shown.json["status"] == "cancelled"
        assert not served.models.find("a").waiting

    run(work())
    assert served.service.load.replies == 0


@pytest.mark.parametrize("stream", [True, False])
def test_in_the_background_it_is_answered_before_the_model_is_there(served: Several, stream: bool) -> None:
    body = {"model": "a", "input": "Hi", "background": True, "stream": stream, "max_output_tokens": 2}

    async def work() -> None:
        call = Call(served.app, "/v1/responses", body)
        await until(lambda: call.sent)
        response = call.events[0]["response"] if stream else call.json
        assert response["status"] == "queued"
        if stream:
            call.leave()
        await call.end()
        served.weights["a"].may_end.set()
        await until(lambda: not served.service.responses.running)
        shown = await served.get(f"/v1/responses/{response['id']}")
        assert shown.json["status"] == "incomplete"
        assert shown.json["usage"]["output_tokens"] == 2

    run(work())
    assert served.service.load.replies == 0
