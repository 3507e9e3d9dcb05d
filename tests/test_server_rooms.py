"""What a request must not reach, and what must not reach another: addresses, files, errors with long texts, caches."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server import wakeups
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.held_model import HeldModel, held_engine
from tests.serving import CHAT, Served, ask, serving
from tests.test_server_errors import BODIES

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture
def held(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[tuple[Served, HeldModel]]:
    """A server, and the model that it waits for; prompts are read 16 tokens a step."""
    engine, model = held_engine(*demo)
    with serving(engine, prefill_chunk=16, keepalive_seconds=0.0) as made:
        try:
            yield made, model
        finally:
            model.release()


def test_no_address_in_a_request_is_asked(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        source = {"type": "url", "url": url}
        parts: list[tuple[str, dict[str, Any]]] = [
            (CHAT, {"type": "image_url", "image_url": {"url": url}}),
            (CHAT, {"type": "image_url", "image_url": url}),
            (CHAT, {"type": "video_url", "video_url": {"url": url}}),
            (CHAT, {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}),
            (CHAT, {"type": "file", "file": {"file_data": url}}),
            ("/v1/messages", {"type": "image", "source": source}),
            ("/v1/messages", {"type": "document", "source": source}),
            (
                "/v1/messages",
                {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": source}]},
            ),
            ("/v1/responses", {"type": "input_image", "image_url": url}),
            ("/v1/responses", {"type": "input_file", "file_url": url}),
        ]
        for path, part in parts:
            talk = [{"role": "user", "content": [part]}]
            body = {"model": "demo", "max_tokens": 1, "input" if path.endswith("responses") else "messages": talk}
            response = served.client.post(path, json=body)
            assert response.status_code == 400, (path, part)
            assert "text" in response.json()["error"]["message"]
        mcp = {"type": "mcp", "server_label": "a", "server_url": url}
        for path, body in (
            ("/v1/responses", {"input": "Hi", "tools": [mcp], "max_output_tokens": 1}),
            (CHAT, ask(tools=[mcp], max_tokens=1)),
        ):
            assert served.client.post(path, json={"model": "demo", **body}).status_code == 200
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("path", BODIES)
def test_errors_repeat_no_long_input_and_tell_of_no_file(served: Served, path: str) -> None:
    form, body = BODIES[path]
    secret = "s3cr3t-" * 20_000
    home = str(Path(__file__).parents[1])
    values: tuple[Any, ...] = (secret, [secret], {secret: secret}, {"type": secret}, [{"role": secret, "type": secret}])
    for name in form.model_fields:
        for value in values:
            response = served.client.post(path, json={**body, name: value})
            if response.status_code == 200:  # a field without effect, or one that takes any text
                continue
            assert response.status_code in (400, 404), (name, response.text[:300])
            message = response.json()["error"]["message"]
            assert len(response.text) < 1500, (name, len(response.text))
            assert message.count("s3cr3t-") <= 40
            assert home not in response.text


def test_what_was_read_for_one_that_left_is_whole_blocks_and_the_prompts_own(held: tuple[Served, HeldModel]) -> None:
    served, model = held
    with serving(Engine(model._inner, served.engine.tokenizer)) as fresh:
        expected = fresh.post(ask("What is 17 + 25? " * 6, **GREEDY))

    async def work() -> None:
        model.hold(after=2)
        call = Call(served.app, CHAT, ask("What is 17 + 25? " * 6, stream=True, **GREEDY))
        await until(lambda: model.is_held)
        call.leave()
        await call.end()
        model.release()
        again = await Call(served.app, CHAT, ask("What is 17 + 25? " * 6, **GREEDY)).end()
        known = again.json["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert known % 16 == 0
        assert 0 < known < again.json["usage"]["prompt_tokens"] - 16
        assert again.json["choices"][0]["message"] == expected["choices"][0]["message"]
        other = await Call(served.app, CHAT, ask("How many r's in strawberry?", **GREEDY)).end()
        assert "17" not in other.json["choices"][0]["message"]["content"]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "fields", "sign"),
    [
        (CHAT, {}, b": waiting\n\n"),
        ("/v1/messages", {"max_tokens": 2}, b"event: ping\n"),
        ("/v1/responses", {"input": "What is 17 + 25? " * 9, "max_output_tokens": 2}, b"event: response.in_progress\n"),
    ],
)
def test_while_a_prompt_is_read_each_api_gives_a_sign_that_its_clients_know(
    held: tuple[Served, HeldModel],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    fields: dict[str, Any],
    sign: bytes,
) -> None:
    served, model = held
    monkeypatch.setattr(wakeups, "TICK", 0.002)
    talk = {} if "input" in fields else {"messages": ask("What is 17 + 25? " * 9)["messages"], "max_tokens": 2}

    async def work() -> None:
        model.hold(after=2)
        call = Call(served.app, path, {"model": "demo", "stream": True, **talk, **fields})
        await until(lambda: model.is_held)
        before = call.body.count(sign)
        await until(lambda: call.body.count(sign) > before + 1)
        model.release()
        await call.end()
        assert call.status == 200

    asyncio.run(work())
