"""Blocks and windows, copied out of a cache and into another: what follows is the same to the bit."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.cache.blocks import BLOCK, block_nbytes, put_blocks, put_window, take_blocks, take_window
from mlxqwen.errors import CacheError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.conftest import VOCAB_SIZE, random_model

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "8 bits": {"kv_bits": 8},
    "4 bits": {"kv_bits": 4},
    "ring": {"max_kv_size": 50, "keep": 3},
    "ring of 8 bits": {"max_kv_size": 50, "keep": 3, "kv_bits": 8},
}
PROMPT = [(7 * n * n + 3 * n) % VOCAB_SIZE for n in range(40)]
OTHER = [(5 * n + 1) % VOCAB_SIZE for n in range(23)]


def read(model: Qwen3ForCausalLM, cache: KVCache, tokens: list[Any]) -> mx.array:
    """The logits of the tokens; they are in the cache afterwards."""
    logits = model(mx.array([tokens]), cache)
    mx.eval(logits, cache.state)
    return logits[0]


def continuation(model: Qwen3ForCausalLM, cache: KVCache, tokens: list[int], count: int = 12) -> list[mx.array]:
    """The last token's logits, and those of the likeliest tokens that follow."""
    logits = [read(model, cache, tokens)[-1]]
    for _ in range(count):
        logits.append(read(model, cache, [mx.argmax(logits[-1]).item()])[-1])
    return logits


def assert_same(found: list[mx.array], expected: list[mx.array]) -> None:
    assert len(found) == len(expected)
    assert all(mx.array_equal(one, other).item() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_filled_cache_goes_on_as_if_it_had_read_the_tokens(tiny: Qwen3ForCausalLM, kind: str) -> None:
    first = make_cache(tiny, **KINDS[kind])
    read(tiny, first, PROMPT)
    blocks = take_blocks(first, 0, 0, 32)
    second, fresh = first.like(1), first.like(1)
    put_blocks(second, blocks)
    assert second.offsets == (32,)
    read(tiny, fresh, PROMPT[:32])
    assert_same(continuation(tiny, second, PROMPT[32:]), continuation(tiny, fresh, PROMPT[32:]))
    assert second.offsets == fresh.offsets
    assert [part.shape for part in second.state] == [part.shape for part in fresh.state]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_row_among_others_are_those_of_the_row_alone(tiny: Qwen3ForCausalLM, kind: str) -> None:
    rows, alone = make_cache(tiny, batch_size=2, **KINDS[kind]), make_cache(tiny, **KINDS[kind])
    padded = [*OTHER, *([0] * (len(PROMPT) - len(OTHER)))]
    mx.eval(tiny(mx.array([padded, PROMPT]), rows, lengths=[len(OTHER), len(PROMPT)]))
    read(tiny, alone, PROMPT)
    for found, expected in zip(take_blocks(rows, 1, 16, 32), take_blocks(alone, 0, 16, 32), strict=True):
        assert_same(list(found), list(expected))
    with pytest.raises(CacheError, match="row of 23 tokens: cannot take blocks from 16 to 32"):
        take_blocks(rows, 0, 16, 32)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_ring_that_has_dropped_tokens_goes_on_from_its_window(tiny: Qwen3ForCausalLM, bits: int | None) -> None:
    ring = make_cache(tiny, max_kv_size=20, keep=3, kv_bits=bits)
    read(tiny, ring, PROMPT)
    window, copy = take_window(ring, 0), ring.like(1)
    put_window(copy, window, 40)
    expected = continuation(tiny, ring, OTHER)
    assert_same(continuation(tiny, copy, OTHER), expected)
    again = ring.like(1)  # what was taken is not written to by who goes on from it
    put_window(again, window, 40)
    assert_same(continuation(tiny, again, OTHER), expected)


def test_each_block_has_memory_of_its_own(tiny: Qwen3ForCausalLM) -> None:
    cache = make_cache(tiny)
    read(tiny, cache, PROMPT)
    size = block_nbytes(cache)
    assert size == 2 * 2 * 2 * BLOCK * 32 * 4  # keys and values, layers, heads, tokens, head_dim, bytes
    blocks = take_blocks(cache, 0, 0, 32)
    assert [[part.nbytes for part in block] for block in blocks] == [[size], [size]]
    del cache
    before = mx.get_active_memory()
    del blocks[0]
    assert before - mx.get_active_memory() == size


def test_nothing_lazy_is_left_to_other_threads(tiny: Qwen3ForCausalLM) -> None:
    results: list[object] = []

    def use() -> None:
        cache = make_cache(tiny)
        read(tiny, cache, PROMPT)
        filled = cache.like(1)
        put_blocks(filled, take_blocks(cache, 0, 0, 32))
        results.append(filled)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    (filled,) = results
    assert isinstance(filled, KVCache)
    fresh = make_cache(tiny)
    read(tiny, fresh, PROMPT[:32])
    assert_same(continuation(tiny, filled, PROMPT[32:]), continuation(tiny, fresh, PROMPT[32:]))


def test_what_does_not_fit_is_refused(tiny: Qwen3ForCausalLM) -> None:
    cache, ring = make_cache(tiny), make_cache(tiny, max_kv_size=20, keep=3)
    read(tiny, cache, PROMPT)
    read(tiny, ring, PROMPT)
    blocks = take_blocks(cache, 0, 0, 32)
    assert take_blocks(cache, 0, 16, 16) == []
    for start, stop in [(0, 8), (8, 24), (0, 48), (16, 0), (-16, 0)]:
        with pytest.raises(CacheError, match="cannot take blocks"):
            take_blocks(cache, 0, start, stop)
    with pytest.raises(CacheError, match="cannot take blocks"):
        take_blocks(ring, 0, 0, 16)
    with pytest.raises(CacheError, match="not a ring that has dropped"):
        take_window(cache, 0)
    with pytest.raises(CacheError, match="expected one empty row"):
        put_blocks(cache, blocks)
    with pytest.raises(CacheError, match="expected one empty row"):
        put_blocks(cache.like(2), blocks)
    for other in (make_cache(tiny, kv_bits=8), ring.like(1)):
        with pytest.raises(CacheError, match="another kind of cache"):
            put_blocks(other, blocks)
    with pytest.raises(CacheError, match="not a ring"):
        put_window(cache.like(1), take_window(ring, 0), 40)
    with pytest.raises(CacheError, match="another kind of cache"):
        put_window(make_cache(tiny, max_kv_size=21, keep=3), take_window(ring, 0), 40)
    empty = cache.like(1)
    put_blocks(empty, [])
    assert empty.offset == 0


@pytest.mark.parametrize("bits", [None, 8])
def test_copying_leaves_no_second_owner_of_the_buffers(bits: int | None) -> None:
    model = random_model(context=40_000)
    cache = make_cache(model, kv_bits=bits)
    cache.reserve(20_000)
    read(model, cache, PROMPT)
    filled = cache.like(1)
    filled.reserve(20_000)
    put_blocks(filled, take_blocks(cache, 0, 0, 32))
    largest = max(part.nbytes for part in cache.state)
    for used in (cache, filled):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        read(model, used, [1])
        assert mx.get_peak_memory() - before < largest / 2  # a token is written in place
