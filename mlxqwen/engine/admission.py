"""Admission: which waiting prompts are read together, and in which caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mlxqwen.cache import KVCache
from mlxqwen.cache.placement import slots_to_allocate
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.prefill import Prefill, read_together
from mlxqwen.engine.request import CacheKind

__all__ = ["groups_of", "new_prefill"]


def groups_of(admitted: Sequence[Generation], chunk_of: Callable[[Generation], int]) -> Iterator[list[Generation]]:
    """Group prompts that are read together: of one kind of cache, about equally long, and all in one chunk.

    Args:
        admitted: they begin now.
        chunk_of: the most tokens of prompts of one kind that are read at once.
    """
    kinds: dict[object, list[Generation]] = {}
    owners: dict[int, list[Generation]] = {}
    for one in admitted:
        request, slots = one.request, slots_to_allocate(len(one.text) + 1, one.request.cache.max_kv_size)
        if one.own_cache is not None:
            owners.setdefault(id(one.own_cache), []).append(one)
        else:
            alone = one.number if one.lacks_prompt_logprobs else None
            kinds.setdefault((request.cache, request.adapter, request.prefill_chunk, slots, alone), []).append(one)
    for several in owners.values():
        yield from _groups_behind(several, chunk_of(several[0]))
    for several in kinds.values():
        unread = [len(one.text) - (one.match.length if one.match else 0) for one in several]
        together = chunk_of(several[0])
        if any(one.fills_window for one in several):
            together = 1  # each apart, as it may have to stop on its way to keep its window
        for group in read_together(unread, together):
            yield [several[place] for place in group]


def new_prefill(generations: list[Generation]) -> Prefill:
    """Make a prefill with a new cache, filled with the blocks that the store has for each prompt; evaluated."""
    if generations[0].own_cache is not None:
        return _prefill_behind(generations, generations[0].own_cache)
    kind = generations[0].request.cache
    assert isinstance(kind, CacheKind)
    filled = []
    for one in generations:
        cache = kind.make(one.model)
        if one.match is not None and one.match.length:
            one.match.fill(cache, joins=len(generations) > 1)
        one.match = None
        filled.append(cache)
    cache = filled[0]
    if len(filled) > 1:
        cache = kind.make(generations[0].model, len(filled))
        if any(one.offset for one in filled):
            cache.assemble([(one, [0]) for one in filled])
    return Prefill(generations, cache)


def _groups_behind(several: list[Generation], chunk: int) -> Iterator[list[Generation]]:
    """Group prompts that follow one caller's cache: together if they are all its rows and fit one chunk."""
    first = several[0]
    rows = [one.request.cache_row for one in several]
    known = first.request.cached_tokens or 0
    longest = max(len(one.text) - known for one in several)
    fits = len(several) * longest <= chunk
    if first.own_cache is not None and rows == list(range(first.own_cache.batch_size)) and fits:
        yield several
    else:
        yield from ([one] for one in several)


def _prefill_behind(several: list[Generation], owner: KVCache) -> Prefill:
    """Make the prefill of prompts that follow the caller's cache: of all its rows, or of one of them."""
    first = several[0]
    row = first.request.cache_row
    if first.request.cached_tokens is not None and row == 0:
        owner.trim(first.request.cached_tokens)
    if row is not None and len(several) == owner.batch_size:
        return Prefill(several, owner, owner)
    cache = owner.like(1)
    if row is not None and owner.offset:
        cache.assemble([(owner, [row])])
    return Prefill(several, cache, owner)
