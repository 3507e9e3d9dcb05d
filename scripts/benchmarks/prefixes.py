"""What is read again from the prefix store and the disk tier: finding blocks, copying them, restoring them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from benchmarks.batches import few_layers
from benchmarks.clock import now
from benchmarks.comparison import Comparison, take_turns
from benchmarks.settings import Settings
from benchmarks.sides import Ours, prompt_ids, seconds_to_first_token
from mlxqwen.cache import KVCache, make_cache
from mlxqwen.cache.blocks import BLOCK
from mlxqwen.cache.disk_tier import DiskTier
from mlxqwen.cache.prefix_store import PrefixStore

__all__ = ["prefix"]

_HELD = 4096  # tokens of a hit in memory
_RESTORED = 16_384  # tokens of a hit on disk
_READ = 1024  # tokens that are read by the model; the rest of them would take longer
_LOOKUP_BOUND = 50.0  # µs a block
_CAPACITY = 1 << 33
_SPACE = "benchmark"


def prefix(settings: Settings) -> Iterator[Comparison]:
    """A hit in memory, beside a bound and beside a plain copy; one on disk, beside reading the tokens."""
    name, _, folder = few_layers(settings, None)
    ours = Ours.load(folder)
    yield from _in_memory(settings, name, ours.model)
    yield from _on_disk(settings, name, ours)


def _in_memory(settings: Settings, name: str, model: Any) -> Iterator[Comparison]:
    store, tokens = PrefixStore("weights", _CAPACITY), prompt_ids(_HELD + 1)
    cache = _filled(model, _HELD)
    store.put(_SPACE, tokens, cache, 0)
    nbytes, blocks = cache.nbytes, _HELD // BLOCK
    half = mx.zeros(nbytes // 8, dtype=mx.float32)
    mx.eval(half)
    del cache
    settings.tell("prefix store: a hit")
    turns = settings.turns(9)

    def look_up() -> object:
        return store.match(_SPACE, tokens)

    (lookups,) = take_turns([partial(_seconds, look_up)], turns)
    lookups = [1e6 * seconds / blocks for seconds in lookups]
    what = f"prefix store, {_HELD:,} tokens: finding a block"
    yield Comparison(what, "a bound", "µs", lookups, [_LOOKUP_BOUND] * turns)

    match = store.match(_SPACE, tokens)
    copies = take_turns(
        [
            partial(_seconds, lambda: match.fill(make_cache(model))),
            partial(_seconds, lambda: mx.eval(mx.concatenate([half, half]))),
        ],
        turns,
    )
    what = f"prefix store, {_HELD:,} tokens, {name}: copying a hit of {nbytes / 2**20:.0f} MiB"
    yield Comparison(what, "a plain copy", "ms", *([1e3 * seconds for seconds in side] for side in copies))


def _on_disk(settings: Settings, name: str, ours: Ours) -> Iterator[Comparison]:
    folder, tokens = settings.work / "blocks", prompt_ids(_RESTORED + 1)
    writer = PrefixStore("weights", _CAPACITY, DiskTier(folder, _CAPACITY))
    writer.put(_SPACE, tokens, _filled(ours.model, _RESTORED), 0)
    writer.flush()
    del writer

    def restore() -> None:
        store = PrefixStore("weights", _CAPACITY, DiskTier(folder, _CAPACITY))
        match = store.match(_SPACE, tokens)
        if match.length != _RESTORED:
            raise RuntimeError(f"disk tier: {match.length} tokens came back, expected {_RESTORED}")
        match.fill(make_cache(ours.model))

    read = prompt_ids(_READ)
    settings.tell("disk tier: restoring")
    numbers = take_turns(
        [
            partial(_seconds, restore),
            lambda: seconds_to_first_token(ours, read) * (_RESTORED // _READ),
        ],
        settings.turns(3, quick=1),
    )
    shutil.rmtree(folder)
    what = f"disk tier, {_RESTORED:,} tokens, {name}: restoring, files in the page cache"
    yield Comparison(what, f"{_RESTORED // _READ} times reading {_READ:,}", "s", *numbers)


def _filled(model: Any, tokens: int) -> KVCache:
    """A cache that holds so many tokens' zeros."""
    cache = make_cache(model)
    cache.reserve(tokens)
    mx.eval(model.model(mx.array([[1]]), cache), cache.state)
    cache.placement.offsets = [tokens]
    return cache


def _seconds(work: Callable[[], object]) -> float:
    started = now()
    work()
    return now() - started
