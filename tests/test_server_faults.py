"""What goes wrong beneath the server: memory that ends, code that fails, files that are replaced. It serves on."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.errors import CacheError, InsufficientMemoryError, MlxqwenError
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import Call, until
from tests.held_model import held_engine
from tests.serving import CHAT, ask, serving

ENDLESS: dict[str, Any] = {"ignore_eos": True, "stream": True, "seed": 1}

FAULTS = {
    "memory that MLX does not get": (RuntimeError("[malloc] Unable to allocate 99 bytes."), 503, "out_of_memory"),
    "memory on a GPU": (RuntimeError("[METAL] Command buffer execution failed: OutOfMemory"), 503, "out_of_memory"),
    "memory that Python does not get": (MemoryError(), 503, "out_of_memory"),
    "memory that is kept free": (InsufficientMemoryError("memory: 1 GB, expected 2"), 503, "out_of_memory"),
    "an error of ours": (ZeroDivisionError("/secret/path"), 500, "internal_error"),
    "an error that names a folder": (CacheError("/secret/cache: the disk is full"), 500, "internal_error"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_in_mid_flight_fails_alone(
    babbler: Qwen3ForCausalLM, tokenizer: Tokenizer, fault: str, stream: bool
) -> None:
    engine, model = held_engine(babbler, tokenizer)
    error, status, code = FAULTS[fault]

    async def work() -> None:
        with serving(engine, max_kv_size=256) as served:
            other = Call(served.app, CHAT, ask(**ENDLESS, max_tokens=40))
            await until(lambda: engine.scheduler.running)
            model.hold()
            await until(lambda: model.is_held)
            failing = Call(served.app, CHAT, ask("Hi", stream=stream))
            await until(lambda: engine.scheduler.waiting)
            model.error = error
            model.release()
            await failing.end()
            told = failing.events[-1] if stream else failing.json
            assert told["error"]["code"] == code
            assert "secret" not in str(told)
            assert failing.status == (200 if stream else status)
            await other.end()
            assert other.events[-1]["choices"][0]["finish_reason"] == "length"
            again = await Call(served.app, CHAT, ask(**ENDLESS, max_tokens=40)).end()
            assert [one["choices"][0]["delta"] for one in again.events] == [
                one["choices"][0]["delta"] for one in other.events
            ]
            assert served.service.load.replies == 0

    try:
        asyncio.run(work())
    finally:
        model.release()


def test_the_model_folder_is_replaced_while_it_serves(tmp_path: Path) -> None:
    """What was loaded goes on; a later load sees what is there then, or says what is wrong with it."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}

    with Engine.load(folder) as engine, serving(engine) as served:

        def answers(salt: str) -> list[Any]:
            bodies = (ask(), ask(response_format=form), ask(tools=[{"type": "function", "function": {"name": "f"}}]))
            replies = [served.post({**body, "seed": 5, "max_tokens": 12, "cache_salt": salt}) for body in bodies]
            return [reply["choices"][0]["message"] for reply in replies]

        before = answers("a")
        for path in folder.iterdir():  # in place, as a download does that goes on
            path.write_bytes(b"no model")
        assert answers("b") == before
        with pytest.raises(MlxqwenError, match=r"config\.json"):
            Engine.load(folder)
        shutil.rmtree(folder)
        with pytest.raises(MlxqwenError, match="model"):
            Engine.load(folder)
        shutil.copytree(DEMO_FOLDER, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "max_position_embeddings": 256, "rope_scaling": None})
        )
        with Engine.load(folder) as later:
            assert later.model.config.context_length == 256
        assert answers("c") == before
