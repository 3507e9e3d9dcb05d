"""mlxqwen and mlx-lm behind one face: load a folder, continue ids greedily, with no end tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.clock import now
from benchmarks.comparison import FLOAT32
from benchmarks.machine import has_mlx_lm
from mlxqwen.cache import make_cache
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.model.loading import load_model
from mlxqwen.sampling.params import SamplingParams

__all__ = [
    "FLOAT32",
    "MLX_LM",
    "Ours",
    "Side",
    "Theirs",
    "all_sides",
    "on_cpu",
    "prompt_ids",
    "seconds_per_token",
    "seconds_to_first_token",
]

MLX_LM = "mlx-lm"


class Side(Protocol):
    """What both sides can do."""

    def tokens(self, prompt: list[int], count: int) -> Iterator[object]:
        """Read `prompt` with an empty cache, then decode `count` tokens, greedily."""
        ...

    def settle(self) -> None:
        """Wait for all that is queued, so that the next turn does not pay for it."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, as they are held."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of the last run's cache."""
        ...


@dataclass
class Ours:
    """mlxqwen, as `generate_tokens` runs it; `cache_options` are those of `make_cache`."""

    model: Any
    cache_options: Mapping[str, int] = field(default_factory=dict)
    cache: Any = None

    @classmethod
    def load(cls, folder: Path, **cache_options: int) -> Ours:
        """With its default dtype."""
        return cls(load_model(folder), cache_options)

    def tokens(self, prompt: list[int], count: int) -> Iterator[object]:
        """See `Side`."""
        self.cache = make_cache(self.model, **self.cache_options)
        greedy = SamplingParams(temperature=0.0)
        return iter(
            generate_tokens(self.model, prompt, sampling=greedy, max_tokens=count, eos_token_ids=(), cache=self.cache)
        )

    def settle(self) -> None:
        """See `Side`."""
        mx.synchronize()

    @property
    def weight_bytes(self) -> int:
        """See `Side`."""
        return _bytes(self.model)

    @property
    def cache_bytes(self) -> int:
        """See `Side`."""
        return int(self.cache.nbytes)


@dataclass
class Theirs:
    """mlx-lm, as its `generate_step` runs it; that knows no end tokens."""

    model: Any
    cache: Any = None

    @classmethod
    def load(cls, folder: Path, dtype: mx.Dtype | None = None) -> Theirs:
        """As the checkpoint says, or set to compute in `dtype`."""
        from mlx_lm.utils import load_model as load_theirs  # need not be installed

        model, _ = load_theirs(folder)
        if dtype is not None:
            model.set_dtype(dtype)
            mx.eval(model.parameters())
        return cls(model)

    def tokens(self, prompt: list[int], count: int) -> Iterator[object]:
        """See `Side`."""
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = make_prompt_cache(self.model)
        return iter(generate_step(mx.array(prompt), self.model, max_tokens=count, prompt_cache=self.cache))

    def settle(self) -> None:
        """See `Side`: one more step than it was asked for is on its way."""
        mx.eval([layer.state for layer in self.cache])
        mx.synchronize()

    @property
    def weight_bytes(self) -> int:
        """See `Side`."""
        return _bytes(self.model)

    @property
    def cache_bytes(self) -> int:
        """See `Side`."""
        return sum(int(layer.nbytes) for layer in self.cache)


def on_cpu() -> bool:
    """Whether MLX computes on a CPU, where mlxqwen computes in float32."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def all_sides(folder: Path, left_out: Collection[str] = ()) -> dict[str, Side]:
    """mlxqwen; mlx-lm, where it is installed; and, on a CPU, mlx-lm set to compute in what mlxqwen computes in; less
    those that are left out."""
    sides: dict[str, Side] = {"mlxqwen": Ours.load(folder)}
    if has_mlx_lm():
        if MLX_LM not in left_out:
            sides[MLX_LM] = Theirs.load(folder)
        if on_cpu() and FLOAT32 not in left_out:
            sides[FLOAT32] = Theirs.load(folder, mx.float32)
    return sides


def _bytes(model: Any) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


def prompt_ids(count: int) -> list[int]:
    """So many ids of Qwen3's vocabulary, no two alike."""
    return [(7919 * place + 11) % 151_643 for place in range(count)]


def seconds_to_first_token(side: Side, prompt: list[int]) -> float:
    """From the prompt's ids to the first token."""
    stream = side.tokens(prompt, 1)
    started = now()
    next(stream)
    seconds = now() - started
    deque(stream, maxlen=0)
    side.settle()
    return seconds


def seconds_per_token(side: Side, prompt: list[int], count: int) -> float:
    """Between the first of `count + 1` tokens and the last."""
    stream = side.tokens(prompt, count + 1)
    next(stream)
    started = now()
    for _ in range(count):
        next(stream)
    seconds = (now() - started) / count
    deque(stream, maxlen=0)
    side.settle()
    return seconds
