"""The store of prefixes: what it finds, what it lets go of and in which order."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.cache import chain as chain_module
from mlxqwen.cache.blocks import BLOCK, take_blocks
from mlxqwen.cache.prefix_store import Match, Pin, PrefixStore, namespace
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from tests.conftest import random_model
from tests.test_blocks import KINDS, OTHER, PROMPT, assert_same, continuation, read

TINY = random_model()
SIZE = 2 * 2 * 2 * BLOCK * 32 * 4  # bytes of a block: keys and values, layers, heads, tokens, head_dim, float32
SPACE = namespace(make_cache(TINY), mx.float32)
LARGE = 1 << 30


def numbers(tokens: Sequence[int]) -> mx.array:
    """For each token one number that depends on all up to it."""
    coded = bytes(tokens)
    return mx.array([zlib.crc32(coded[: n + 1]) & 0xFFFF for n in range(len(coded))], dtype=mx.float32)


def holding(tokens: Sequence[int], model: Qwen3ForCausalLM = TINY) -> KVCache:
    """A cache that says of itself what it has read."""
    cache = make_cache(model)
    if tokens:
        room = mx.zeros(cache.placement.capacity_for(len(tokens)) - len(tokens))
        content = mx.broadcast_to(mx.concatenate([numbers(tokens), room])[None, None, :, None], (1, 2, 256, 32))
        for number, layer in enumerate(cache):
            layer.keys, layer.values = (content + 2 * number,), (content + 2 * number + 1,)
        cache.placement.offsets = [len(tokens)]
        mx.eval(cache.state)
    return cache


def assert_right(match: Match, tokens: Sequence[int]) -> None:
    """What was found is what reading the tokens gives."""
    found, length = make_cache(TINY), match.length
    match.fill(found)
    assert found.offsets == (length,)
    expected = holding(tokens[:length])
    assert len(found.state) == (4 if length else 0)
    for one, other in zip(found.state, expected.state, strict=True):
        assert mx.array_equal(one[..., :length, :], other[..., :length, :]).item()


def prompt(*symbols: int, tail: int = 1) -> list[int]:
    """A block of each symbol, and a tail."""
    return [symbol for symbol in symbols for _ in range(BLOCK)] + [99] * tail


def put(store: PrefixStore, *symbols: int, **options: Any) -> Pin:
    tokens = prompt(*symbols, tail=0)
    return store.put(SPACE, tokens, holding(tokens), 0, **options)


def length(store: PrefixStore, *symbols: int) -> int:
    """How many blocks are found; asking counts as use."""
    tokens = prompt(*symbols)
    match = store.match(SPACE, tokens)
    assert_right(match, tokens)
    return match.length // BLOCK


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_after_a_match_is_that_of_a_fresh_run(tiny: Qwen3ForCausalLM, kind: str) -> None:
    cache = make_cache(tiny, **KINDS[kind])
    space, store = namespace(cache, mx.float32), PrefixStore("weights", LARGE)
    read(tiny, cache, PROMPT)
    store.put(space, PROMPT, cache, 0)
    branch = [*PROMPT[:35], *OTHER[:6]]
    ring = None if cache.max_kv_size is None else (cache.max_kv_size, cache.keep)
    match = store.match(space, branch, ring=ring)
    assert match.length == 32
    found, fresh = cache.like(1), cache.like(1)
    match.fill(found)
    read(tiny, fresh, branch[:32])
    assert_same(continuation(tiny, found, branch[32:]), continuation(tiny, fresh, branch[32:]))


def test_a_ring_that_has_dropped_tokens_is_found_by_what_goes_on_from_it(tiny: Qwen3ForCausalLM) -> None:
    cache, ring = make_cache(tiny, max_kv_size=20, keep=3), (20, 3)
    space, store = namespace(cache, mx.float32), PrefixStore("weights", LARGE)
    early = cache.like(1)
    read(tiny, early, PROMPT[:17])
    store.put_ring(space, PROMPT[:17], early, 0)
    read(tiny, cache, PROMPT[:39])
    assert store.put(space, PROMPT[:39], cache, 0).length == 0
    assert store.put_ring(space, PROMPT[:39], cache, 0).length == 39
    held = store.nbytes
    assert store.put_ring(space, PROMPT, cache, 0).length == 39
    assert store.nbytes == held
    goes_on, branches_off = [*PROMPT[:39], *OTHER], [*PROMPT[:38], *OTHER]
    assert store.match(space, goes_on, ring=ring).length == 39
    assert store.match(space, branches_off, ring=ring).length == 16
    assert store.match(space, PROMPT[:39], ring=ring).length == 16  # its last token has to be read
    assert store.match(space, goes_on, ring=(20, 4)).length == 16
    assert store.match(space + "x", goes_on, ring=ring).length == 0
    assert store.match(space, goes_on).length == 16  # what keeps everything takes no ring
    found = cache.like(1)
    store.match(space, goes_on, ring=ring).fill(found)
    assert_same(continuation(tiny, found, OTHER), continuation(tiny, cache, OTHER))
    with pytest.raises(OptionError, match="found 3 tokens, expected the"):
        store.put_ring(space, PROMPT[:3], cache, 0)


def test_caches_that_differ_in_their_window_alone_share_blocks(tiny: Qwen3ForCausalLM) -> None:
    linear, ring = make_cache(tiny), make_cache(tiny, max_kv_size=50, keep=3)
    assert namespace(linear, mx.float32) == namespace(ring, mx.float32)
    store = PrefixStore("weights", LARGE)
    store.put(SPACE, prompt(1, 2, 3, 4), holding(prompt(1, 2, 3, 4)), 0)
    assert store.match(SPACE, prompt(1, 2, 3, 4), ring=(50, 3)).length == 48  # within the window
    assert store.match(SPACE, prompt(1, 2, 3, 4)).length == 64


def test_what_must_be_kept_apart_is(tiny: Qwen3ForCausalLM) -> None:
    cache = make_cache(tiny)
    spaces = [
        namespace(cache, mx.float32),
        namespace(cache, mx.bfloat16),
        namespace(make_cache(tiny, kv_bits=8), mx.float32),
        namespace(make_cache(tiny, kv_bits=4), mx.float32),
        namespace(cache, mx.float32, adapter="a"),
        namespace(cache, mx.float32, salt="a"),
        namespace(make_cache(random_model(vocab_size=98)), mx.float32),
    ]
    assert len(set(spaces)) == len(spaces)
    store = PrefixStore("weights", LARGE)
    store.put(spaces[0], prompt(1, 2), holding(prompt(1, 2)), 0)
    assert [store.match(space, prompt(1, 2)).length for space in spaces] == [32, 0, 0, 0, 0, 0, 0]


def test_the_fingerprint_is_asked_for_once_and_only_if_needed() -> None:
    asked: list[str] = []

    def fingerprint() -> str:
        asked.append("weights")
        return asked[-1]

    store = PrefixStore(fingerprint, LARGE)
    assert asked == []
    put(store, 1)
    assert length(store, 1) == 1
    store.match(SPACE + "x", prompt(1))
    assert asked == ["weights"]


def test_the_last_token_is_never_found() -> None:
    store = PrefixStore("weights", LARGE)
    put(store, 1, 2)
    assert store.match(SPACE, prompt(1, 2, tail=0)).length == 16
    assert store.match(SPACE, prompt(1, 2, tail=1)).length == 32
    assert store.match(SPACE, []).length == 0
    assert store.match(SPACE, [1]).length == 0


def test_the_least_recently_used_goes_first_and_leaves_before_what_they_go_on_from() -> None:
    store = PrefixStore("weights", 5 * SIZE)
    put(store, 1, 2, 3)
    put(store, 1, 4)
    assert store.nbytes == 4 * SIZE
    put(store, 5, 6)  # 3 goes: the leaf of what was used first
    assert [length(store, 5, 6), length(store, 1, 4), length(store, 1, 2, 3)] == [2, 2, 2]
    put(store, 7, 8)  # 6, for 5 was used as late as 6
    assert store.nbytes == 5 * SIZE
    assert [length(store, 7, 8), length(store, 5, 6), length(store, 1, 2)] == [2, 0, 2]


def test_a_prompt_beyond_the_capacity_keeps_its_front() -> None:
    store = PrefixStore("weights", 3 * SIZE)
    put(store, 9)
    pin = put(store, 1, 2, 3, 4, 5, pin=False)
    assert (pin.length, store.nbytes, store.held_nbytes) == (3 * BLOCK, 3 * SIZE, 3 * SIZE)
    assert [length(store, 1, 2, 3, 4), length(store, 9)] == [3, 0]
    pin = put(store, 1, 2, 3, 4, 5)
    assert (pin.length, store.nbytes, store.held_nbytes) == (5 * BLOCK, 3 * SIZE, 5 * SIZE)
    assert length(store, 1, 2, 3, 4, 5) == 5


def test_with_no_capacity_only_what_is_pinned_is_found() -> None:
    store = PrefixStore("weights", 0)
    assert not store.keeps
    pin = put(store, 1, 2)
    assert (store.nbytes, store.held_nbytes) == (0, 2 * SIZE)
    assert length(store, 1, 2, 3) == 2
    del pin
    assert store.held_nbytes == 0
    assert length(store, 1, 2) == 0
    assert put(store, 1, 2, pin=False).length == 0


def test_a_match_holds_its_blocks() -> None:
    store = PrefixStore("weights", LARGE)
    put(store, 1, 2)
    match = store.match(SPACE, prompt(1, 2))
    assert store.shrink(LARGE) == 0
    assert (store.nbytes, store.held_nbytes) == (0, 2 * SIZE)
    assert_right(match, prompt(1, 2))
    del match
    assert store.held_nbytes == 0


def test_shrink_counts_what_is_free_and_passes_over_what_is_pinned() -> None:
    store = PrefixStore("weights", LARGE)
    pin = put(store, 1, 2)
    put(store, 3, 4)
    assert store.shrink(1) == SIZE
    assert length(store, 3, 4) == 1
    assert store.shrink(0) == 0
    assert store.shrink(LARGE) == SIZE
    assert store.nbytes == 0
    assert pin.length == 32
    assert length(store, 1, 2) == 2


def test_what_a_running_reply_has_as_well_goes_first() -> None:
    store = PrefixStore("weights", LARGE)
    put(store, 1, 2)
    put(store, 1, 3)
    put(store, 4, 5)
    store.demote(SPACE, prompt(1, 3))
    assert store.shrink(1) == SIZE
    assert [length(store, 4, 5), length(store, 1, 2), length(store, 1, 3)] == [2, 2, 1]
    store.demote(SPACE, prompt(4, 5))
    assert store.shrink(2 * SIZE) == 2 * SIZE
    assert [length(store, 4, 5), length(store, 1, 2)] == [0, 2]


def test_memory_goes_by_reference_counts_and_no_chain_is_too_long() -> None:
    store, cache = PrefixStore("weights", LARGE), make_cache(TINY)
    tokens = [1] * 16 * 20_000
    for layer in cache:
        layer.keys = layer.values = (mx.zeros((1, 2, len(tokens), 1)),)
    cache.placement.offsets = [len(tokens)]
    gc.disable()
    try:
        pin = store.put(SPACE, tokens, cache, 0)
        assert pin.length == len(tokens)
        held = store.held_nbytes
        store.clear()
        assert (store.nbytes, store.held_nbytes) == (0, held)
        del pin
        assert store.held_nbytes == 0
    finally:
        gc.enable()


def test_equal_blocks_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []
    real = take_blocks

    def counted(cache: KVCache, row: int, start: int, stop: int) -> Any:
        taken.append((start, stop))
        return real(cache, row, start, stop)

    monkeypatch.setattr("mlxqwen.cache.prefix_store.take_blocks", counted)
    store = PrefixStore("weights", LARGE)
    put(store, 1, 2)
    put(store, 1, 2, 3)
    put(store, 1, 4)
    put(store, 1)
    assert taken == [(0, 32), (32, 48), (16, 32)]


@contextmanager
def colliding(hashes: int) -> Iterator[None]:
    """As few different hashes."""
    real = chain_module._hash
    chain_module._hash = lambda data: bytes([zlib.crc32(data) % hashes]) * 16
    try:
        yield
    finally:
        chain_module._hash = real


@pytest.mark.parametrize("hashes", [1, 2, 5])
def test_a_hash_alone_is_not_believed(hashes: int) -> None:
    with colliding(hashes):
        store = PrefixStore("weights", LARGE)
        for symbols in [(1, 2, 3), (2, 1), (1, 3), (3,), (2, 2, 2, 2), (1, 2, 4)]:
            put(store, *symbols)
            assert length(store, *symbols) <= len(symbols)
            for other in [(1, 2, 3), (2, 1, 1), (4, 4), (2, 2, 1), (1, 2, 4)]:
                length(store, *other)
            assert store.held_nbytes == store.nbytes  # none hides another
        assert store.match(SPACE + "x", prompt(1, 2)).length == 0


@pytest.mark.parametrize("capacity", [-1, 1.5, "2GB", True, None])
def test_a_capacity_that_is_no_number_of_bytes_is_refused(capacity: Any) -> None:
    with pytest.raises(OptionError, match="expected a number of bytes"):
        PrefixStore("weights", capacity)


def test_a_match_fills_no_cache_of_another_kind(tiny: Qwen3ForCausalLM) -> None:
    store = PrefixStore("weights", LARGE)
    put(store, 1, 2)
    with pytest.raises(CacheError, match="another kind of cache"):
        store.match(SPACE, prompt(1, 2)).fill(make_cache(tiny, kv_bits=8))


Prefix = tuple[int, ...]
CAPACITY = 5


class Store(RuleBasedStateMachine):
    """Beside a list of prefixes, the one used last at its end."""

    symbols = st.lists(st.integers(1, 2), max_size=4).map(tuple)

    @initialize(capacity=st.sampled_from([0, 1, CAPACITY, 100]))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.store = PrefixStore("weights", capacity * SIZE + SIZE // 2)
        self.kept: list[Prefix] = []
        self.pins: list[tuple[Prefix, Pin]] = []

    def alive(self) -> set[Prefix]:
        ends = [*self.kept, *(prefix for prefix, _ in self.pins)]
        return {end[: n + 1] for end in ends for n in range(len(end))}

    def use(self, prefix: Prefix) -> None:
        for n in range(len(prefix), 0, -1):
            if prefix[:n] in self.kept:
                self.kept.remove(prefix[:n])
            self.kept.append(prefix[:n])
        del self.kept[: max(0, len(self.kept) - self.capacity)]

    def found(self, prefix: Prefix) -> Prefix:
        alive = self.alive()
        n = next((n for n in range(len(prefix)) if prefix[: n + 1] not in alive), len(prefix))
        return prefix[:n]

    @rule(prefix=symbols, pin=st.booleans())
    def put(self, prefix: Prefix, pin: bool) -> None:
        kept = prefix if pin else prefix[: self.capacity]
        held = put(self.store, *prefix, pin=pin)
        assert held.length == BLOCK * len(kept)
        if pin:
            self.use(kept)
            self.pins.append((kept, held))
        else:
            self.use(self.found(kept))
            self.use(kept)

    @rule(prefix=symbols, extra=st.integers(0, 3))
    def match(self, prefix: Prefix, extra: int) -> None:
        tokens = prompt(*prefix, tail=extra)
        usable = prefix if extra else prefix[:-1]
        match = self.store.match(SPACE, tokens)
        expected = self.found(usable)
        assert match.length == BLOCK * len(expected)
        assert_right(match, tokens)
        self.use(expected)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.pins:
            self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))

    @rule(blocks=st.integers(0, 3))
    def shrink(self, blocks: int) -> None:
        freed = 0
        while freed < blocks and self.kept:
            before = len(self.alive())
            self.kept.pop(0)
            freed += before - len(self.alive())
        assert self.store.shrink(blocks * SIZE) == freed * SIZE

    @rule(prefix=symbols)
    def demote(self, prefix: Prefix) -> None:
        self.store.demote(SPACE, prompt(*prefix))
        for n in range(1, len(prefix) + 1):
            is_needed = any(other[:n] == prefix[:n] and other != prefix[: len(other)] for other in self.kept)
            if prefix[:n] in self.kept and not is_needed:
                self.kept.remove(prefix[:n])
                self.kept.insert(0, prefix[:n])

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.kept = []

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "store"):
            assert self.store.nbytes == len(self.kept) * SIZE <= self.store.capacity
            assert self.store.held_nbytes == len(self.alive()) * SIZE

    @invariant()
    def parents_outlast_their_children(self) -> None:
        if hasattr(self, "store"):
            for place, prefix in enumerate(self.kept):
                assert len(prefix) == 1 or prefix[:-1] in self.kept[place + 1 :]


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
