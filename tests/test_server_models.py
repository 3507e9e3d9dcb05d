"""Several models of one server: loaded once, when asked for, within memory; unloaded when idle, never while in use."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.engine import generation
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.loading import MakeRoom
from mlxqwen.engine.memory import account, slot_bytes, weight_bytes
from mlxqwen.engine.request import CacheKind
from mlxqwen.errors import CheckpointError, HubError, MlxqwenError
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.server.leases import Lease, ModelSource
from mlxqwen.server.registry import ModelRegistry
from mlxqwen.server.settings import ServerSettings
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import PATIENCE, Call, until
from tests.command_line import run as run_command
from tests.scheduling import machine
from tests.serving import ask
from tests.several_models import LONG, Several, Weights, model_of, room_for_one, several


@pytest.fixture(autouse=True)
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long reply waits for its reader: one that nobody reads is not over before a test is."""
    monkeypatch.setattr(generation, "MAX_UNREAD", 16)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_two_models_side_by_side(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        assert served.states() == {"a": "unloaded", "b": "unloaded"}
        assert (await served.get("/health")).json["models"] == {"loaded": 0, "loading": 0, "unloaded": 2}
        calls = [served.ask(name, **LONG) for name in ("a", "b")]
        await until(lambda: all(len(call.sent) > 3 for call in calls))
        listed = {one["id"]: one for one in (await served.get("/v1/models")).json["data"]}
        assert [(one["state"], one["max_model_len"]) for one in listed.values()] == [("loaded", 512)] * 2
        assert b'mlxqwen_model_loaded{model="b"} 1.0' in (await served.get("/metrics")).body
        assert (await served.get("/v1/models/b")).json == listed["b"]
        for name, call in zip("ab", calls, strict=True):
            await call.end()
            assert {one["model"] for one in call.events} == {name}
            assert call.events[-1]["choices"][0]["finish_reason"] == "length"

    with several(tokenizer) as served:
        run(work(served))


def test_first_requests_load_once_and_others_go_on(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        assert (await served.ask("a").end()).status == 200
        served.weights["b"].may_end.clear()
        calls = [served.ask("b") for _ in range(4)]
        counted = Call(served.app, "/tokenize", {"model": "b", "prompt": "two"})
        await until(lambda: served.weights["b"].loads)
        assert served.states() == {"a": "loaded", "b": "loading"}
        assert (await served.ask("a").end()).status == 200
        assert (await served.get("/health")).status == 200
        assert not any(call.task.done() for call in calls)
        served.weights["b"].may_end.set()
        assert [(await call.end()).status for call in [*calls, counted]] == [200] * 5
        assert served.weights["b"].loads == 1

    with several(tokenizer) as served:
        run(work(served))


def test_names_hub_ids_and_aliases(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        for name in ("b", "Qwen/Qwen3-4B-MLX-4bit", "qwen3:4b", "QWEN3:4b-q4_K_M"):
            assert (await served.ask(name).end()).json["model"] == "b"
        for name in ("gpt-4", "qwen3:4b-bf16", "qwen3:900b", "/home/me/a", "../a"):
            error = (await served.ask(name).end()).json["error"]
            assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")
        assert (await served.get("/v1/models/gpt-4")).status == 404
        message = {**ask(), "model": "gpt-4", "max_tokens": 1}
        refused = await Call(served.app, "/v1/messages", message).end()
        assert (refused.status, refused.json["type"]) == (404, "error")
        assert refused.json["error"]["type"] == "not_found_error"
        assert (await served.ask(None).end()).json["error"]["code"] == "missing_required_parameter"
        assert served.weights["a"].loads == 0

    with several(tokenizer) as served:
        run(work(served))


def test_with_single_any_other_name_means_the_first(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        for name in ("gpt-4", None, "b"):
            assert (await served.ask(name).end()).json["model"] == ("b" if name == "b" else "a")

    with several(tokenizer, single=True) as served:
        run(work(served))


def test_an_idle_model_makes_room_for_another(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        for name, other in ("ab", "ba", "ab"):
            assert (await served.ask(name).end()).status == 200
            assert served.states() == {name: "loaded", other: "unloaded"}
            assert served.weights[name].is_held
            assert not served.weights[other].is_held
            served.now += 1.0
        assert [weights.loads for weights in served.weights.values()] == [2, 1]
        assert b'mlxqwen_model_loaded{model="b"} 0.0' in (await served.get("/metrics")).body

    with room_for_one(tokenizer) as served:
        run(work(served))


def test_a_model_in_use_stays_until_its_replies_are_over(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        first = served.ask("a", reads=False, **LONG)
        await until(lambda: first.status == 200)
        second = served.ask("b")
        await until(lambda: served.models.find("a").is_leaving)
        third = served.ask("a")  # waits for b, as b waits for the first
        await until(lambda: served.states()["a"] == "loading")
        assert not second.task.done()
        first.may_read.set()
        await first.end()
        assert first.events[-1]["choices"][0]["finish_reason"] == "length"
        assert (await second.end()).status == (await third.end()).status == 200
        assert [weights.loads for weights in served.weights.values()] == [2, 1]

    with room_for_one(tokenizer) as served:
        run(work(served))


def test_one_that_waits_no_more_drives_nobody_out(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        first = served.ask("a", reads=False, **LONG)
        await until(lambda: first.status == 200)
        second = served.ask("b")
        await until(lambda: served.models.find("a").is_leaving)
        second.leave()
        await second.end()
        await until(lambda: not served.models.find("a").is_leaving)
        assert (await served.ask("a").end()).status == 200
        first.leave()
        await first.end()
        assert served.weights["a"].loads == 1
        assert served.states() == {"a": "loaded", "b": "unloaded"}

    with room_for_one(tokenizer) as served:
        run(work(served))


def test_a_prompt_that_needs_the_memory_of_an_idle_model_gets_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxqwen.server.registry._SPARE_SHARE", 1 << 40)
    model = model_of(tokenizer)
    beside_both = 300 * slot_bytes(model, CacheKind())  # of caches, whose buffers hold 256 tokens, then 512

    async def work(served: Several) -> None:
        for name in "ab":
            assert (await served.ask(name).end()).status == 200
        assert served.models.count()["loaded"] == 2
        prompt = {"model": "b", "prompt": [5] * 470, "max_tokens": 1}
        assert (await Call(served.app, "/v1/completions", prompt).end()).status == 200
        assert served.states() == {"a": "unloaded", "b": "loaded"}

    with machine(model, weight_bytes(model) + beside_both), several(tokenizer) as served:
        run(work(served))


def test_a_reply_that_grows_gets_the_memory_of_an_idle_model(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxqwen.server.registry._SPARE_SHARE", 1 << 40)
    model = model_of(tokenizer)

    async def work(served: Several) -> None:
        for name in "ab":
            assert (await served.ask(name).end()).status == 200
        assert served.models.count()["loaded"] == 2
        reply = await served.ask("b", max_tokens=300).end()
        assert reply.json["usage"]["completion_tokens"] == 300
        assert served.states() == {"a": "unloaded", "b": "loaded"}
        assert not served.weights["a"].is_held

    with machine(model, weight_bytes(model) + 300 * slot_bytes(model, CacheKind())), several(tokenizer) as served:
        run(work(served))


@pytest.mark.parametrize("longest_idle", ["a", "b"])
def test_the_model_that_nobody_has_used_for_longest_makes_room(
    tokenizer: Tokenizer, longest_idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxqwen.server.registry._SPARE_SHARE", 1 << 40)
    model = model_of(tokenizer)
    sources = [ModelSource(name, Weights(tokenizer)) for name in "abc"]
    with machine(model, weight_bytes(model) * 3 // 2):
        models = ModelRegistry(sources, ServerSettings(), clock=iter(range(1000)).__next__)
        try:
            for name in ("a", "b", "a") if longest_idle == "b" else ("a", "b"):
                taken(models, name).release()
            taken(models, "c")
            states = {entry.name: entry.state for entry in models.entries}
            assert states == {"a": "loaded", "b": "loaded", "c": "loaded", longest_idle: "unloaded"}
        finally:
            models.close(60.0)


def taken(models: ModelRegistry, name: str) -> Lease:
    """The use of a model, once it is there."""
    lease = models.lease(models.find(name))
    if lease.loading is not None:
        lease.loading.result(60)
    return lease


class Interposed(threading.Condition):
    """A condition that does something before it is entered, once, by whoever enters it first from then on."""

    before: Callable[[], object] | None = None

    def __enter__(self) -> bool:
        before, self.before = self.before, None
        if before is not None:
            before()
        return super().__enter__()


def test_a_model_that_is_just_loaded_is_lent_to_nobody_before_who_asked_for_it_has_it(tokenizer: Tokenizer) -> None:
    changed = Interposed(threading.RLock())
    weights = Weights(tokenizer)

    def load(make_room: MakeRoom) -> Engine:
        engine = weights(make_room)
        changed.before = lambda: account().make_room(1 << 62, engine_of_another.scheduler)
        return engine

    engine_of_another = Engine(model_of(tokenizer), tokenizer)
    models = ModelRegistry([ModelSource("a", load)], ServerSettings())
    models._changed = changed
    try:
        lease = taken(models, "a")
        assert changed.before is None
        assert lease.model is lease.entry.model
        lease.release()
        assert not lease.entry.users
        assert not account().make_room(1 << 62, engine_of_another.scheduler)
        assert lease.entry.state == "unloaded"
    finally:
        models.close(60.0)
        engine_of_another.close()


def test_idle_models_are_unloaded_and_loaded_again(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        running = served.ask("a", reads=False, **LONG)
        await until(lambda: running.status == 200)
        assert (await served.ask("b").end()).status == 200
        served.now = 299.0
        assert served.models.unload_idle() == 1.0
        assert served.models.count()["loaded"] == 2
        served.now = 300.0
        served.models.unload_idle()
        assert served.states() == {"a": "loaded", "b": "unloaded"}  # however long its reply takes
        assert not served.weights["b"].is_held
        assert (await served.get("/v1/models/b")).json["max_model_len"] == 512
        running.leave()
        await running.end()
        assert served.models.unload_idle() == 300.0
        assert (await served.ask("b").end()).status == 200
        assert served.weights["b"].loads == 2

    with several(tokenizer, keep_alive=300.0) as served:
        run(work(served))


def test_what_is_released_between_a_look_and_the_wait_is_unloaded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ModelRegistry([ModelSource("a", Weights(tokenizer))], ServerSettings(keep_alive=0.0))
    lease, look, has_waited = taken(models, "a"), models.unload_idle, threading.Event()

    def looked() -> float | None:
        due = look()
        if lease.held is not None:
            lease.release()
        elif lease.entry.model is None:
            has_waited.set()
        return due

    monkeypatch.setattr(models, "unload_idle", looked)
    try:
        with models._changed:
            models._changed.notify_all()
        assert has_waited.wait(PATIENCE)
    finally:
        models.close(60.0)


def test_at_once(tokenizer: Tokenizer) -> None:
    async def work(served: Several) -> None:
        assert (await served.ask("a").end()).status == 200
        await until(lambda: served.states()["a"] == "unloaded")

    with several(tokenizer, keep_alive=0.0) as served:
        run(work(served))


@pytest.mark.parametrize(
    ("error", "status", "code", "told"),
    [
        (HubError("Qwen/x: the hub answered 500"), 503, "model_unavailable", "Qwen/x: the hub answered 500"),
        (CheckpointError("/home/me/a: damaged"), 500, "internal_error", '"a" cannot be loaded: a: damaged'),
        (CheckpointError("/home/me/elsewhere/config.json: damaged"), 500, "internal_error", "log tells why"),
        (HubError("./a: no such folder, and no id", hint="Give it."), 503, "model_unavailable", "log tells why"),
        (CheckpointError("a/config.json: not valid JSON", hint="Download it again."), 500, "internal_error", "JSON"),
        (RuntimeError("[malloc] Unable to allocate 5 bytes"), 503, "out_of_memory", "none left"),
        (ZeroDivisionError("secret"), 500, "internal_error", "its log tells"),
    ],
)
def test_a_load_that_fails_is_those_requests_error(
    tokenizer: Tokenizer, error: MlxqwenError, status: int, code: str, told: str
) -> None:
    async def work(served: Several) -> None:
        served.weights["a"].error = error
        calls = [served.ask("a"), served.ask("a", stream=True)]
        for call in calls:
            await call.end()
            assert (call.status, call.json["error"]["code"]) == (status, code)
            assert told in call.json["error"]["message"]
            assert "Download" not in call.json["error"]["message"]
            assert not {"/home", "secret"} & set(call.json["error"]["message"].replace("/home", "/home ").split())
        assert (await served.ask("b").end()).status == 200
        served.weights["a"].error = None
        assert (await served.ask("a").end()).status == 200

    with several(tokenizer) as served:
        run(work(served))
    assert served.service.load.replies == 0


def test_a_load_that_fails_when_nobody_waits_any_more_is_logged(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("mlxqwen.server"), "propagate", True)
    caplog.set_level("INFO", logger="mlxqwen.server")

    async def work(served: Several) -> None:
        weights = served.weights["a"]
        weights.may_end.clear()
        weights.fails_with = HubError("Qwen/x: nothing came for 20 seconds")
        call = served.ask("a")
        await until(lambda: weights.loads == 1)
        call.leave()
        await call.end()
        weights.may_end.set()
        await until(lambda: served.states()["a"] == "unloaded")

    with several(tokenizer) as served:
        run(work(served))
    assert [one for one in caplog.messages if one.startswith("a: ")] == [
        "a: loading",
        "a: cannot be loaded: Qwen/x: nothing came for 20 seconds",
    ]


def test_a_deadline_and_the_end_count_while_a_model_is_loaded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxqwen.server.service.TICK", 0.005)

    async def work(served: Several) -> None:
        served.weights["a"].may_end.clear()
        call = await served.ask("a").end()
        assert (call.status, call.json["error"]["code"]) == (504, "deadline_exceeded")
        gone = served.ask("a")
        gone.leave()
        await gone.end()
        assert served.service.load.replies == 0

    with several(tokenizer, timeout=0.02) as served:
        run(work(served))

    async def end(served: Several) -> None:
        served.weights["a"].may_end.clear()
        loading, queued = served.ask("a"), served.ask("b")
        await until(lambda: served.weights["a"].loads and served.states()["b"] == "loading")
        await served.service.load.drain(0.0, is_forced=asyncio.Event())
        for call in (loading, queued):
            await call.end()
            assert (call.status, call.json["error"]["code"]) == (503, "server_shutdown")
        assert not served.models.close(0.0)  # it cannot be told to stop
        served.weights["a"].may_end.set()
        assert served.models.close(60.0)
        assert served.models.loaded == []

    with several(tokenizer) as served:
        run(end(served))
    assert not served.weights["a"].is_held


def test_replies_go_on_while_weights_are_read(tokenizer: Tokenizer) -> None:
    """Of the real loader: it gives its right to evaluate away between layers."""
    folder = Path(__file__).parent / "data" / "moe_demo"

    async def work(served: Several) -> None:
        running = served.ask("a", **LONG)
        await until(lambda: len(running.sent) > 3)
        assert (await served.ask("moe").end()).status == 200
        running.leave()
        await running.end()

    with several(tokenizer) as served:
        source = ModelSource("moe", lambda make_room: Engine.load(folder, make_room=make_room))
        moe = ModelRegistry([source], served.settings).entries[0]
        served.models._entries["moe"] = moe
        run(work(served))


def test_what_is_typed(tmp_path: Path) -> None:
    demo = str(Path(__file__).parents[1] / "mlxqwen" / "demo")

    def refused(*arguments: str) -> str:
        began = time.monotonic()
        result = run_command("serve", "--port", "0", *arguments)
        assert result.status in (1, 2), time.monotonic() - began
        return result.err

    assert "found the name 'demo' twice" in refused(demo, "--model", f"demo={demo}")
    for typed in ("a=", "=a"):
        assert f"--model: found '{typed}', expected MODEL or NAME=MODEL." in refused("--model", typed)
    assert "--draft is about one model, and 2 are to be served" in refused(demo, "-m", f"x={demo}", "--draft", demo)
    assert f"error: x: {tmp_path / 'none'}: no such folder" in refused(demo, "-m", f"x={tmp_path / 'none'}")
    assert f"error: {tmp_path / 'none'}: no such folder" in refused(demo, "-m", f"{tmp_path / 'none'}")
    assert "error: x: qwen3:5b: found no such alias" in refused(demo, "-m", "x=qwen3:5b")
    both = refused("-m", f"a={demo}", "-m", f"b={demo}", "--max-model-len", "9000")
    assert "error: a: --max-model-len: found 9,000, but the model's context is 4,096" in both
    assert "--keep-alive: found 'soon'" in refused("--keep-alive", "soon")
    assert "--max-model-len: found 9,000, but the model's context is 4,096" in refused("--max-model-len", "9000")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model.safetensors", b"cut", "model.safetensors: "),
        ("config.json", b"{", "config.json: "),
        ("tokenizer.json", b"{}", "tokenizer.json: "),
        ("model.safetensors", None, "found no weight files"),
    ],
    ids=["cut short", "config", "tokenizer", "no weights"],
)
def test_broken_files_are_told_before_the_server_listens(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    """Though the models are loaded when they are asked for."""
    broken = tmp_path / "broken"
    shutil.copytree(DEMO_FOLDER, broken)
    whole = (broken / name).read_bytes()
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(whole[:-1] if content == b"cut" else content)
    result = run_command("serve", "--port", "0", "-m", f"a={DEMO_FOLDER}", "-m", f"b={broken}")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: b: {broken}")
    assert told in result.err
