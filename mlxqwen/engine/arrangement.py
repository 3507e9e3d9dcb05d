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

    A batch whose next forward pass is queued stays as it is.
    """
    parts = [part for batch in batches for part in ([batch, *_split(batch)] if batch.may_change else [batch])]
    arranged: list[RunningBatch] = []
    for batch in sorted((part for part in parts if part.rows), key=lambda part: part.number):
        partner = next((other for other in arranged if _may_merge(other, batch, has_room)), None)
        if partner is None:
            arranged.append(batch)
        else:
            partner.merge([batch])
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


def _may_merge(one: RunningBatch, other: RunningBatch, has_room: Callable[[Sequence[RunningBatch]], bool]) -> bool:
    if not (one.may_merge and other.may_merge) or (one.drawn is None) != (other.drawn is None):
        return False
    if one.owner is not None or other.owner is not None:
        return one.owner is other.owner
    is_alike = one.kind == other.kind and padding_is_small([*_slots(one), *_slots(other)])
    return is_alike and has_room([one, other])


def _slots(batch: RunningBatch) -> list[int]:
    """Slots that each row needs, as buffers are allocated."""
    return [slots_to_allocate(offset, batch.cache.max_kv_size) for offset in batch.cache.offsets]
