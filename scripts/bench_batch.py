"""Measure batches, long contexts and memory beside mlx-lm, turn by turn, on the same weights.

    scripts/bench_batch.py MODEL [--tokens 8] [--prompt 4096]

Times are processor time of the whole process, all threads: what other programs do counts little. Contexts are not read:
a cache is filled with zeros, whose attention costs as much as any. Peak memory is that of processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxqwen.cache import make_cache
from mlxqwen.generation import generate_tokens
from mlxqwen.loading import load_model
from mlxqwen.sampling_params import SamplingParams

__all__ = ["Memory", "Pair", "batch_times", "decode_times", "peak_memory"]

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(temperature=0)
MIB = 1 << 20


@dataclass(frozen=True)
class Pair:
    """Seconds per token at some batch size or context: medians of ours and mlx-lm's, and the median of their ratios."""

    size: int
    ours: float
    theirs: float
    ratio: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one run: what the weights and the cache take, MLX's peak above them, the whole process's peak."""

    weights: int
    cache: int
    mlx_above: int
    process: int


def batch_times(
    folder: Path, sizes: Sequence[int] = (1, 8, 32), tokens: int = 8, their_dtype: mx.Dtype | None = None
) -> list[Pair]:
    """Decoding in batches: processor seconds per token of one row; prompts of 16 tokens are not timed.

    mlx-lm computes as the checkpoint says, or is set to `their_dtype`.
    """
    ours, theirs = _load_both(folder)
    if their_dtype is not None:
        theirs.set_dtype(their_dtype)
    return [_paired(size, tokens, size, _our_batch(ours, size), _their_batch(theirs, size)) for size in sizes]


def decode_times(
    folder: Path, contexts: Sequence[int] = (256, 1024, 4096, 16384), tokens: int = 8, window: int | None = None
) -> list[Pair]:
    """Decoding behind so many tokens: processor seconds per token; with `window` in a ring of that size."""
    ours, theirs = _load_both(folder)
    return [
        _paired(context, tokens, 1, _our_context(ours, context, window), _their_context(theirs, context, window))
        for context in contexts
    ]


def peak_memory(folder: Path, prompt_tokens: int = 4096, **cache: Any) -> Memory:
    """Read a prompt and decode 16 tokens in a process of its own; `cache` are options of `make_cache`."""
    command = [sys.executable, __file__, str(folder), "--prompt", str(prompt_tokens), "--measure-memory"]
    paths = [str(ROOT), str(ROOT / "convert"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run([*command, json.dumps(cache)], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Memory(**json.loads(run.stdout))


def _paired(size: int, tokens: int, rows: int, ours: Iterator[None], theirs: Iterator[None]) -> Pair:
    seconds: list[list[float]] = [[], []]
    for turn in range(tokens + 2):
        for number, side in enumerate((ours, theirs)):
            started = time.process_time()
            next(side)
            if turn > 1:  # the first turns read prompts and fill caches
                seconds[number].append((time.process_time() - started) / rows)
    ratios = [their / our for our, their in zip(*seconds, strict=True)]
    return Pair(size, statistics.median(seconds[0]), statistics.median(seconds[1]), statistics.median(ratios))


def _load_both(folder: Path) -> tuple[Any, Any]:
    from mlx_lm.utils import load_model as load_theirs

    return load_model(folder), load_theirs(folder)[0]


def _our_batch(model: Any, rows: int) -> Iterator[None]:
    prompts = [[row + 1] * 16 for row in range(rows)]
    stream = generate_tokens(model, prompts, sampling=GREEDY, eos_token_ids=[])
    for token in stream:
        if token.row == rows - 1:
            yield


def _their_batch(model: Any, rows: int) -> Iterator[None]:
    from mlx_lm.generate import BatchGenerator, generation_stream

    generator = BatchGenerator(model, completion_batch_size=rows, prefill_batch_size=rows)
    generator.insert([[row + 1] * 16 for row in range(rows)], max_tokens=[1 << 20] * rows)
    while True:
        if generator.next_generated():
            mx.synchronize(generation_stream)  # its next step is on its way, and would count as ours
            yield


def _our_context(model: Any, context: int, window: int | None) -> Iterator[None]:
    cache = make_cache(model, max_kv_size=window)
    slots = context if window is None else min(window, context)
    cache.reserve(slots + 64)
    mx.eval(model.model(mx.array([[1]]), cache), cache.state)
    cache.placement.offsets = [context]
    return _steps(lambda token: model.logits(model.model(token, cache)))


def _their_context(model: Any, context: int, window: int | None) -> Iterator[None]:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model, max_kv_size=window)
    slots = context if window is None else min(window, context)
    shape = (1, model.args.num_key_value_heads, slots, model.args.head_dim)
    for layer in cache:
        layer.update_and_fetch(mx.zeros(shape, dtype=mx.bfloat16), mx.zeros(shape, dtype=mx.bfloat16))
    return _steps(lambda token: model(token, cache))


def _steps(logits: Callable[[mx.array], mx.array]) -> Iterator[None]:
    token = mx.array([[1]])
    while True:
        token = mx.argmax(logits(token)[:, -1], axis=-1, keepdims=True)
        mx.eval(token)
        yield


def _measure_memory(folder: Path, prompt_tokens: int, options: dict[str, Any]) -> Memory:
    model: Any = load_model(folder)
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    cache = make_cache(model, **options)
    mx.reset_peak_memory()
    prompt = [1 + n % 1000 for n in range(prompt_tokens)]
    list(generate_tokens(model, prompt, cache=cache, sampling=GREEDY, max_tokens=16, eos_token_ids=[]))
    return Memory(weights, cache.nbytes, mx.get_peak_memory() - weights - cache.nbytes, _process_peak())


def _process_peak() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts here what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _print_times(title: str, pairs: Sequence[Pair]) -> None:
    print(f"\n{title}\n\n| size | mlxqwen, ms | mlx-lm, ms | mlx-lm / mlxqwen |\n| --- | --- | --- | --- |")
    for pair in pairs:
        print(f"| {pair.size:,} | {pair.ours * 1e3:.2f} | {pair.theirs * 1e3:.2f} | {pair.ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8, help="steps that are timed at each size")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens read for the peak memory")
    parser.add_argument("--measure-memory", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory is not None:
        memory = _measure_memory(arguments.model, arguments.prompt, arguments.measure_memory)
        print(json.dumps(memory.__dict__))
        return
    _print_times("Rows at once", batch_times(arguments.model, tokens=arguments.tokens))
    _print_times("Tokens before", decode_times(arguments.model, tokens=arguments.tokens))
    _print_times(
        "Tokens before, in a ring of 1,024", decode_times(arguments.model, (2048, 16384), arguments.tokens, 1024)
    )
    print(
        "\n| cache | weights, MiB | cache, MiB | MLX above both, MiB | process, MiB |\n| --- | --- | --- | --- | --- |"
    )
    for name, options in (("plain", {}), ("8-bit", {"kv_bits": 8}), ("ring of 1,024", {"max_kv_size": 1024})):
        found = peak_memory(arguments.model, arguments.prompt, **options)
        sizes = [found.weights, found.cache, found.mlx_above, found.process]
        print(f"| {name} | " + " | ".join(f"{size / MIB:.0f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
