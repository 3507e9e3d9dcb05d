"""The server's log: a line a request, with the reason of what was refused, and nothing of what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.held_model import held_engine
from tests.serving import CHAT, Served, ask, serving


@pytest.fixture(scope="module")
def served(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[Served]:
    with serving(Engine(*small), api_keys=("sesame",), max_queue=0, max_running=4) as made:
        yield made


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="mlxqwen.server")
    return caplog


KEY = {"authorization": "Bearer sesame"}
SECRET = "the secret of the user"


@pytest.mark.parametrize(
    ("path", "body", "headers", "line"),
    [
        (CHAT, ask(SECRET, n=0), KEY, "POST '/v1/chat/completions' 400 (invalid_value: n)"),
        (CHAT, ask(SECRET, temperature=SECRET), KEY, "400 (invalid_type: temperature)"),
        (CHAT, ask(SECRET, n=5), KEY, "400 (invalid_value: n)"),
        (CHAT, ask("word " * 3000), KEY, "400 (context_length_exceeded: messages)"),
        (CHAT, ask(SECRET, functions=[{}]), KEY, "400 (unsupported_parameter: functions)"),
        (CHAT, ask(SECRET) | {"messages": [{"role": SECRET}]}, KEY, "400 (invalid_value: messages[0])"),
        (CHAT, ask(SECRET, model="gpt-4"), KEY, "404 (model_not_found: model)"),
        ("/v1/messages", ask(SECRET), KEY, "400 (missing_required_parameter: max_tokens)"),
        ("/v1/nothing", {}, KEY, "404 (path_not_found)"),
        ("/v1/models", {}, KEY, "405 (method_not_allowed)"),
        (CHAT, ask(SECRET), {}, "401 (invalid_api_key)"),
        (CHAT, ask(SECRET), {**KEY, "host": "evil.example"}, "403 (host_not_allowed)"),
        (CHAT, ask(SECRET), {**KEY, "origin": "https://evil.example"}, "403 (origin_not_allowed)"),
    ],
)  # fmt: skip
def test_a_refusal_is_logged_with_its_reason(
    served: Served,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str],
    line: str,
    log: pytest.LogCaptureFixture,
) -> None:
    response = served.client.post(path, json=body, headers=headers)
    assert 400 <= response.status_code < 500
    (told,) = log.messages
    assert line in told
    assert response.headers["x-request-id"] in told
    assert SECRET not in told


def test_content_is_logged_where_that_is_asked_for(
    small: tuple[Qwen3ForCausalLM, Tokenizer], log: pytest.LogCaptureFixture
) -> None:
    with serving(Engine(*small), log_content=True) as served:
        served.refused(ask(temperature=SECRET))
    assert f'refused: temperature: found "{SECRET}", expected a valid number' in log.messages


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_gone_and_an_end_are_told_apart(
    babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, stream: bool, log: pytest.LogCaptureFixture
) -> None:
    engine, model = held_engine(babbler, tokenizer)

    async def work() -> None:
        with serving(engine) as served:
            model.hold(after=5)
            calls = [Call(served.app, CHAT, ask(stream=stream)) for _ in range(2)]
            await until(lambda: model.is_held and served.service.load.replies == 2)
            calls[0].leave()
            await calls[0].end()
            await served.service.load.drain(0.0, is_forced=asyncio.Event())
            await calls[1].end()
            model.release()

    try:
        asyncio.run(work())
    finally:
        model.release()
    gone, ended = log.messages
    assert f"{200 if stream else 499} (client gone)" in gone
    assert f"{200 if stream else 503} (server_shutdown)" in ended
