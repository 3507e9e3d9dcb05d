"""Responses in the background: they go on when nobody listens, and are asked for, followed, ended and forgotten."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server import background, wakeups
from mlxqwen.server.event_stream import COMMENT
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.held_model import HeldModel, held_engine
from tests.serving import Served, serving

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "demo", "input": "a", "background": True, "seed": 1, "max_output_tokens": 20}


@pytest.fixture
def held(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[tuple[Served, HeldModel]]:
    engine, model = held_engine(babbler, tokenizer)
    with serving(engine, max_running=1, keepalive_seconds=1e6) as made:
        try:
            yield made, model
        finally:
            model.release()


async def get(served: Served, path: str, method: str = "GET", query: str = "") -> Call:
    return await Call(served.app, path, method=method, query=query).end()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def over(served: Served, name: str) -> Any:
    """The response once it is over."""
    await until(lambda: name not in served.service.responses.running)
    return (await get(served, f"{PATH}/{name}")).json


def test_it_waits_goes_on_and_is_kept(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        plain = (await Call(served.app, PATH, {**BODY, "background": False}).end()).json
        model.hold(after=5)
        first, second = [(await Call(served.app, PATH, BODY).end()).json for _ in range(2)]
        assert first["background"] is True
        assert first["status"] in ("queued", "in_progress")
        await until(lambda: model.is_held)
        shown = (await get(served, f"{PATH}/{first['id']}")).json
        assert (shown["status"], shown["id"], shown["usage"]) == ("in_progress", first["id"], None)
        assert (await get(served, f"{PATH}/{second['id']}")).json["status"] == "queued"
        items = (await get(served, f"{PATH}/{first['id']}/input_items")).json["data"]
        assert items[0]["content"][0]["text"] == "a"
        early = await Call(served.app, PATH, {**BODY, "previous_response_id": first["id"]}).end()
        assert (early.status, "on its way" in early.json["error"]["message"]) == (400, True)
        model.release()
        for response in (first, second):
            done = await over(served, response["id"])
            assert (done["status"], done["usage"]["output_tokens"]) == (plain["status"], 20)
            assert texts(done) == texts(plain)
        assert served.service.load.replies == 0
        follows = {**BODY, "background": False, "previous_response_id": first["id"]}
        assert (await Call(served.app, PATH, follows).end()).status == 200
        await get(served, f"{PATH}/{first['id']}", "DELETE")
        assert (await get(served, f"{PATH}/{first['id']}")).status == 404

    run(work())


def texts(response: Any) -> list[Any]:
    return [(item["type"], [part["text"] for part in item["content"]]) for item in response["output"]]


def test_whoever_leaves_does_not_end_it_and_may_follow_it_again(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        model.hold(after=8)
        call = Call(served.app, PATH, {**BODY, "stream": True})
        await until(lambda: model.is_held and len(call.events) > 4)
        name = call.events[0]["response"]["id"]
        call.leave()
        await call.end()
        assert name in served.service.responses.running
        seen = call.events
        follower = Call(served.app, f"{PATH}/{name}", method="GET", query=f"stream=true&starting_after={len(seen) - 1}")
        twin = Call(served.app, f"{PATH}/{name}", method="GET", query="stream=true")
        await until(lambda: len(twin.events) >= len(seen))
        model.release()
        await follower.end()
        await twin.end()
        assert [*seen, *follower.events] == twin.events
        assert [event["sequence_number"] for event in twin.events] == list(range(len(twin.events)))
        assert twin.events[-1]["type"] == "response.incomplete"
        assert twin.body.endswith(b"data: [DONE]\n\n")
        later = await get(served, f"{PATH}/{name}", query="stream=true")
        assert later.events == twin.events
        assert (await over(served, name))["status"] == "incomplete"
        assert (await get(served, f"{PATH}/{name}", query="stream=true&starting_after=x")).status == 400

    run(work())


def test_who_waits_is_told_that_it_goes_on_and_nothing_of_that_is_kept(
    babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "TICK", 0.001)
    monkeypatch.setattr(wakeups, "TICK", 0.001)
    engine, model = held_engine(babbler, tokenizer)

    async def work(served: Served) -> None:
        model.hold(after=4)
        call = Call(served.app, PATH, {**BODY, "stream": True})
        await until(lambda: call.sent.count(COMMENT) > 9)
        model.release()
        await call.end()
        assert [event["sequence_number"] for event in call.events] == list(range(len(call.events)))
        later = await get(served, f"{PATH}/{call.events[0]['response']['id']}", query="stream=true")
        assert later.events == call.events
        assert [event["type"] for event in later.events].count("response.in_progress") == 1

    with serving(engine, keepalive_seconds=0.0) as served:
        try:
            run(work(served))
        finally:
            model.release()


def test_it_is_ended_and_forgotten(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        model.hold(after=3)
        names = [(await Call(served.app, PATH, BODY).end()).json["id"] for _ in range(3)]
        await until(lambda: model.is_held)
        cancelled = (await Call(served.app, f"{PATH}/{names[0]}/cancel").end()).json
        assert cancelled["status"] == "cancelled"
        assert (await get(served, f"{PATH}/{names[1]}", "DELETE")).json["deleted"] is True
        model.release()
        assert (await over(served, names[0]))["status"] == "cancelled"
        assert (await Call(served.app, f"{PATH}/{names[0]}/cancel").end()).json["status"] == "cancelled"
        await until(lambda: served.service.load.replies == 0)
        assert (await get(served, f"{PATH}/{names[1]}")).status == 404
        assert (await over(served, names[2]))["status"] == "incomplete"
        assert (await Call(served.app, f"{PATH}/{names[2]}/cancel").end()).status == 400

    run(work())


def test_a_failure_is_kept(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        model.error = RuntimeError("broken on purpose")
        name = (await Call(served.app, PATH, BODY).end()).json["id"]
        failed = await over(served, name)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")
        assert served.service.load.replies == 0

    run(work())


def test_the_end_waits_for_it(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        model.hold()
        name = (await Call(served.app, PATH, BODY).end()).json["id"]
        await until(lambda: model.is_held)
        drain = asyncio.create_task(served.service.load.drain(60.0, is_forced=asyncio.Event()))
        await until(lambda: served.service.load.is_draining)
        assert not drain.done()
        model.release()
        await asyncio.wait_for(drain, 60)
        stored = served.service.responses.find(name)
        assert stored is not None
        assert stored.response["status"] == "incomplete"

    run(work())


def test_what_cannot_be(held: tuple[Served, HeldModel], monkeypatch: pytest.MonkeyPatch) -> None:
    served, _ = held
    monkeypatch.setattr(background, "_MOST_LOGGED", 0)

    async def work() -> None:
        unkept = await Call(served.app, PATH, {**BODY, "store": False}).end()
        assert (unkept.status, unkept.json["error"]["param"]) == (400, "store")
        full = await Call(served.app, PATH, {**BODY, "stream": True}).end()
        assert (full.status, full.json["error"]["code"]) == (429, "queue_full")
        plain = (await Call(served.app, PATH, {**BODY, "background": False}).end()).json
        silent = await get(served, f"{PATH}/{plain['id']}", query="stream=true")
        assert (silent.status, silent.json["error"]["param"]) == (400, "stream")
        assert served.service.load.replies == 0

    run(work())


def test_what_runs_holds_a_bounded_size(held: tuple[Served, HeldModel], monkeypatch: pytest.MonkeyPatch) -> None:
    served, model = held
    monkeypatch.setattr(background, "_MOST_BYTES", 5_000)
    monkeypatch.setattr(background, "_MOST_BYTES_OF_ALL", 6_000)

    async def refused(status: int, **fields: Any) -> str:
        call = await Call(served.app, PATH, {**BODY, **fields}).end()
        assert (call.status, call.json["error"]["param"]) == (status, "background")
        message: str = call.json["error"]["message"]
        return message

    async def work() -> None:
        message = await refused(400, metadata={"a": "x" * 6_000})
        assert re.match(r"background: found a request of 6,\d{3} bytes, expected at most 5,000: leave out", message)
        model.hold()
        first = (await Call(served.app, PATH, {**BODY, "metadata": {"a": "x" * 4_000}}).end()).json
        assert first["status"] in ("queued", "in_progress")
        message = await refused(429, metadata={"a": "x" * 2_000})
        pattern = r"background: responses that run hold 4,\d{3} bytes, expected room for 2,\d{3} more of 6,000: wait"
        assert re.match(pattern, message)
        small = (await Call(served.app, PATH, BODY).end()).json
        model.release()
        for one in (first, small):
            await over(served, one["id"])
        assert (await Call(served.app, PATH, {**BODY, "metadata": {"a": "x" * 2_000}}).end()).status == 200

    run(work())


def test_kept_events_count_as_held(held: tuple[Served, HeldModel]) -> None:
    served, model = held

    async def work() -> None:
        model.hold()
        call = Call(served.app, PATH, {**BODY, "stream": True})
        await until(lambda: model.is_held and call.sent)
        (task,) = served.service.background._tasks.values()
        before, events = task.nbytes, len(task.events)
        model.release()
        await call.end()
        assert len(task.events) > events
        assert task.nbytes - before == sum(map(len, task.events[events:]))

    run(work())
