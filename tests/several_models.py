"""A server of two models that are loaded when they are asked for, and weights whose loads a test holds or fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlxqwen.engine.engine import Engine
from mlxqwen.engine.loading import MakeRoom
from mlxqwen.engine.memory import weight_bytes
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.app import make_app
from mlxqwen.server.leases import ModelSource
from mlxqwen.server.registry import ModelRegistry
from mlxqwen.server.service import Service
from mlxqwen.server.settings import ServerSettings
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import PATIENCE, Call
from tests.conftest import random_model
from tests.scheduling import machine
from tests.serving import CHAT, ask

SHORT = {"max_tokens": 2, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": 150, "ignore_eos": True, "stream": True}


class Weights:
    """Makes an engine each time it is loaded, of weights of its own.

    Attributes:
        loads: how often.
        error: what loading raises at once; None if it succeeds.
        fails_with: what it raises once it may end.
        may_end: loading waits for this before it reads.
        model: refers to the last one that was loaded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.loads = 0
        self.error: BaseException | None = None
        self.fails_with: BaseException | None = None
        self.may_end = threading.Event()
        self.may_end.set()
        self.model: weakref.ref[Qwen3ForCausalLM] | None = None

    def __call__(self, make_room: MakeRoom) -> Engine:
        self.loads += 1
        if self.error is not None:
            raise self.error
        made = model_of(self._tokenizer)
        make_room(weight_bytes(made))
        assert self.may_end.wait(PATIENCE)
        if self.fails_with is not None:
            raise self.fails_with
        self.model = weakref.ref(made)
        return Engine(made, self._tokenizer)

    @property
    def is_held(self) -> bool:
        """Whether the weights are in memory."""
        gc.collect()
        return self.model is not None and self.model() is not None


def model_of(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    return random_model(vocab_size=tokenizer.vocab_size, context=512, layers=1)


class Several:
    """A server of models `a` and `b`."""

    def __init__(self, tokenizer: Tokenizer, **settings: Any) -> None:
        self.now = 0.0
        self.settings = ServerSettings(**settings)
        self.weights = {"a": Weights(tokenizer), "b": Weights(tokenizer)}
        sources = [
            ModelSource("a", self.weights["a"], location="/home/me/a"),
            ModelSource("b", self.weights["b"], repo_id="Qwen/Qwen3-4B-MLX-4bit"),
        ]
        self.models = ModelRegistry(sources, self.settings, clock=lambda: self.now)
        self.service = Service(self.models, self.settings)
        self.app = make_app(self.service)

    def ask(self, model: str | None, *, reads: bool = True, **fields: Any) -> Call:
        return Call(self.app, CHAT, {**ask(), **SHORT, "model": model, **fields}, reads=reads)

    async def get(self, path: str) -> Call:
        return await Call(self.app, path, method="GET").end()

    def states(self) -> dict[str, str]:
        return {entry.name: entry.state for entry in self.models.entries}


@contextmanager
def several(tokenizer: Tokenizer, **settings: Any) -> Iterator[Several]:
    made = Several(tokenizer, **settings)
    try:
        yield made
    finally:
        for weights in made.weights.values():
            weights.may_end.set()
        made.service.close()


@contextmanager
def room_for_one(tokenizer: Tokenizer, **settings: Any) -> Iterator[Several]:
    """Where one model has room beside caches, and two have not."""
    model = model_of(tokenizer)
    with machine(model, weight_bytes(model) * 3 // 4), several(tokenizer, **settings) as made:
        yield made
