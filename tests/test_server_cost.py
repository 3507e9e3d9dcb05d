"""What a request and a token cost the server, in counts: checks, threads, and wake-ups of the loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.request import Request
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server import wakeups
from mlxqwen.server.service import Service
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call
from tests.serving import CHAT, Served, ask, serving

STREAMS, TOKENS = 6, 20


@pytest.fixture(scope="module")
def served(babbler: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[Served]:
    with serving(Engine(babbler, tokenizer)) as made:
        yield made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], list[object]]:
    """Counts calls: given an object and the name of a function of its own, a list that grows with each."""

    def count(owner: object, name: str) -> list[object]:
        calls: list[object] = []
        function = getattr(owner, name)

        def called(*given: Any, **named: Any) -> Any:
            calls.append(None)
            return function(*given, **named)

        monkeypatch.setattr(owner, name, called)
        return calls

    return count


def test_a_request_is_checked_once(served: Served, counted: Callable[[object, str], list[object]]) -> None:
    checks = counted(Request, "__post_init__")
    served.post(ask(max_tokens=2))
    assert len(checks) == 1
    served.post(ask(max_tokens=2, stop_token_ids=[5], seed=3))
    assert len(checks) == 1 + 3  # what it asks for itself is checked, too


def test_a_short_body_takes_one_thread(served: Served, counted: Callable[[object, str], list[object]]) -> None:
    threads = counted(Service, "in_thread")
    served.post(ask(max_tokens=1))
    assert len(threads) == 1  # that renders the prompt
    served.post(ask(max_tokens=1, user="x" * 5000))
    assert len(threads) == 1 + 2


def test_streams_share_the_wakeups_of_a_step(served: Served, counted: Callable[[object, str], list[object]]) -> None:
    delivered, polled = counted(wakeups, "_deliver"), counted(Handle, "poll")
    scheduler = served.engine.scheduler
    before = scheduler.steps

    async def work() -> list[Call]:
        body = ask(stream=True, max_tokens=TOKENS, ignore_eos=True, chat_template_kwargs={"enable_thinking": False})
        return [await call.end() for call in [Call(served.app, CHAT, body) for _ in range(STREAMS)]]

    calls = asyncio.run(work())
    assert all(call.events[-1]["choices"][0]["finish_reason"] == "length" for call in calls)
    beginnings_and_ends = 2 * STREAMS
    assert len(delivered) <= scheduler.steps - before + beginnings_and_ends < STREAMS * TOKENS
    assert len(polled) <= 2 * STREAMS * (TOKENS + 2)  # once for each token, and once to see that there is no other


def test_a_port_is_opened_and_a_model_loaded_without_the_libraries_of_http() -> None:
    """They are imported while the model loads."""
    program = "import sys, mlxqwen.server.listener, mlxqwen.server.registry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"starlette", "uvicorn", "prometheus_client"}.isdisjoint(done.stdout.split())
