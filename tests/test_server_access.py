"""Who may call: hosts, origins and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.settings import ServerSettings
from mlxqwen.text.tokenizer import Tokenizer
from tests.serving import CHAT, Served, ask, serving

KEY = "sesame-1"


@pytest.fixture(scope="module")
def engine(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Engine:
    return Engine(*demo)


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine) as made:
        yield made


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:80", "[::1]:8000", "LOCALHOST", "localhost."]
)
def test_own_names_are_answered(served: Served, host: str) -> None:
    assert served.client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.7", "", "a b"])
def test_other_names_are_not(served: Served, host: str) -> None:
    for path in ("/v1/models", "/health", "/"):
        assert served.client.get(path, headers={"host": host}).status_code == 403


def test_names_may_be_added(engine: Engine) -> None:
    with serving(engine, allowed_hosts=("mac.example",)) as served:
        assert served.client.get("/v1/models", headers={"host": "mac.example:8000"}).status_code == 200
        assert served.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9", "http://localhost:8000"])
def test_other_sites_pages_are_refused(served: Served, origin: str) -> None:
    response = served.client.post(CHAT, json=ask(max_tokens=1), headers={"origin": origin})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    assert served.client.options(CHAT, headers=preflight).status_code in (403, 405)


def test_its_own_page_may_call(served: Served) -> None:
    headers = {"origin": "http://127.0.0.1:8000"}
    assert served.client.post(CHAT, json=ask(max_tokens=1), headers=headers).status_code == 200


def test_origins_may_be_added(engine: Engine) -> None:
    with serving(engine, cors_origins=("https://a.example",), api_keys=(KEY,)) as served:
        headers = {"origin": "https://a.example"}
        preflight = {
            **headers,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        told = served.client.options(CHAT, headers=preflight)
        assert told.status_code == 200
        assert told.headers["access-control-allow-origin"] == "https://a.example"
        asked = {**headers, "authorization": f"Bearer {KEY}"}
        answered = served.client.post(CHAT, json=ask(max_tokens=1), headers=asked)
        assert answered.status_code == 200
        assert answered.headers["access-control-allow-origin"] == "https://a.example"
        assert served.client.get("/v1/models", headers={"origin": "https://b.example"}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer \u00e9".encode()}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": "bearer other"}, 200),
        ({"x-api-key": KEY}, 200),
    ],
)
def test_keys(engine: Engine, headers: dict[str, Any], status: int, caplog: pytest.LogCaptureFixture) -> None:
    with serving(engine, api_keys=(KEY, "other"), host="0.0.0.0") as served:
        response = served.client.post(CHAT, json=ask(max_tokens=1), headers=headers)
        assert response.status_code == status
        if status == 401:
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert served.client.get("/health").status_code == 200
        assert served.client.get("/metrics").status_code == 401
    assert KEY not in caplog.text + response.text


def test_an_open_server_needs_a_key_or_a_word(engine: Engine) -> None:
    with pytest.raises(OptionError, match=r"host: found 0\.0\.0\.0 without a key"):
        ServerSettings(host="0.0.0.0")
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"):
        ServerSettings(host=host)
    with pytest.raises(OptionError, match="api_key"):
        ServerSettings(api_keys=("a b\n",))
    with pytest.raises(OptionError, match="api_key: found an empty one"):
        ServerSettings(api_keys=("",))
    with serving(engine, host="0.0.0.0", allow_open=True) as served:
        assert served.client.get("/health", headers={"host": "192.168.1.4:8000"}).status_code == 200
        assert served.client.get("/health", headers={"host": "evil.example"}).status_code == 403
