"""Steps that are taken back in part: against a cache that was fed nothing but what stayed, token by token."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.cache.tentative import TentativeStep
from mlxqwen.errors import CacheError
from mlxqwen.model.qwen3 import ModelCache, Qwen3ForCausalLM
from mlxqwen.model.rope import Rope
from tests.conftest import random_model
from tests.one_layer_cache import attended
from tests.tolerance import assert_close

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
ROPE = Rope(HEAD_DIM, 10_000.0)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return random_model()


def tokens(rows: int, count: int) -> list[mx.array]:
    """Queries, keys and values of `count` tokens."""
    keys = mx.random.split(mx.random.key(count), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [mx.random.normal((rows, n, count, HEAD_DIM), key=key) for n, key in zip(heads, keys, strict=True)]


def feed(cache: ModelCache, rows: int, parts: list[mx.array]) -> mx.array:
    """One step of all layers with the same tokens → what the last one's queries get."""
    layers: Any = cache.begin(rows, parts[0].shape[2])
    return [attended(layer, parts, ROPE) for layer in layers][-1]


def held(cache: KVCache) -> list[Any]:
    """What all filled slots hold."""
    slots = cache.placement.slots_for(cache.offset)
    return [part[..., :slots, :].tolist() for part in cache.state] if slots else []


@st.composite
def caches(draw: st.DrawFn) -> dict[str, Any]:
    """Options of two caches that are alike; the narrowest windows hold one token beside the sinks."""
    options: dict[str, Any] = {"kv_bits": draw(st.sampled_from([None, 8, 4])), "batch_size": draw(st.integers(1, 2))}
    if draw(st.integers(0, 3)):
        keep = draw(st.integers(0, 4))
        options |= {"keep": keep, "max_kv_size": keep + draw(st.integers(1, 9))}
    return options


@settings(max_examples=80, deadline=None)
@given(data=st.data(), options=caches())
def test_settled_at_any_number_is_a_cache_that_was_fed_so_many(
    model: Qwen3ForCausalLM, data: st.DataObject, options: dict[str, Any]
) -> None:
    cache, expected, rows = make_cache(model, **options), make_cache(model, **options), options["batch_size"]
    texts = tokens(rows, 40)
    at = data.draw(st.integers(0, 12), label="prefilled")
    if at:
        for one in (cache, expected):
            feed(one, rows, [part[:, :, :at] for part in texts])
    for length in data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4), label="steps"):
        step, start = TentativeStep(cache), at
        found = feed(step, rows, [part[:, :, at : at + length] for part in texts])
        assert held(cache) == held(expected)  # nothing counts yet
        for count in sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=3), label="settled")):
            step.settle(count)
            while at < start + count:
                alone = feed(expected, rows, [part[:, :, at : at + 1] for part in texts])
                assert_close(found[:, :, at - start : at - start + 1], alone)
                at += 1
            assert cache.offsets == expected.offsets
            assert held(cache) == held(expected)


@pytest.mark.parametrize("window", [None, 4])
def test_a_step_that_was_never_settled_leaves_the_cache_as_it_was(model: Qwen3ForCausalLM, window: int | None) -> None:
    cache, expected = (make_cache(model, max_kv_size=window, keep=1) for _ in range(2))
    texts = tokens(1, 20)
    for one in (cache, expected):
        feed(one, 1, [part[:, :, :6] for part in texts])
    feed(TentativeStep(cache), 1, [part[:, :, 6:10] for part in texts])
    for one in (cache, expected):
        feed(one, 1, [part[:, :, 10:13] for part in texts])
    assert held(cache) == held(expected)


def test_a_ring_is_written_to_where_tokens_stay_and_nowhere_else(model: Qwen3ForCausalLM) -> None:
    cache = make_cache(model, max_kv_size=8, keep=2)
    texts = tokens(1, 20)
    feed(cache, 1, [part[:, :, :11] for part in texts])
    before = held(cache)
    step = TentativeStep(cache)
    feed(step, 1, [part[:, :, 11:16] for part in texts])
    step.settle(3)  # positions 11, 12 and 13 belong into slots 2 + (11 - 2) % 6 = 5, 6 and 7
    for old, new in zip(before, held(cache), strict=True):
        changed = [
            slot for slot in range(8) if mx.array(old)[:, :, slot].tolist() != mx.array(new)[:, :, slot].tolist()
        ]
        assert changed == [5, 6, 7]


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_a_step_settles_what_it_has_and_never_less_than_before(model: Qwen3ForCausalLM, count: int) -> None:
    step = TentativeStep(make_cache(model))
    feed(step, 1, tokens(1, 3))
    step.settle(1)
    with pytest.raises(CacheError, match=rf"^cache: found {count} tokens to settle, expected 1 to 3 of this step"):
        step.settle(count)


def test_rows_that_stand_apart_take_no_tentative_step(model: Qwen3ForCausalLM) -> None:
    cache = make_cache(model, batch_size=2)
    with pytest.raises(CacheError, match=r"found 1 rows in a tentative step of a cache with rows at \[0, 0\]"):
        TentativeStep(cache).begin(1, 3)
    cache.begin(2, 3, [3, 1])
    with pytest.raises(CacheError, match=r"found 2 rows in a tentative step of a cache with rows at \[3, 1\]"):
        TentativeStep(cache).begin(2, 3)


def test_a_tentative_step_is_made_for_one_model(model: Qwen3ForCausalLM) -> None:
    step = TentativeStep(make_cache(model))
    assert step.fits(model.config)
    with pytest.raises(CacheError, match="made for a model of another shape"):
        random_model(vocab_size=98)(mx.array([[1, 2]]), step)
