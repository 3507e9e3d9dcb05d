"""A model that takes no more steps than a test allows: what happens in a step, or before the next, is certain."""

from __future__ import annotations

import threading
from typing import Any, cast

import mlx.core as mx

from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

_PATIENCE = 120.0


class HeldModel:
    """Computes what the model computes, as soon as that is allowed.

    Attributes:
        passes: forward passes that were begun, the one that is held included.
        error: what the next pass that reads a prompt raises, once.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self._inner = model
        self._changed = threading.Condition()
        self._allowed: int | None = None
        self.passes = 0
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def hold(self, after: int = 0) -> None:
        """Hold the pass behind the next `after` ones."""
        with self._changed:
            self._allowed = self.passes + after

    def release(self) -> None:
        """Hold nothing any more."""
        with self._changed:
            self._allowed = None
            self._changed.notify_all()

    @property
    def is_held(self) -> bool:
        """Whether a pass waits here."""
        with self._changed:
            return self._allowed is not None and self.passes > self._allowed

    def model(self, *inputs: Any, **options: Any) -> mx.array:
        with self._changed:
            self.passes += 1
            if not self._changed.wait_for(lambda: self._allowed is None or self.passes <= self._allowed, _PATIENCE):
                raise AssertionError("held for too long")
            if self.error is not None and "lengths" in options:
                error, self.error = self.error, None
                raise error
        return self._inner.model(*inputs, **options)


def held_engine(model: Qwen3ForCausalLM, tokenizer: Tokenizer, **options: Any) -> tuple[Engine, HeldModel]:
    """An engine and the model in it; the options are the engine's."""
    held = HeldModel(model)
    return Engine(cast(Qwen3ForCausalLM, held), tokenizer, **options), held
