"""Counts of work: what a change made worse shows here without a clock.

All is counted on MLX's CPU stream with a CPU `Device`, wherever this runs, so that a Mac counts what CI counts.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import mlx.core as mx

import mlxqwen
from benchmarks.conversion_counts import conversion_counts
from benchmarks.modules import module_counts
from benchmarks.primitives import KINDS, count_primitives, ours, single_nodes, write_model
from mlxqwen.cache import make_cache
from mlxqwen.device import current_device
from mlxqwen.engine.conversation import Conversation
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Done
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM, Qwen3Model
from mlxqwen.sampling.params import SamplingParams

__all__ = ["all_counts", "conversation_counts", "decoding_counts", "reply_counts"]

# Results of these take no memory of their own: they look at their input's, or write into it.
_VIEWS = {
    "Broadcast",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "SliceUpdate",
    "Split",
    "Squeeze",
    "Transpose",
    "Unflatten",
}
_PACKAGE = str(Path(mlxqwen.__file__).parent)
_GRAPHS = ("dense, 4-bit", "MoE, 4-bit")
_PROMPT = 700  # tokens: two chunks
_REPLY = 300
_TURNS = ("How many r's in strawberry?", "And how many b's?", "Thank you.")


def all_counts() -> dict[str, int]:
    """Every count by name."""
    return {**decoding_counts(), **reply_counts(), **conversation_counts(), **conversion_counts(), **module_counts()}


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """MLX computes on the CPU meanwhile, and the machine is taken for one without a GPU."""
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    current_device.cache_clear()
    try:
        yield
    finally:
        mx.set_default_device(device)
        current_device.cache_clear()


@_on_the_cpu()
def decoding_counts() -> dict[str, int]:
    """Of one decoded token, 28 layers, as for a GPU: primitives, bytes of their results but for views, Python calls."""
    found = {}
    device = dataclasses.replace(current_device(), is_gpu=True, cores=1)
    for kind in _GRAPHS:
        with tempfile.TemporaryDirectory() as folder, single_nodes():
            write_model(Path(folder), *KINDS[kind])
            side = ours(Path(folder), device)
            token = mx.array([[5]])
            found[f"primitives per decoded token, {kind}"] = count_primitives([side.step(token), *side.state()]).total()
            side.rewind()
            found[f"bytes written per decoded token, {kind}"] = _bytes_written(side.step, token)
            side.rewind()
            found[f"Python calls per decoded token, {kind}"] = _python_calls(side.step, token)
    return found


def _python_calls(step: Callable[[mx.array], mx.array], token: mx.array) -> int:
    """Of functions of mlxqwen with a name: how Python runs comprehensions changes with its versions."""
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        code = frame.f_code
        calls += event == "call" and code.co_filename.startswith(_PACKAGE) and not code.co_name.startswith("<")

    sys.setprofile(count)
    try:
        step(token)
    finally:
        sys.setprofile(None)
    return calls


def _bytes_written(step: Callable[[mx.array], mx.array], token: mx.array) -> int:
    nodes: list[dict[str, Any]] = []
    mx.export_function(nodes.append, step, token)
    return sum(
        prod(shape) * dtype.size
        for node in nodes
        if node["type"] == "primitive" and node["name"] not in _VIEWS
        for _, shape, dtype in node["outputs"]
    )


@_on_the_cpu()
def reply_counts() -> dict[str, int]:
    """Of one reply of 300 tokens to a prompt of 700: calls, evaluations, and what stays in memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), *KINDS["dense, 4-bit"], layers=2)
        model = load_model(folder)
    cache = make_cache(model)
    stream = generate_tokens(
        model,
        [1 + place % 200 for place in range(_PROMPT)],
        sampling=SamplingParams(seed=1),
        max_tokens=_REPLY,
        eos_token_ids=(),
        cache=cache,
    )
    with (
        _calls(Qwen3Model, "__call__") as models,
        _calls(Qwen3ForCausalLM, "logits", _positions) as positions,
        _calls(mx, "eval") as evaluations,
        _calls(mx, "async_eval") as started,
    ):
        next(stream)
        before, held, kept = len(evaluations) + len(started), _held(), cache.nbytes
        for _ in stream:
            pass
        decoding = len(evaluations) + len(started) - before
    return {
        f"model calls per reply of {_REPLY} tokens to {_PROMPT}": len(models),
        f"positions with logits per reply of {_REPLY} tokens to {_PROMPT}": sum(positions),
        f"evaluations per {_REPLY - 1} decoded tokens": decoding,
        f"bytes of the cache behind {_PROMPT + _REPLY} tokens, 2 layers": cache.nbytes,
        # A few bytes of the first step are let go of in the later ones, or just before.
        f"bytes held beyond the cache after {_REPLY - 1} decoded tokens": max(0, _held() - held - cache.nbytes + kept),
    }


def _held() -> int:
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def _positions(model: Qwen3ForCausalLM, hidden: mx.array) -> int:
    return prod(hidden.shape[:-1])


@contextmanager
def _calls(owner: Any, name: str, measure: Callable[..., int] = lambda *_: 1) -> Iterator[list[int]]:
    """What `measure` makes of the arguments of each call of a function while this is open."""
    real, calls = getattr(owner, name), list[int]()

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(measure(*arguments))
        return real(*arguments, **options)

    with patch.object(owner, name, call):
        yield calls


@_on_the_cpu()
def conversation_counts() -> dict[str, int]:
    """Tokens read in each turn of a conversation with the demo model, without thoughts, and answered greedily."""
    conversation = Conversation(Engine.load(), thinking=False, sampling=SamplingParams(temperature=0.0), max_tokens=24)
    found = {}
    for number, text in enumerate(_TURNS, start=1):
        usage = next(event.usage for event in conversation.stream(text) if isinstance(event, Done))
        found[f"prompt tokens read in turn {number}"] = usage.prompt_tokens - usage.cached_tokens
    return found
