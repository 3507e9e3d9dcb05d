"""The loop that owns a model: requests wait, are read, decode together, and end; one step after the other.

A step takes one token for every running reply, or several where one guesses, and reads at most a chunk of the prompts
that wait. What a request gets does not depend on who runs beside it. All parts of a step change the same lists of
replies, so they stand in one file.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxqwen.cache import KVCache
from mlxqwen.cache.prefix_store import PrefixStore
from mlxqwen.device import current_device
from mlxqwen.engine.admission import groups_of, new_prefill
from mlxqwen.engine.arrangement import arrange
from mlxqwen.engine.driver import Driver
from mlxqwen.engine.generation import Generation
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.interrupts import ReadingPace, interrupts_deferred
from mlxqwen.engine.memory import Claim, account, weight_bytes
from mlxqwen.engine.prefill import Prefill
from mlxqwen.engine.prefixes import SharedPrefixes
from mlxqwen.engine.request import Request, check_request, fitting_prefill_chunk, with_yarn_factor
from mlxqwen.engine.room import (
    bytes_to_start,
    crossed,
    grows,
    is_crossed,
    may_begin_anew,
    may_grow,
    may_guess,
    may_merge,
    may_start,
    out_of_memory,
    refuse_if_never,
)
from mlxqwen.engine.running import RunningBatch
from mlxqwen.errors import CacheError, OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.shutdown import NATIVE_WORK

if TYPE_CHECKING:
    from mlxqwen.cache.disk_tier import DiskTier
    from mlxqwen.engine.speculation.draft_model import DraftModel
    from mlxqwen.engine.speculation.guesses import Guesser

logger = logging.getLogger("mlxqwen")

__all__ = ["EVALUATION", "STORE_SHARE", "Scheduler"]

EVALUATION = threading.RLock()
"""Held by the one thread of the process that evaluates."""

DEFAULT_MAX_RUNNING = 256
STORE_SHARE = 8
"""The store takes at most one part in so many of what the device may use, unless another size is asked for."""

_CLEAR_EVERY = 256  # steps
_LOOK_EVERY = 0.25  # seconds between looks at weights while replies run
_MOST_FILLED = 8  # chunks of tokens that are copied from the store in one step


class Scheduler:
    """Requests of one model, from submission to their end.

    `submit` and `cancel` may be called by any thread, `step` by the one that drives; see `mlxqwen.engine.driver`.

    Args:
        model: referred to weakly: a scheduler does not keep its model alive, its handles do.
        max_running: the most replies that decode at once.
        checks_memory: whether requests wait for memory, and are refused where there is too little.

    Attributes:
        max_running, checks_memory: as given.
        weight_bytes: bytes of the model's weights.
        claim: what waits for memory first; None if nothing does.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        *,
        max_running: int = DEFAULT_MAX_RUNNING,
        checks_memory: bool = True,
    ) -> None:
        self._model = weakref.ref(model)
        self._device = current_device()
        self.max_running = max_running
        self.checks_memory = checks_memory
        self.weight_bytes = weight_bytes(model)
        self._prefixes = SharedPrefixes(model, self._device.usable_memory // STORE_SHARE)
        self._chunk = fitting_prefill_chunk(model.config, self._device)
        self._pace = ReadingPace(model.config, self._device)
        self._numbers = count()
        self._submitted: deque[weakref.ref[Generation]] = deque()  # any thread adds
        self._waiting: list[weakref.ref[Generation]] = []
        self._reading: list[weakref.ref[Prefill]] = []
        self._batches: list[weakref.ref[RunningBatch]] = []
        self._drafters: weakref.WeakKeyDictionary[Generation, Guesser] = weakref.WeakKeyDictionary()
        self._owners: weakref.WeakValueDictionary[tuple[int, int], Generation] = weakref.WeakValueDictionary()
        self._steps = 0
        self._is_stepping = False
        self._stepping_thread: threading.Thread | None = None
        self._moved = self._step_began = time.monotonic()  # when a request came, or a step did something
        self.claim: Claim | None = None
        self.is_closed = False
        self.driver = Driver()
        account().add(self)

    @property
    def store(self) -> PrefixStore:
        """The prefix store."""
        return self._prefixes.store

    @property
    def steps(self) -> int:
        """How many steps were begun: where it stands still while there is work, the machine is stuck."""
        return self._steps

    def use_store(self, capacity: int, disk: DiskTier | None = None) -> None:
        """Replace the store by an empty one of `capacity` bytes, with a disk tier."""
        self.check_outside_step()
        with NATIVE_WORK, EVALUATION:
            self._prefixes.use_store(capacity, disk)

    def check_outside_step(self) -> None:
        """Raise `OptionError` if the calling thread is in the middle of a step, as constraints and drafters are."""
        if self._stepping_thread is threading.current_thread():
            raise OptionError(
                "engine: found in use by a constraint or drafter of a reply that it computes",
                hint="Ask it before or after the step, such as in on_prefill, or use another model.",
            )

    @property
    def model(self) -> Qwen3ForCausalLM:
        """The model. Raises `OptionError` if it is gone."""
        model = self._model()
        if model is None:
            raise OptionError("model: found none, as it is not in use any more", hint="Hold the model or its Engine.")
        return model

    def submit(self, request: Request) -> Handle:
        """Take a request → its handle. Any thread may call this; nothing is computed here.

        Raises:
            OptionError, ContextLengthError, CacheError: the model cannot answer it.
            InsufficientMemoryError: its prompt would not fit even if nothing else ran.
        """
        self.check_open()
        model = self.model
        check_request(request, model)
        request = with_yarn_factor(request, model)
        self._refuse_cache_in_use(request)
        refuse_if_never(self, request.cache, len(request.prompt))
        generation = Generation(request, model, next(self._numbers))
        if isinstance(request.cache, KVCache) and request.cache_row is not None:
            self._owners[id(request.cache), request.cache_row] = generation
        self._submitted.append(weakref.ref(generation))
        self._moved = time.monotonic()
        handle = Handle(generation, self)
        self.driver.wake()
        return handle

    def _refuse_cache_in_use(self, request: Request) -> None:
        """Raise `CacheError` for a caller's cache that another reply is made with."""
        if not isinstance(request.cache, KVCache) or request.cache_row is None:
            return
        for (cache, row), other in list(self._owners.items()):
            has_begun = other.prefill is not None or other.batch is not None
            if cache == id(request.cache) and not other.is_over and (has_begun or row == request.cache_row):
                raise CacheError(
                    "cache: found in use by a reply that is not over, expected one that no other reply is made with",
                    hint="Take that reply to its end, or close its iterator; or make another cache.",
                )

    def cancel(self, handle: Handle) -> None:
        """End a request. Any thread may call this; its row leaves in the next step.

        Raises `OptionError` for a handle of another scheduler.
        """
        generation = handle.generation_of(self)
        generation.is_cancelled = True
        batch = generation.batch
        if batch is not None and len(batch.rows) == 1:  # nobody else needs what it holds
            generation.let_go()

    def keep(self, handle: Handle) -> None:
        """Put what a reply has read and generated so far into the store, before it is cancelled.

        Nothing happens unless the calling thread takes the steps, and none is under way: a finalizer may run in one.
        """
        generation = handle.generation_of(self)
        batch = generation.batch
        if batch is None or self._is_stepping or not self.driver.is_mine():
            return
        with NATIVE_WORK, EVALUATION:
            self._keep_said(generation, batch, batch.generations.index(generation))
            self._prefixes.has_looked = False

    def check_open(self) -> None:
        """Raise `OptionError` if the scheduler is closed, or in a forked process."""
        self.driver.check_process()
        if self.is_closed:
            raise OptionError(
                "engine: found a request after close(), expected an open one",
                hint="Load the model again, or close it behind the last request.",
            )

    def close(self) -> None:
        """End all requests with an error, and write new blocks to the disk tier. A forked process does nothing."""
        self.is_closed = True
        if self.driver.is_of_another_process:
            return
        self.check_outside_step()
        account().remove(self)
        with NATIVE_WORK, EVALUATION:
            for one in self._all():
                one.fail(
                    OptionError("engine: closed before this reply was over", hint="Close it behind the last reply.")
                )
            self._submitted.clear()
            self._waiting, self._reading, self._batches = [], [], []
            self.store.flush()
        self.driver.wake()

    @property
    def has_work(self) -> bool:
        """Whether a step may have something to do."""
        for one in (begun := [*self.waiting, *self.running]):
            one.park_if_ahead()
        return bool(self._submitted or self.reading or any(not one.is_parked for one in begun))

    @property
    def idle_seconds(self) -> float:
        """How long nothing was done; 0 in a step."""
        return 0.0 if self._is_stepping else time.monotonic() - self._moved

    @property
    def step_seconds(self) -> float:
        """How long the step that is under way has taken so far; 0 between two."""
        return time.monotonic() - self._step_began if self._is_stepping else 0.0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is work, at most `timeout` seconds → whether there is. For callers of `step`."""
        return self.driver.wait_for_work(self, timeout)

    def fail_all(self, error: BaseException) -> None:
        """End all requests with an error."""
        for one in self._all():
            one.fail(error)

    @property
    def running(self) -> list[Generation]:
        """The generations that decode."""
        return [one for batch in self._alive_batches() for one in batch.going]

    @property
    def reading(self) -> list[Generation]:
        """The generations whose prompts are being read."""
        return [one for prefill in self._alive_prefills() for one in prefill.generations]

    @property
    def waiting(self) -> list[Generation]:
        """The generations that have not begun, the next one first."""
        alive = [one for reference in [*self._waiting, *self._submitted] if (one := reference()) is not None]
        return sorted((one for one in alive if not one.is_over), key=lambda one: one.urgency)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches in use, as large as once prompts are read, and of draft models with their caches."""
        caches = {id(one.cache): one.cache.nbytes for one in self._alive_batches()}
        caches |= {id(one.cache): one.nbytes for one in self._alive_prefills()}
        drafters = {id(guesser.drafter): guesser.drafter for guesser in self._drafters.values()}
        return sum(caches.values()) + sum(map(_bytes_of_draft_model, drafters.values()))

    def is_of(self, model: Qwen3ForCausalLM) -> bool:
        """Whether this is the scheduler of `model`."""
        return self._model() is model

    def give_way(self, nbytes: int) -> None:
        """Let the store evict `nbytes`, beginning with blocks that running replies have in their own buffers too."""
        self._prefixes.demote(self.running)
        self.store.shrink(nbytes)

    def _all(self) -> list[Generation]:
        return [*self.waiting, *self.reading, *self.running]

    def _alive_batches(self) -> list[RunningBatch]:
        return [batch for reference in self._batches if (batch := reference()) is not None and batch.rows]

    def _alive_prefills(self) -> list[Prefill]:
        return [one for reference in self._reading if (one := reference()) is not None and one.rows]

    def step(self) -> bool:
        """Take one step → whether anything was done; False if nothing is left to do.

        An exception in a forward pass ends the replies of that pass. An interrupt leaves everything as before.
        """
        with NATIVE_WORK, EVALUATION, self._stepping():
            with interrupts_deferred():
                self._take_submitted()
                self._drop_cancelled()
                before = len(self._waiting) + len(self.reading) + len(self.running)
                tells_progress = self._admit()
                if self._give_up_parked():
                    tells_progress |= self._admit()
            has_read = tells_progress or self._read()  # that a prompt begins is told before its first chunk is read
            decodes = any(not batch.is_parked for batch in self._alive_batches())
            if self._device.overlaps_steps:
                self._queue_ahead()
            with interrupts_deferred():
                batches = self._tell()
            guesser = self._lone(batches)
            for batch in batches:
                if guesser is None or not batch.guess(guesser):
                    batch.advance()
            # One that was let go in the midst of this step has kept others from beginning in it.
            has_moved = has_read or decodes or len(self._all()) < before
        if has_moved:
            self._moved = time.monotonic()
        return has_moved

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        self._steps += 1
        self._step_began = time.monotonic()
        self._is_stepping, self._stepping_thread = True, threading.current_thread()
        self._prefixes.has_looked = False
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            self._is_stepping, self._stepping_thread = False, None
            self._prefixes.has_looked = False
            for batch in self._alive_batches():  # whoever takes the next step may be another thread
                if batch.is_parked or not is_whole:
                    batch.settle()
        if self._steps % _CLEAR_EVERY == 0:
            mx.clear_cache()  # buffers that the cache has outgrown, and that nothing else is large enough for

    # Waiting

    def _take_submitted(self) -> None:
        while self._submitted:
            self._waiting.append(self._submitted.popleft())

    def _drop_cancelled(self) -> None:
        self._waiting = [one for one in self._waiting if (alive := one()) is not None and not alive.is_over]
        for waiting in self.waiting:
            waiting.park_if_ahead()
        for prefill in self._alive_prefills():
            prefill.drop_ended()
        self._reading = [weakref.ref(one) for one in self._alive_prefills()]
        for batch in self._alive_batches():
            generations = batch.generations
            if any(one is None or one.is_over for one in generations):
                batch.drop_ended()
            for one in generations:
                if one is not None:
                    one.park_if_ahead()
        self._batches = [weakref.ref(one) for one in self._alive_batches()]

    def _admit(self) -> bool:
        """Let waiting requests begin, in order, as far as rows and memory allow → whether one tells progress."""
        admitted: list[Generation] = []
        has_looked, waits_for_memory, filled, nbytes = False, False, 0, 0
        # A reply with its caller's cache that is far ahead of its reader keeps no other from running.
        running = len(self.reading) + sum(not (one.is_parked and one.own_cache is not None) for one in self.running)
        for one in self.waiting:
            if one.own_cache is not None:  # its rows begin together
                admitted.append(one)
                nbytes += bytes_to_start(self, one)
                continue
            if one.is_parked:  # it has given up its row
                continue
            if running + len(admitted) >= self.max_running:
                break
            if one.waits_for_reader():  # what it will share is not there yet
                continue
            if is_crossed(self, one):
                one.fail(crossed(one))
                continue
            if not has_looked:
                self._look_at_weights(within=_LOOK_EVERY if running else 0.0)
                has_looked = True
            try:
                one.match = self._prefixes.match(one)
            except Exception as error:
                one.fail(error)
                continue
            filled += one.match.length
            one.reader = self._prefixes.reader_of(one, one.match.length, (*admitted, *self.reading))
            if one.waits_for_reader():
                one.match = None
                continue
            own = bytes_to_start(self, one)
            is_full = filled > _MOST_FILLED * self._chunk and bool(admitted)
            waits_for_memory = not is_full and not may_start(self, one, own, nbytes, self._alive_batches())
            if is_full or waits_for_memory:
                one.match = None
                break
            admitted.append(one)
            nbytes += own
        if not waits_for_memory:
            self.claim = None
        chosen = {id(one) for one in admitted}
        self._waiting = [one for one in self._waiting if id(one()) not in chosen]
        for group in groups_of(admitted, self._chunk_of):
            try:
                self._reading.append(weakref.ref(new_prefill(group)))
            except Exception as error:  # memory ends, or a caller's cache is not as it was
                for one in group:
                    one.fail(error)
        return any(one.request.reports_progress and one.count == 0 for one in admitted)

    def _look_at_weights(self, *, within: float) -> None:
        if self._prefixes.look_at_weights(within=within):
            self.weight_bytes = weight_bytes(self.model)

    # Memory

    def _give_up_parked(self) -> bool:
        """While others wait, take the rows of parked replies → whether there were any."""
        if all(one.is_parked for one in self.waiting):
            return False
        parked = [batch for batch in self._alive_batches() if batch.may_change and batch.is_parked]
        for one in [one for batch in parked for one in batch.going]:
            self._preempt(one)
        return bool(parked)

    def _make_room_to_grow(self, batch: RunningBatch) -> None:
        """Free memory for larger buffers: evict blocks, preempt the least urgent replies, and end the last one."""
        while batch.rows and not may_grow(self, batch):
            begun = [*self.running, *self.reading]
            victim = max((one for one in begun if one.may_begin_anew), key=lambda one: one.urgency, default=None)
            if victim is not None and (len(begun) > 1 or may_begin_anew(self, victim)):
                self._preempt(victim)
                continue
            for one in batch.going:
                one.fail(out_of_memory(one))
            batch.drop_ended()

    def _preempt(self, one: Generation) -> None:
        """Take the row of a reply; it is read again later and continues with the same tokens."""
        batch, prefill = one.batch, one.prefill
        if prefill is not None:  # what it has read is in the store
            one.prefill, prefill.rows = None, []
            self._waiting.append(weakref.ref(one))
            return
        if batch is not None and batch.drawn is not None:  # as it is parked; what is on its way counts
            batch.tell()
            self._finish(batch)
        if batch is None or one.is_over:
            return
        place = [row() for row in batch.rows].index(one)
        self._keep_said(one, batch, place)
        one.sampler = batch.sampler.extract([place])
        mx.eval(one.sampler.arrays)
        one.batch = None
        if len(batch.rows) == 1:
            batch.rows = []
        else:
            batch.keep([other for other in range(len(batch.rows)) if other != place])
        self._waiting.append(weakref.ref(one))

    # Reading

    def _read(self) -> bool:
        """Read at most one chunk: of the first prefill, then of the next ones if they end within the chunk."""
        left = 0
        worked = False
        for prefill in sorted(self._alive_prefills(), key=lambda one: one.urgency):
            generations = prefill.drop_ended()
            if not generations:
                continue
            chunk, rows = self._chunk_of(generations[0]), len(generations)
            if rows > 1:
                chunk = max(chunk, prefill.left)  # they end together, as their first tokens are drawn together
            if not worked:
                left = chunk
            elif prefill.left > left:
                break
            chunk = min(chunk, self._up_to_mark(prefill, generations[0]))
            left -= min(prefill.left, chunk * rows)
            prefill.read(generations, chunk, lambda batch: self._batches.append(weakref.ref(batch)), self._pace)
            worked = True
            with interrupts_deferred():
                self._keep_read(prefill, generations)
        self._reading = [weakref.ref(one) for one in self._alive_prefills()]
        return worked

    def _chunk_of(self, one: Generation) -> int:
        """The most tokens of prompts such as this that are read at once."""
        is_ring = one.request.cache.max_kv_size is not None
        return self._pace.chunk(one.request.prefill_chunk or self._chunk, is_ring=is_ring)

    def _up_to_mark(self, prefill: Prefill, first: Generation) -> int:
        """Tokens up to where a window that slides is to be kept, if the next chunk would pass that place."""
        missing = first.mark - prefill.done() if first.fills_window else 0
        return missing if missing > 0 else 1 << 62

    def _keep_read(self, prefill: Prefill, generations: list[Generation]) -> None:
        """Put what was read into the store, and let a draft model read it too."""
        for row, one in enumerate(generations):
            if not one.is_over:
                self._keep(one, prefill.cache, row, "prompt", at_mark=prefill.done(row) == one.mark)
            is_lone = len(generations) == 1 and all(other is one for other in self.running)
            if is_lone and (drafter := _draft_model(one.request.drafter)) is not None:
                try:
                    drafter.read(one.text, prefill.done())
                except Exception as error:
                    one.fail(error)
        self._make_store_fit()

    def _keep(self, one: Generation, cache: KVCache, row: int, what: str, *, at_mark: bool) -> None:
        """Put a row's text into the store."""
        try:
            self._prefixes.keep(one, cache, row, what, at_mark=at_mark)
        except Exception as error:  # nobody's reply ends because it cannot be stored
            logger.warning("prefix cache: a prompt is not kept: %s", error)

    def _make_store_fit(self) -> None:
        """Let the store evict blocks where memory ends."""
        if self.checks_memory:
            account().make_room(0, self)

    # Decoding

    def _tell(self) -> list[RunningBatch]:
        """Give the tokens drawn in the last step to their replies → the batches that go on."""
        if any(batch.owner not in (None, batch.cache) for batch in self._alive_batches()):
            self._arrange()  # rows of a caller's own cache are there before any of them ends
        told = [batch for batch in self._alive_batches() if not batch.is_parked]
        for batch in told:
            batch.tell()
            self._finish(batch)
        if not told:
            return []
        for batch in self._arrange():
            self._make_room_to_grow(batch)
        return [batch for batch in self._alive_batches() if not batch.is_parked]

    def _queue_ahead(self) -> None:
        """On a GPU, start the next forward passes before the last tokens are read: this hides the host's work."""
        with interrupts_deferred():
            batches = [batch for batch in self._arrange() if not batch.is_parked]
        if self._lone(batches) is None:
            for batch in batches:
                if not grows(batch):  # memory is made sure of first
                    batch.queue_ahead()

    def _finish(self, batch: RunningBatch) -> None:
        """Put ended replies into the store, and drop their rows."""
        for place, one in enumerate(batch.generations):
            if one is not None and one.finish_reason is not None:
                self._keep_said(one, batch, place)
        batch.drop_ended()
        if not (self.running or self.reading):  # writing makes nobody wait
            self.store.flush()

    def _keep_said(self, one: Generation, batch: RunningBatch, place: int) -> None:
        """Put what a reply has read and generated into the store."""
        self._keep(one, batch.cache, place, "reply", at_mark=one.request.holds_cache)
        self._make_store_fit()

    def _arrange(self) -> list[RunningBatch]:
        """Let rows share batches, as far as memory allows longer buffers."""
        arranged = arrange(self._alive_batches(), partial(may_merge, self))
        self._batches = [weakref.ref(batch) for batch in arranged]
        return arranged

    def _lone(self, batches: list[RunningBatch]) -> Guesser | None:
        """The guesser of the only running reply, if it has a drafter; None if others run."""
        if len(batches) != 1 or len(batches[0].rows) != 1:
            return None
        one = batches[0].generations[0]
        if one is None or one.request.drafter is None or one.is_forcing or batches[0].logits is not None:
            return None
        if one.request.logprobs is not None:  # those of each token come from a pass of its own
            return None
        if not may_guess(self, batches[0], one.request.draft_tokens):
            return None
        if one not in self._drafters:
            from mlxqwen.engine.speculation.guesses import Guesser

            self._drafters[one] = Guesser(one.request.drafter, one.request.draft_tokens)
        return self._drafters[one]


def _draft_model(drafter: object) -> DraftModel | None:
    """The drafter, if it is a model."""
    if drafter is None:
        return None
    from mlxqwen.engine.speculation.draft_model import DraftModel

    return drafter if isinstance(drafter, DraftModel) else None


def _bytes_of_draft_model(drafter: object) -> int:
    """Bytes of a draft model's cache, and of its weights if no scheduler of its own counts them."""
    draft = _draft_model(drafter)
    if draft is None:
        return 0
    is_counted = any(one.is_of(draft.model) for one in account().schedulers)
    return draft.nbytes + (0 if is_counted else weight_bytes(draft.model))
