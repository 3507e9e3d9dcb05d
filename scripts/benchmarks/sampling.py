"""One token from a row of logits over Qwen3's whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from benchmarks.clock import now
from benchmarks.comparison import Comparison, compared, take_turns
from benchmarks.machine import has_mlx_lm
from benchmarks.settings import Settings
from benchmarks.sides import MLX_LM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.sampling.sampler import Sampler

__all__ = ["sample"]

VOCABULARY = 151_936


def sample(settings: Settings) -> Iterator[Comparison]:
    """Milliseconds a draw, with the card's profile for thinking and greedily, from the same float32 logits."""
    mx.random.seed(0)
    logits = mx.random.normal((1, VOCABULARY)) * 4
    mx.eval(logits)
    card = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, seed=0)
    kinds = {"sampling, T 0.6, top-p 0.95, top-k 20": card, "greedy": SamplingParams(temperature=0.0)}
    draws = 5 if settings.quick else 20
    for name, params in kinds.items():
        sides = {"mlxqwen": partial(_ours, Sampler([params], [[0]], VOCABULARY), logits)}
        if has_mlx_lm():
            from mlx_lm.sample_utils import make_sampler

            theirs = make_sampler(temp=params.temperature, top_p=params.top_p, top_k=params.top_k)
            sides[MLX_LM] = partial(_theirs, theirs, logits)
        settings.tell(name)
        numbers = take_turns([partial(_milliseconds, side, draws) for side in sides.values()], settings.turns(15))
        yield from compared(f"{name}, 151,936 logits", "ms", dict(zip(sides, numbers, strict=True)))


def _ours(sampler: Sampler, logits: mx.array) -> mx.array:
    return sampler(logits)


def _theirs(sampler: Callable[[mx.array], mx.array], logits: mx.array) -> mx.array:
    """What `generate_step` does with logits."""
    return sampler(logits - mx.logsumexp(logits, keepdims=True))


def _milliseconds(draw: Callable[[], mx.array], draws: int) -> float:
    started = now()
    for _ in range(draws):
        draw().item()
    return (now() - started) / draws * 1e3
