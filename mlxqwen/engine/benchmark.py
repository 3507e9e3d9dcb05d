"""The benchmark: how fast a model reads prompts and writes replies, by the length of the context."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxqwen.cache import KVCache
from mlxqwen.checks import check_integer
from mlxqwen.device import Device, current_device
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import InsufficientMemoryError, OptionError
from mlxqwen.model.footprint import cache_bytes
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams

__all__ = ["BenchmarkRun", "Speed", "benchmark", "choose_contexts", "summarize", "weight_bytes"]

_USUAL_CONTEXTS = (128, 512, 2048, 8192)
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """One prompt read and some tokens decoded.

    Args:
        context: tokens of the prompt.
        tokens: decoded after the first.
        prefill_seconds: until the first token is drawn; all of the prompt is read in that time.
        decode_seconds: from there to the last token.
        cache_bytes: what keys and values take at the end.
        peak_bytes: the most that MLX held, weights included.
    """

    context: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the runs of one context, and the most memory of any run; see `BenchmarkRun`."""

    context: int
    runs: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    cache_bytes: int
    peak_bytes: int


def choose_contexts(
    model: Qwen3ForCausalLM, asked: Sequence[int] | None, *, tokens: int, max_kv_size: int | None = None
) -> list[int]:
    """The prompt lengths to measure, ascending: those of `asked`, or usual ones within the model's context.

    Raises `OptionError` for a length that leaves no room for `tokens` more.
    """
    tokens = check_integer("tokens", tokens, 1)
    most = model.config.context_length - tokens - 1
    if most < 1:
        raise OptionError(f"tokens: found {tokens}, expected fewer than the context of {model.config.context_length:,}")
    if asked is None:
        fitting = [context for context in _USUAL_CONTEXTS if context <= most]
        return fitting if len(fitting) == len(_USUAL_CONTEXTS) else sorted({*fitting, most})
    slides = max_kv_size is not None and max_kv_size <= model.config.context_length
    asked = [check_integer("context", context, 1) for context in asked]
    for context in asked:
        if context > most and not slides:
            raise OptionError(
                f"context: found {context:,}, expected at most {most:,}, so that a first token and {tokens:,} more "
                f"have room behind it in the model's {model.config.context_length:,}",
                hint="Measure fewer tokens, extend the context (--yarn-factor), or slide over it (--max-kv-size).",
            )
    return sorted(set(asked))


def benchmark(
    model: Qwen3ForCausalLM,
    contexts: Sequence[int],
    new_cache: Callable[[], KVCache],
    *,
    tokens: int = 64,
    repeat: int = 3,
    prefill_chunk: int | None = None,
    device: Device | None = None,
    force: bool = False,
) -> Iterator[BenchmarkRun]:
    """Measure each context `repeat` times, in rounds, so that a machine that slows down affects all contexts alike.

    Prompts are random tokens, and replies are greedy without an end token. One short run of each context comes first
    and does not count: it compiles kernels and allocates memory.

    Args:
        model: the model to measure.
        contexts: lengths of prompts; see `choose_contexts`.
        new_cache: makes an empty cache of one row.
        tokens: how many to decode after the first.
        repeat: runs of each context.
        prefill_chunk: prompt tokens a step.
        device: the machine; by default this one.
        force: measure even what does not fit its memory.

    Raises:
        OptionError: numbers out of range.
        InsufficientMemoryError: weights and cache do not fit.
    """
    repeat = check_integer("repeat", repeat, 1)
    if not force:
        _check_memory(model, max(contexts) + tokens, new_cache(), device or current_device())
    return _runs(model, contexts, new_cache, tokens, repeat, prefill_chunk)


def summarize(runs: Iterable[BenchmarkRun]) -> list[Speed]:
    """Group runs by context, ascending, and take medians."""
    by_context: dict[int, list[BenchmarkRun]] = defaultdict(list)
    for run in runs:
        by_context[run.context].append(run)
    return [_speed(context, by_context[context]) for context in sorted(by_context)]


def weight_bytes(model: Qwen3ForCausalLM) -> int:
    """Bytes of the weights in memory."""
    parameters: Any = tree_flatten(cast(Any, model).parameters())
    return sum(array.nbytes for _, array in parameters)


def _speed(context: int, runs: Sequence[BenchmarkRun]) -> Speed:
    prefill = median(run.prefill_seconds for run in runs)
    return Speed(
        context=context,
        runs=len(runs),
        prefill_seconds=prefill,
        prefill_tokens_per_second=context / prefill,
        decode_tokens_per_second=runs[0].tokens / median(run.decode_seconds for run in runs),
        cache_bytes=max(run.cache_bytes for run in runs),
        peak_bytes=max(run.peak_bytes for run in runs),
    )


def _runs(
    model: Qwen3ForCausalLM,
    contexts: Sequence[int],
    new_cache: Callable[[], KVCache],
    tokens: int,
    repeat: int,
    prefill_chunk: int | None,
) -> Iterator[BenchmarkRun]:
    draw = random.Random(0)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(context)] for context in contexts]
    for prompt in prompts:
        _run(model, prompt, new_cache(), min(tokens, _WARM_UP_TOKENS), prefill_chunk)
    for _ in range(repeat):
        for prompt in prompts:
            yield _run(model, prompt, new_cache(), tokens, prefill_chunk)


def _run(
    model: Qwen3ForCausalLM, prompt: Sequence[int], cache: KVCache, tokens: int, prefill_chunk: int | None
) -> BenchmarkRun:
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    stream = generate_tokens(
        model,
        prompt,
        sampling=SamplingParams(temperature=0),
        max_tokens=tokens + 1,
        eos_token_ids=(),
        cache=cache,
        prefill_chunk=prefill_chunk,
    )
    next(stream)
    first = time.perf_counter()
    for _ in stream:
        pass
    last = time.perf_counter()
    return BenchmarkRun(len(prompt), tokens, first - started, last - first, cache.nbytes, mx.get_peak_memory())


def _check_memory(model: Qwen3ForCausalLM, tokens: int, cache: KVCache, device: Device) -> None:
    slots = tokens if cache.max_kv_size is None else min(tokens, cache.max_kv_size)
    needed = weight_bytes(model) + cache_bytes(
        model.config, slots, model.dtype.size, cache.kv_bits, cache.kv_group_size
    )
    if needed > device.usable_memory:
        raise InsufficientMemoryError(
            f"context: weights and cache of {tokens:,} tokens take {needed / 1e9:.1f} GB, this machine can hold "
            f"{device.usable_memory / 1e9:.1f} GB",
            hint="Measure a shorter context, use --kv-bits 8 or --max-kv-size, or --force (force=True).",
        )
