"""The memory that models, caches and stores take, and what is left: one account for all models of a process."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxqwen.cache import KVCache
from mlxqwen.cache.placement import slots_to_allocate
from mlxqwen.device import Device, current_device
from mlxqwen.engine.request import CacheKind
from mlxqwen.errors import InsufficientMemoryError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from mlxqwen.engine.generation import Generation
    from mlxqwen.engine.scheduler import Scheduler

__all__ = [
    "Lender",
    "MemoryAccount",
    "account",
    "array_bytes",
    "buffer_bytes",
    "give_back",
    "slot_bytes",
    "weight_bytes",
]

_WORK_SPACE = 64 * 2**20  # bytes that a chunk of a prompt, or a draw, takes in passing


def slot_bytes(model: Qwen3ForCausalLM, cache: CacheKind | KVCache) -> int:
    """Bytes of one token's keys and values in all layers."""
    config, itemsize = model.config, model.dtype.size
    if cache.kv_bits is None:
        head = config.head_dim * itemsize
    else:
        groups = config.head_dim // config.kv_group_size(cache.kv_group_size)
        head = config.head_dim * cache.kv_bits // 8 + 2 * groups * itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head


def buffer_bytes(model: Qwen3ForCausalLM, cache: CacheKind | KVCache, tokens: int, rows: int = 1) -> int:
    """Bytes of the buffers for `tokens` tokens in each of `rows` rows, as they are allocated."""
    return rows * slots_to_allocate(tokens, cache.max_kv_size) * slot_bytes(model, cache)


def array_bytes() -> int:
    """Bytes of all arrays of this process, those of other models and of callers included."""
    return mx.get_active_memory()


def weight_bytes(model: Qwen3ForCausalLM) -> int:
    """Bytes of all weights."""
    parameters = cast(Any, tree_flatten(cast(Any, model).parameters()))
    return sum(array.nbytes for _, array in parameters)


class Lender(Protocol):
    """Gives memory back for others, such as that of a model that nobody uses."""

    def lend(self, borrower: Scheduler) -> bool:
        """Give some back now, not of the borrower's own model → whether it has."""

    def lendable_bytes(self, borrower: Scheduler) -> int:
        """Bytes that it gives back sooner or later, once nobody uses them."""


class Claim(NamedTuple):
    """What waits for memory first among the replies of one scheduler."""

    generation: weakref.ref[Generation]
    nbytes: int

    @property
    def is_live(self) -> bool:
        """Whether it still waits."""
        one = self.generation()
        return one is not None and not one.is_over and one.prefill is None and one.batch is None


class MemoryAccount:
    """Bytes that weights, caches in use and stores take, of all schedulers that share this machine.

    Args:
        device: says how much may be used in all.

    Attributes:
        lenders: asked, once stores have nothing left, by the scheduler that needs memory.
        reserved: bytes of weights that are being read, by the names of their models.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lenders: list[Lender] = []
        self.reserved: dict[str, int] = {}
        self._schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
        self._lock = threading.RLock()  # models are loaded by another thread than the one that counts

    def add(self, scheduler: Scheduler) -> None:
        """Count what `scheduler` holds, as long as it lives."""
        with self._lock:
            self._schedulers.add(scheduler)

    def remove(self, scheduler: Scheduler) -> None:
        """Count it no more."""
        with self._lock:
            self._schedulers.discard(scheduler)

    @property
    def schedulers(self) -> Iterable[Scheduler]:
        """The schedulers whose memory counts."""
        with self._lock:
            return list(self._schedulers)

    def left(self) -> int:
        """Bytes that are free."""
        return self.most() - sum(one.cache_bytes + one.store.held_nbytes for one in self.schedulers)

    def make_room(self, nbytes: int, first: Scheduler) -> bool:
        """Let stores evict blocks until `nbytes` are free, then lenders give back what they have → whether they are.

        Args:
            nbytes: that are to be free.
            first: needs them; its own store gives way first.
        """
        if self.shrink_stores(nbytes, first):
            return True
        while nbytes > self.left() and any(lender.lend(first) for lender in list(self.lenders)):
            pass
        return nbytes <= self.left()

    def shrink_stores(self, nbytes: int, first: Scheduler | None = None) -> bool:
        """Let stores evict blocks until `nbytes` are free, beginning with that of `first` → whether they are."""
        for one in sorted(self.schedulers, key=lambda one: one is not first):
            missing = nbytes - self.left()
            if missing <= 0:
                return True
            one.give_way(missing)
        return nbytes <= self.left()

    def most(self) -> int:
        """Bytes that caches may take beside the weights that are there, or are being read."""
        weights = sum(one.weight_bytes for one in self.schedulers) + sum(self.reserved.values())
        return self.device.usable_memory - weights - _WORK_SPACE

    def most_ever(self, scheduler: Scheduler) -> int:
        """Bytes that the caches of `scheduler` may take once lenders have given back all they can."""
        return self.most() + sum(lender.lendable_bytes(scheduler) for lender in self.lenders)

    def refuse_if_never(self, nbytes: int, what: str, scheduler: Scheduler) -> None:
        """Raise `InsufficientMemoryError` if `nbytes` would not fit even if nothing else ran."""
        most = self.most_ever(scheduler)
        if nbytes > most:
            raise InsufficientMemoryError(
                f"{what} takes {_size(nbytes)}, expected at most {_size(max(most, 0))}, which this machine has beside "
                "the weights",
                hint="Shorten the prompt, hold fewer tokens (--max-kv-size) or fewer bits of them (--kv-bits 8), or "
                "switch the check off (--force; Engine.load(force=True)).",
            )

    # Who waits for memory. Replies of several schedulers come to it in one order, as those of one scheduler do.

    def has_turn(self, scheduler: Scheduler, one: Generation) -> bool:
        """Whether `one` may take memory: no more urgent reply of another scheduler waits for what caches hold."""
        return all(claim.nbytes > self.most() for claim in self._claims_before(scheduler, one))

    def is_crossed(self, scheduler: Scheduler, one: Generation, nbytes: int) -> bool:
        """Whether `one` and a more urgent reply both wait for weights of each other's model to go."""
        most = self.most()
        return nbytes > most and any(claim.nbytes > most for claim in self._claims_before(scheduler, one))

    def is_wanted(self, scheduler: Scheduler) -> bool:
        """Whether a reply of another scheduler waits for weights to go."""
        most = self.most()
        return any(claim.nbytes > most for claim in self._claims(scheduler))

    def claimed(self) -> int:
        """Bytes of the largest cache that a reply waits for; 0 if none does."""
        return max((claim.nbytes for claim in self._claims()), default=0)

    def _claims(self, but: Scheduler | None = None) -> list[Claim]:
        """The claims of other schedulers that take their steps by themselves: others might never go on."""
        others = [one for one in self.schedulers if one is not but and one.driver.has_daemon]
        return [claim for one in others if (claim := one.claim) is not None and claim.is_live]

    def _claims_before(self, scheduler: Scheduler, one: Generation) -> list[Claim]:
        claims = [(claim, claim.generation()) for claim in self._claims(scheduler)]
        return [claim for claim, other in claims if other is not None and other.rank < one.rank]


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def give_back() -> None:
    """Give the system back what arrays took that nobody refers to any more, such as those of a model that has gone."""
    gc.collect()
    mx.clear_cache()


_account: MemoryAccount | None = None


def account() -> MemoryAccount:
    """The account of this process."""
    global _account
    if _account is None or _account.device is not current_device():
        fresh = MemoryAccount(current_device())
        for scheduler in () if _account is None else _account.schedulers:
            fresh.add(scheduler)
        if _account is not None:
            fresh.lenders, fresh.reserved = _account.lenders, _account.reserved
        _account = fresh
    return _account
