"""What caches hold and copy, in bytes: windows, growth, guesses, the scores of a chunk."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.cache import layer as cache_layer
from mlxqwen.cache.placement import Step
from mlxqwen.cache.storage import Stored
from mlxqwen.cache.tentative import TentativeStep
from mlxqwen.device import Device
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.model.rope import Rope
from tests.one_layer_cache import (
    HEAD_DIM,
    HEADS,
    KV_BITS,
    KV_HEADS,
    THETA,
    attend,
    attended,
    model,
    new_cache,
    new_cache_for,
    new_cache_slot_bytes,
    random_tokens,
)
from tests.tiny_checkpoints import DENSE, prompt

__all__ = ["model"]  # a fixture


# Memory


@settings(max_examples=40, deadline=None)
@given(
    window=st.integers(5, 40),
    chunks=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    keep=st.integers(0, 4),
    kv_bits=st.sampled_from(KV_BITS),
)
def test_a_ring_holds_its_window_and_shows_a_chunk_more(
    window: int, chunks: list[int], keep: int, kv_bits: int | None
) -> None:
    """In bytes of what the queries look at, keys and values together."""
    slot = new_cache_slot_bytes(kv_bits)
    cache = new_cache(max_kv_size=window, keep=keep, kv_bits=kv_bits)
    shown: list[int] = []
    store = cache_layer._store

    def recorded(stored: Stored, new: Stored, plan: Step) -> tuple[Stored, Stored]:
        held, seen = store(stored, new, plan)
        shown.extend(part.nbytes for part in seen)
        return held, seen

    real = mx.fast.scaled_dot_product_attention

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        shown[:] = keys.nbytes, values.nbytes
        return real(queries, keys, values, **options)

    start = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_layer, "_store", recorded)
        patch.setattr(mx.fast, "scaled_dot_product_attention", attention)
        for length in [*chunks, 1, 1, 1]:
            shown.clear()
            attend(cache, [random_tokens(length, seed=length)], [(0, length)], length)
            held_before = min(start, window)
            start += length
            assert cache.nbytes <= window * slot
            assert min(start, length) * slot <= sum(shown) <= (window if length == 1 else held_before + length) * slot
    assert cache.offset == start


@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.parametrize("keep", [0, 4])
def test_a_full_window_decodes_at_constant_cost(model: Qwen3ForCausalLM, keep: int, kv_bits: int | None) -> None:
    cache = new_cache_for(model, 16, keep, kv_bits)
    sizes, graphs = set(), set()
    for token in prompt(16, 96):
        mx.eval(model(mx.array([[token]]), cache))
    for token in prompt(50, 96):
        logits = model(mx.array([[token]]), cache)
        graphs.add(graph_size(logits, *cache.state))
        mx.eval(logits, cache.state)
        sizes.add(cache.nbytes)
    assert len(sizes) == len(graphs) == 1 < min(graphs)
    assert sizes == {len(cache) * 16 * new_cache_slot_bytes(kv_bits)}


def graph_size(*arrays: mx.array) -> int:
    """How many operations are waiting to compute `arrays`."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return dot.getvalue().count("shape=rectangle")


def test_growing_follows_the_text_in_steps_or_as_reserved(model: Qwen3ForCausalLM) -> None:
    slot = len(make_cache(model)) * new_cache_slot_bytes(None)
    grown, reserved = make_cache(model), make_cache(model)
    reserved.reserve(300)
    for one, expected_slots in ((grown, 256), (reserved, 512)):
        model(mx.array([prompt(20, 96)]), one)
        assert one.nbytes == expected_slots * slot
    model(mx.array([prompt(240, 96)]), grown)
    assert grown.nbytes == 512 * slot


# Memory, in counts of bytes


def peak_of(step: Callable[[], object]) -> int:
    """The most bytes that MLX holds during a step beyond what it held before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return mx.get_peak_memory() - before


def decoded(cache: KVCache, tokens: int = 1) -> None:
    """So many tokens of each row through the cache's only layer, one at a time."""
    for _ in range(tokens):
        (layer,) = cache.begin(cache.batch_size, 1)
        new = [mx.ones((cache.batch_size, heads, 1, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        mx.eval(attended(layer, new, Rope(HEAD_DIM, THETA)), cache.state)


@pytest.mark.parametrize("offsets", [[4000], [4000, 4000], [4000, 3000, 5]])
@pytest.mark.parametrize("window", [None, 2048])
def test_a_decoded_token_copies_no_cache(offsets: list[int], window: int | None) -> None:
    """Rows of one length or of several, in a line or a full ring: there are scores and little else."""
    cache = new_cache(max_kv_size=window, batch_size=len(offsets))
    cache.reserve(4096)
    decoded(cache)
    cache.placement.offsets = list(offsets)
    decoded(cache)
    assert peak_of(lambda: decoded(cache)) < cache.nbytes // 6


def test_a_growing_cache_is_never_there_twice(tiny: Qwen3ForCausalLM) -> None:
    """Each layer's buffers are copied apart, and once in 256 tokens."""
    cache = make_cache(tiny, batch_size=16)
    tokens = mx.ones((16, 1), dtype=mx.int32)
    tiny(mx.ones((16, 256), dtype=mx.int32), cache)
    mx.eval(cache.state)
    before, sizes = cache.nbytes, set()

    def grow() -> None:
        tiny.model(tokens, cache)
        sizes.add(cache.nbytes)

    peak = peak_of(grow)
    assert sizes == {2 * before}
    assert peak <= before + before // len(cache) + before // 8
    for _ in range(255):
        grow()
    assert sizes == {2 * before}
    assert mx.get_cache_memory() < before


@pytest.mark.parametrize(("window", "guesses"), [(None, 10), (400, 155)])
def test_a_tentative_step_grows_a_cache_a_layer_at_a_time(window: int | None, guesses: int) -> None:
    """A line where guesses are read, a ring where those that fill its window stay."""
    model = Qwen3ForCausalLM(ModelConfig.from_dict({**DENSE, "num_hidden_layers": 8}))
    mx.eval(model.parameters())
    cache = make_cache(model, batch_size=4, max_kv_size=window)
    mx.eval(model.model(mx.ones((4, 250), dtype=mx.int32), cache), cache.state)
    before, step = cache.nbytes, TentativeStep(cache)

    def read() -> None:
        mx.eval(model.model(mx.ones((4, guesses), dtype=mx.int32), step))

    def settle() -> None:
        step.settle(guesses)
        mx.eval(cache.state)

    if window is None:
        peak = peak_of(read)
    else:
        read()
        peak = peak_of(settle)
    assert cache.nbytes == before * (window or 512) // 256
    assert peak <= cache.nbytes - before + before // 4  # two of eight layers


@pytest.mark.parametrize(
    ("arguments", "on_gpu"),
    [
        ({}, False),  # one kernel on a GPU
        *((arguments, on_gpu) for arguments in ({"kv_bits": 8}, {"max_kv_size": 1024}) for on_gpu in (False, True)),
    ],
    ids=str,
)
def test_the_scores_of_a_chunk_are_never_all_there(
    arguments: dict[str, Any], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device("a machine", is_gpu=on_gpu, memory=1 << 34, usable_memory=1 << 34)
    monkeypatch.setattr(cache_layer, "current_device", lambda: device)
    cache = new_cache(**arguments)
    rope, length = Rope(HEAD_DIM, THETA), 512
    chunk = [mx.ones((1, heads, length, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def step() -> None:
        (layer,) = cache.begin(1, length)
        mx.eval(attended(layer, chunk, rope), cache.state)

    cache.reserve(2048)
    step()
    cache.placement.offsets = [1536]
    scores = 4 * HEADS * length * (1536 if cache.max_kv_size else 2048)
    bounds = ("_MOST_SCORES", "_MOST_SCORES_ON_GPU") if on_gpu else ("_MOST_SCORES_ON_GPU", "_MOST_SCORES")
    for name, share in zip(bounds, (1, 16), strict=True):  # the other device's would be all of them
        monkeypatch.setattr(cache_layer, name, scores // 4 // share)
    assert peak_of(step) < scores
