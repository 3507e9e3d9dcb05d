"""Whether memory allows what the replies of a scheduler need next; the store evicts blocks first."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxqwen.cache.placement import slots_to_allocate
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.memory import Claim, account, buffer_bytes
from mlxqwen.engine.request import CacheKind, Request
from mlxqwen.engine.running import RunningBatch
from mlxqwen.errors import InsufficientMemoryError

if TYPE_CHECKING:
    from mlxqwen.engine.scheduler import Scheduler

__all__ = [
    "bytes_to_start",
    "crossed",
    "grows",
    "is_crossed",
    "may_begin_anew",
    "may_grow",
    "may_guess",
    "may_merge",
    "may_start",
    "missing_room",
    "out_of_memory",
    "refuse_if_never",
]


def refuse_if_never(scheduler: Scheduler, cache: object, tokens: int) -> None:
    """Raise `InsufficientMemoryError` for a prompt whose cache would not fit even if nothing else ran."""
    if scheduler.checks_memory and isinstance(cache, CacheKind):
        needed = buffer_bytes(scheduler.model, cache, tokens + 1)
        account().refuse_if_never(needed, f"prompt: its cache of {tokens:,} tokens", scheduler)


def missing_room(scheduler: Scheduler, requests: Sequence[Request]) -> int:
    """Bytes of the largest prompt, if it fits beside the weights of its model alone and not beside all that are there.

    Returns:
        int: 0 if they all fit, or one of them never does.
    """
    kinds = [(one.cache, len(one.prompt)) for one in requests if isinstance(one.cache, CacheKind)]
    if not scheduler.checks_memory or not kinds:
        return 0
    needed = max(buffer_bytes(scheduler.model, cache, tokens + 1) for cache, tokens in kinds)
    return needed if account().most() < needed <= account().most_ever(scheduler) else 0


def bytes_to_start(scheduler: Scheduler, one: Generation) -> int:
    """Bytes of the buffers for a prompt and one step of growth."""
    return buffer_bytes(scheduler.model, one.request.cache, len(one.text) + 1)


def may_start(
    scheduler: Scheduler, one: Generation, nbytes: int, admitted: int, batches: Sequence[RunningBatch]
) -> bool:
    """Whether a prompt of `nbytes` fits, beside the `admitted` bytes of others and one layer of rows that join.

    If not, it is noted that it waits; then no later one of another model is let in before it.
    """
    if not scheduler.checks_memory:
        return True
    shared = account()
    joining = max((batch.cache.nbytes // len(batch.cache) for batch in batches), default=0)
    if shared.has_turn(scheduler, one):
        if shared.make_room(admitted + nbytes + joining, scheduler):
            return True
        is_alone = not admitted and not any(other.cache_bytes for other in shared.schedulers)
        if is_alone and nbytes <= shared.most():
            return True
    scheduler.claim = Claim(weakref.ref(one), nbytes)
    return False


def may_begin_anew(scheduler: Scheduler, one: Generation) -> bool:
    """Whether a scheduler's only reply will have room again, once other models have given some back."""
    shared = account()
    others = [other for other in shared.schedulers if other is not scheduler and other.driver.has_daemon]
    may_come = any(other.cache_bytes for other in others) or any(
        lender.lendable_bytes(scheduler) for lender in shared.lenders
    )
    return may_come and one.may_begin_anew and bytes_to_start(scheduler, one) <= shared.most_ever(scheduler)


def is_crossed(scheduler: Scheduler, one: Generation) -> bool:
    """Whether a reply waits for weights of another model that go only after its own."""
    return scheduler.checks_memory and account().is_crossed(scheduler, one, bytes_to_start(scheduler, one))


def may_merge(scheduler: Scheduler, batches: Sequence[RunningBatch]) -> bool:
    """Whether memory allows buffers for all rows of these batches, with one layer held twice."""
    if not scheduler.checks_memory:
        return True
    cache, rows = batches[0].cache, sum(len(batch.rows) for batch in batches)
    whole = buffer_bytes(scheduler.model, cache, max(batch.cache.offset for batch in batches), rows)
    return whole + whole // len(cache) - sum(batch.cache.nbytes for batch in batches) <= account().left()


def grows(batch: RunningBatch, tokens: int = 1) -> bool:
    """Whether the next tokens need larger buffers."""
    cache = batch.cache
    return slots_to_allocate(cache.offset + tokens, cache.max_kv_size) > cache.capacity


def may_grow(scheduler: Scheduler, batch: RunningBatch, tokens: int = 1) -> bool:
    """Whether memory allows buffers for `tokens` more tokens in each row, with one layer held twice."""
    if not scheduler.checks_memory or not grows(batch, tokens):
        return True
    cache = batch.cache
    needed = buffer_bytes(scheduler.model, cache, cache.offset + tokens, cache.batch_size) - cache.nbytes
    return account().make_room(needed + cache.nbytes // len(cache), scheduler)


def may_guess(scheduler: Scheduler, batch: RunningBatch, most: int) -> bool:
    """Whether memory allows `most` guesses, which may have to be taken back."""
    return may_grow(scheduler, batch, 1 + most)


def crossed(one: Generation) -> InsufficientMemoryError:
    """The error of a reply that crosses an earlier one: see `is_crossed`.

    It could go on only once its own model has been unloaded and loaded again, and this reply is in that model.
    """
    return InsufficientMemoryError(
        f"reply: {one.count:,} tokens behind a prompt of {len(one.request.prompt):,} have outgrown the memory beside "
        "another model, of which an earlier reply waits for the memory of this one's",
        hint="Ask again: the other goes on first, and this one then has its memory.",
    )


def out_of_memory(one: Generation) -> InsufficientMemoryError:
    """The error of a reply that takes all the memory there is."""
    return InsufficientMemoryError(
        f"reply: {one.count:,} tokens behind a prompt of {len(one.request.prompt):,} take all the memory there is",
        hint="Ask for fewer (max_tokens), hold fewer of them (--max-kv-size) or fewer bits of them (--kv-bits 8).",
    )
