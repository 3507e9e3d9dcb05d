"""A model that counts what it reads, and says what a test wants it to say: for tests of what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

_CERTAIN = 1e4


class ScriptedModel:
    """Computes what the model computes, caches included; a script only bends the logits.

    Attributes:
        read: tokens of prompts that were given to the model so far.
        fail_after: tokens after which the logits are NaN; never if None.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self._inner = model
        self._script: list[int] = []
        self.read = 0
        self.fail_after: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def say(self, tokens: Sequence[int]) -> None:
        """The next tokens, whatever the model would say."""
        self._script = list(tokens)

    def model(
        self, tokens: mx.array, cache: KVCache, *, lengths: Sequence[int] | None = None, **options: Any
    ) -> mx.array:
        if lengths is not None:  # as prompts are given
            self.read += sum(lengths)
        return self._inner.model(tokens, cache, lengths=lengths, **options)

    def logits(self, hidden: mx.array) -> mx.array:
        logits = self._inner.logits(hidden)
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                return logits * mx.nan
        if self._script:
            logits = mx.where(mx.arange(logits.shape[-1]) == self._script.pop(0), _CERTAIN, logits)
        return logits


def scripted_engine(model: Qwen3ForCausalLM, tokenizer: Tokenizer, **options: Any) -> tuple[Engine, ScriptedModel]:
    """An engine and the model in it; the options are the engine's."""
    scripted = ScriptedModel(model)
    return Engine(cast(Qwen3ForCausalLM, scripted), tokenizer, **options), scripted
