"""Which running replies share a batch: as few batches as possible, each with little padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mlxqwen.cache.placement import slots_to_allocate
from mlxqwen.engine.running import RunningBatch

__all__ = ["arrange", "padding_is_small"]


def padding_is_small(lengths: Sequence[int]) -> bool:
    """Whether rows of these lengths, in buffers as long as the longest, leave less than a quarter unused."""
    return 4 * sum(lengths) > 3 * len(lengths) * max(lengths)


def arrange(batches: Iterable[RunningBatch], has_room: Callable[[Sequence[RunningBatch]], bool]) -> list[RunningBatch]:
    """Arrange rows anew: parked ones apart, long ones apart from short ones, all others together.

    A batch whose next forward pass is queued stays as it is. Rows that come together are copied once, as far as memory
    allows.
    """
    parts = [part for batch in batches for part in ([batch, *_split(batch)] if batch.may_change else [batch])]
    groups: list[list[RunningBatch]] = []
    for batch in sorted((part for part in parts if part.rows), key=lambda part: part.number):
        group = next((group for group in groups if _are_alike([*group, batch])), None)
        if group is None:
            groups.append([batch])
        else:
            group.append(batch)
    arranged: list[RunningBatch] = []
    for first, *others in groups:
        while others and not has_room([first, *others]):
            arranged.append(others.pop())
        if others:
            first.merge(others)
        arranged.append(first)
    for batch in arranged:
        batch.adopt()
    return arranged


def _split(batch: RunningBatch) -> list[RunningBatch]:
    """Take out the parked rows, and the shortest rows while padding is large → the new batches."""
    taken = []
    if any(one is None for one in batch.generations):
        return []  # its handle has gone since the step began; the next one drops the row
    parked = [place for place, one in enumerate(batch.generations) if one is not None and one.is_parked]
    if 0 < len(parked) < len(batch.rows):
        taken.append(batch.take(parked))
    lengths = _slots(batch)
    if not padding_is_small(lengths):
        taken.append(batch.take([place for place, length in enumerate(lengths) if 4 * length <= 3 * max(lengths)]))
        taken += _split(taken[-1])
    return taken


def _are_alike(batches: Sequence[RunningBatch]) -> bool:
    """Whether the rows of all these batches may share one, if memory allows it."""
    first = batches[0]
    if not all(one.may_merge and (one.drawn is None) == (first.drawn is None) for one in batches):
        return False
    if any(one.owner is not None for one in batches):
        return all(one.owner is first.owner for one in batches)
    is_one_kind = all(one.kind == first.kind for one in batches)
    return is_one_kind and padding_is_small([slots for one in batches for slots in _slots(one)])


def _slots(batch: RunningBatch) -> list[int]:
    """Slots that each row needs, as buffers are allocated."""
    return [slots_to_allocate(offset, batch.cache.max_kv_size) for offset in batch.cache.offsets]
