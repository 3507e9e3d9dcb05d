"""The models of a server by name: loaded when they are asked for, within memory, and unloaded when nobody uses them.

A name stands for the weights of one folder or hub id. An adapter by name will be an entry of its own that shares the
engine of its base, and whose requests carry the adapter. Leases, loads and memory share one lock and the same entries,
so they stand in one file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from mlxqwen.device import current_device
from mlxqwen.engine.memory import account, give_back
from mlxqwen.engine.scheduler import EVALUATION, Scheduler
from mlxqwen.errors import MlxqwenError, one_line
from mlxqwen.files.aliases import known_alias
from mlxqwen.files.json_file import shown
from mlxqwen.server.errors import ApiError, load_error
from mlxqwen.server.leases import Entry, Lease, ModelSource
from mlxqwen.server.models import ServedModel
from mlxqwen.server.settings import ServerSettings

__all__ = ["ModelRegistry"]

_Allows = Callable[[int], bool]
"""Whether weights of so many bytes may be loaded now."""

logger = logging.getLogger("mlxqwen.server")

_POLL = 0.05  # seconds between looks whether a model is still wanted
_MOST_AHEAD = 3  # loads that go ahead of one that waits: each may keep it waiting for as long as it takes
_SPARE_SHARE = 8  # one part in so many of the memory is left for caches, as far as unloading idle models leaves it


class ModelRegistry:
    """The models of a server. Any thread may call it; one thread of its own loads them, others fetch their files.

    That thread unloads what nobody has used for long, and what a load needs the memory of; a reply that needs memory
    unloads in the thread that asks for it.

    Args:
        sources: the models by name, the default one first; nothing is loaded yet.
        settings: the server's.
        force: whether models are loaded where they do not fit beside those in use.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        sources: Iterable[ModelSource],
        settings: ServerSettings,
        *,
        force: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._force = force
        self._clock = clock
        self._entries = {one.name: Entry(one.name, one, clock()) for one in sources}
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[Entry] = deque()
        self._thread: threading.Thread | None = None
        self._fetching: dict[Entry, threading.Thread] = {}
        self._one_fetches = threading.Lock()  # progress of several would stand in one line, and each took longer
        self._is_closed = False
        self._releases = 0
        account().lenders.append(self)

    def add(self, model: ServedModel) -> None:
        """Serve a model that is loaded already, and stays the caller's: it is not unloaded."""
        entry = Entry(model.name, None, self._clock())
        entry.model = model
        self._entries[model.name] = entry

    @property
    def entries(self) -> list[Entry]:
        """All names, the default one first."""
        return list(self._entries.values())

    @property
    def loaded(self) -> list[ServedModel]:
        """The models that are loaded."""
        return [model for entry in self.entries if (model := entry.model) is not None]

    def count(self) -> dict[str, int]:
        """How many models are in each state."""
        states = [entry.state for entry in self.entries]
        return {state: states.count(state) for state in ("loaded", "loading", "unloaded")}

    def find(self, name: str | None) -> Entry:
        """The model of this name, hub id or alias. Raises `ApiError`: 404 if there is none, 400 without a name."""
        names = ", ".join(self._entries)
        if name is not None:
            if name in self._entries:
                return self._entries[name]
            wanted = {name, known_alias(name)}
            for entry in self.entries:
                if entry.source is not None and entry.source.repo_id in wanted - {None}:
                    return entry
        if self._settings.single:
            return self.entries[0]
        if name is None:
            found = f"model: found none, expected one of {names}"
            raise ApiError(400, found, code="missing_required_parameter", param="model")
        raise ApiError(
            404, f"model: found {shown(name)}, expected one of {names}", code="model_not_found", param="model"
        )

    def lease(self, entry: Entry, room: int = 0) -> Lease:
        """Use a model. If it is not there, its load begins behind those that were asked for before.

        Args:
            entry: the model's.
            room: bytes of a cache that has no room beside the weights that are there: others are unloaded, those in use
                behind their last replies.
        """
        with self._changed:
            lease = Lease(entry, self.release, room)
            if entry.model is not None and not entry.is_leaving and not room and not self._is_wanted(entry):
                lease.held = entry.model
                entry.users.add(lease)
                return lease
            if self._is_closed:
                raise _closing()
            self._begin_wait(lease)
            if entry.loading is None:
                entry.loading = Future()
                entry.loading.set_running_or_notify_cancel()  # one who waits no more ends it for nobody else
                self._begin(entry)
            lease.loading = entry.loading
            return lease

    def release(self, lease: Lease) -> None:
        """End a use; called once or more."""
        with self._changed:
            entry = lease.entry
            if lease.held is None:
                if entry.waiting == {lease}:
                    self._note_wait(entry, ", in vain")
                entry.waiting.discard(lease)
                self._changed.notify_all()
                return
            lease.held = None
            self._releases += 1
            entry.users.discard(lease)
            entry.last_used = self._clock()
            if self._settings.keep_alive is not None and entry.source is not None:
                self._wake()
            self._changed.notify_all()

    def load(self, entry: Entry) -> ServedModel:
        """Load a model in this thread, before the server listens. Raises `MlxqwenError`."""
        if entry.model is None:
            entry.model = self._loaded(entry)
            entry.last_used = self._clock()
            if self._settings.keep_alive is not None:
                with self._changed:
                    self._wake()
        return entry.model

    def unload_idle(self) -> float | None:
        """Unload the models that nobody has used for the server's `keep_alive` → seconds until the next is due."""
        keep_alive = self._settings.keep_alive
        if keep_alive is None:
            return None
        for entry in self._idle():
            if self._seconds_left(entry, keep_alive) <= 0:
                self._unload(entry, f"not used for {keep_alive:g} s")
        return min((self._seconds_left(entry, keep_alive) for entry in self._idle()), default=None)

    def _seconds_left(self, entry: Entry, keep_alive: float) -> float:
        return entry.last_used + keep_alive - self._clock()

    def lend(self, borrower: Scheduler) -> bool:
        """Called in a step of another model's that needs memory: unload a model that nobody uses, if there is one."""
        others = [one for one in self._idle() if one.model is not None and one.model.engine.scheduler is not borrower]
        return bool(others) and self._unload(others[0], "memory for replies")

    def lendable_bytes(self, borrower: Scheduler) -> int:
        """Bytes of the weights of all other models that may be unloaded, also once they are used no more."""
        with self._changed:
            models = [one.model for one in self.entries if one.source is not None and one.model is not None]
        schedulers = [model.engine.scheduler for model in models]
        weights = sum(scheduler.weight_bytes for scheduler in schedulers if scheduler is not borrower)
        return weights + sum(account().reserved.values())

    def close(self, seconds: float = 0.5) -> bool:
        """End all models that were loaded here → whether no load is still under way after `seconds`."""
        with suppress(ValueError):  # it was closed before
            account().lenders.remove(self)
        with self._changed:
            self._is_closed = True
            for entry in (*self._queue, *self._fetching):
                self._fail(entry, _closing())
            self._queue.clear()
            self._changed.notify_all()
            threads = [one for one in (self._thread, *self._fetching.values()) if one is not None]
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(seconds)
        for entry in self.entries:
            with self._changed:
                model, entry.model = entry.model, None
            if model is not None and entry.source is None:
                model.close()
            elif model is not None:
                _end(model)
        return not any(thread.is_alive() for thread in threads)

    def _begin_wait(self, lease: Lease) -> None:
        """Let a request wait; the log says so of the first one."""
        entry = lease.entry
        if not entry.waiting:
            entry.waited = 0, self._clock()
            why = "which is not loaded" if entry.model is None else "whose memory another model is to have"
            name = one_line(entry.name)
            logger.info("a request waits for %s", f"memory beside {name}" if lease.room else f"{name}, {why}")
        count, began = entry.waited
        entry.waited = count + 1, began
        entry.waiting.add(lease)

    def _note_wait(self, entry: Entry, how: str = "") -> None:
        """Log that requests wait no more, if any did."""
        count, began = entry.waited
        if entry.waiting:
            requests = "1 request" if count == 1 else f"{count:,} requests"
            logger.info("%s waited for %s for %.1f s%s", requests, one_line(entry.name), self._clock() - began, how)

    # Threads that fetch files: a download of hours keeps no other model from being loaded

    def _begin(self, entry: Entry) -> None:
        if entry.model is not None or entry.source is None or entry.source.fetch is None:
            self._queue.append(entry)
            self._wake()
            return
        name = f"mlxqwen files of {entry.name}"
        self._fetching[entry] = threading.Thread(
            target=self._fetch, args=(entry, entry.source.fetch), name=name, daemon=True
        )
        self._fetching[entry].start()

    def _fetch(self, entry: Entry, fetch: Callable[[], object]) -> None:
        """Have a model's files here, then queue its load; what goes wrong is told those who wait for it."""
        wrong: BaseException | None = None
        try:
            with self._one_fetches:
                if entry.waiting and not self._is_closed:
                    logger.info("%s: looking for its files", one_line(entry.name))
                    fetch()
        except BaseException as error:
            wrong = error
        with self._changed:
            del self._fetching[entry]
            if self._is_closed:  # those who waited have been told
                return
            if wrong is not None:
                self._fail(entry, self._told(entry, wrong))
            else:
                self._queue.append(entry)
                self._wake()

    # The thread that loads

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlxqwen models", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            releases, due = self._releases, self.unload_idle()
            with self._changed:
                if self._is_closed:
                    return
                if not self._queue:
                    if releases == self._releases:  # else what is due may be another
                        self._changed.wait(due)
                    continue
                entry = self._queue.popleft()
            self._serve(entry)

    def _serve(self, entry: Entry, ahead: _Allows | None = None) -> bool:
        """Load a model for those who wait for it; what goes wrong is told them alone → whether it was put off.

        Args:
            entry: the model's.
            ahead: of one that goes ahead of another which waits: whether its weights may be loaded. If not, it is
                put off, and those who wait for it still do.
        """
        loaded = None
        try:
            if ahead is None:
                self._wait_while_wanted(entry)
            if entry.model is not None and any(lease.room for lease in entry.waiting):
                self._make_room(entry, 0)
            if entry.model is None and entry.waiting:
                began = self._clock()
                logger.info("%s: loading", one_line(entry.name))
                loaded = self._loaded(entry, ahead)
                logger.info("%s: ready after %.1f s", one_line(entry.name), self._clock() - began)
            self._hand_out(entry, loaded)
        except _NotAheadError:
            return True
        except BaseException as error:
            if loaded is not None:
                _end(loaded)
            with self._changed:
                self._fail(entry, self._told(entry, error))
        finally:
            if ahead is None:
                with self._changed:
                    for one in self.entries:
                        one.is_leaving = False
        return False

    def _hand_out(self, entry: Entry, loaded: ServedModel | None) -> None:
        """Give those who wait their model: it is in use before another thread may unload it."""
        with self._changed:
            if self._is_closed:
                raise _closing()
            if loaded is not None:
                entry.model = loaded
            if entry.model is None and entry.waiting:  # it has gone since it was looked at
                self._queue.appendleft(entry)
                return
            self._note_wait(entry)
            for lease in entry.waiting:
                lease.held = entry.model
            entry.users |= entry.waiting
            entry.waiting.clear()
            entry.last_used = self._clock()
            loading, entry.loading = entry.loading, None
        if loading is not None:
            loading.set_result(None)

    def _fail(self, entry: Entry, error: ApiError) -> None:
        self._note_wait(entry, ", in vain")
        entry.waiting.clear()
        loading, entry.loading = entry.loading, None
        if loading is not None:
            loading.set_exception(error)

    def _told(self, entry: Entry, error: BaseException) -> ApiError:
        """The error for those who wait; the log has what they are not told."""
        if not entry.waiting and isinstance(error, ApiError):  # it was left because nobody waits, or the server ends
            return error
        unexpected = None if isinstance(error, MlxqwenError | ApiError) else error
        logger.error("%s: cannot be loaded: %s", one_line(entry.name), error, exc_info=unexpected)
        location = "" if entry.source is None else entry.source.location
        return load_error(error, entry.name, location)

    def _loaded(self, entry: Entry, ahead: _Allows | None = None) -> ServedModel:
        source = entry.source
        if source is None:
            raise ApiError(503, f"model: {shown(entry.name)} is closed, expected an open one", code="engine_closed")
        try:
            engine = source.load(lambda nbytes: self._reserve(entry, nbytes, ahead))
        finally:
            account().reserved.pop(entry.name, None)
        try:
            if self._is_closed:
                raise _closing()
            return ServedModel(entry.name, engine, self._settings, limit_scales=source.limit_scales)
        except BaseException:
            engine.close()
            raise

    def _idle(self) -> list[Entry]:
        """The models that may be unloaded at once, the least recently used first."""
        with self._changed:
            idle = [one for one in self.entries if one.source is not None and one.model is not None and not one.users]
        return sorted(idle, key=lambda one: one.last_used)

    def _unload(self, entry: Entry, why: str) -> bool:
        """Let a model go that nobody uses → whether it has gone."""
        with self._changed:
            if entry.users or entry.model is None:
                return False
            model, entry.model = entry.model, None
            entry.known_context = model.context
        _end(model)
        del model
        give_back()
        logger.info("%s: unloaded: %s", one_line(entry.name), why)
        return True

    def _is_wanted(self, entry: Entry) -> bool:
        """Whether a reply of another model waits for this one's memory."""
        return (
            entry.source is not None and entry.model is not None and account().is_wanted(entry.model.engine.scheduler)
        )

    def _wait_while_wanted(self, entry: Entry) -> None:
        """Wait until the model has gone for the reply that needs its memory, or is needed no more."""
        self._wait(entry, lambda: not self._is_wanted(entry), entry, account().claimed, _POLL)

    def _wait(
        self,
        entry: Entry,
        is_over: Callable[[], bool],
        going: Entry,
        needed: Callable[[], int],
        seconds: float | None = None,
    ) -> None:
        """Wait in the thread that loads; a few loads that fit go ahead meanwhile, but for what is waited for.

        Args:
            entry: the model's that is to be handed out.
            is_over: whether the wait is.
            going: the model's that is to go.
            needed: bytes that have to fit once it has gone.
            seconds: between looks; None where all that matters is told.
        """
        left = _MOST_AHEAD
        put_off: set[Entry] = set()  # each is tried once, as stores give way even where that does not suffice
        spare = current_device().usable_memory // _SPARE_SHARE

        def would_fit(nbytes: int) -> bool:
            model, promised, most = going.model, self._promised_room(entry), account().most()
            gone = 0 if model is None else model.engine.scheduler.weight_bytes
            return nbytes + promised + spare <= most and nbytes + promised + needed() <= most + gone

        def goes_ahead(nbytes: int) -> bool:
            nonlocal left
            is_ahead = would_fit(nbytes) and self._has_room(entry, nbytes + spare)
            left -= is_ahead
            return is_ahead

        while True:
            with self._changed:
                if is_over() or not entry.waiting or self._is_closed:
                    return
                place = self._place_ahead(would_fit, put_off) if left else None
                if place is None:
                    self._changed.wait(seconds)
                    continue
                ahead = self._queue[place]
                del self._queue[place]
            if self._serve(ahead, goes_ahead):
                put_off.add(ahead)
                self._put_back(ahead, place)

    def _place_ahead(self, would_fit: _Allows, put_off: set[Entry]) -> int | None:
        """The place in the queue of the first load that may go ahead, as far as is known, and was not put off."""
        for place, entry in enumerate(self._queue):
            is_load = entry.model is None and bool(entry.waiting) and entry not in put_off
            if is_load and (entry.weight_bytes is None or would_fit(entry.weight_bytes)):
                return place
        return None

    def _put_back(self, entry: Entry, place: int) -> None:
        """Queue a load that was put off where it stood: what came meanwhile stands behind it."""
        with self._changed:
            if self._is_closed:
                self._fail(entry, _closing())
            else:
                self._queue.insert(place, entry)

    def _reserve(self, entry: Entry, nbytes: int, ahead: _Allows | None = None) -> None:
        """Free memory for a model's weights, which counts as theirs from now on."""
        entry.weight_bytes = nbytes
        if ahead is None:
            self._make_room(entry, nbytes)
        elif not ahead(nbytes):
            raise _NotAheadError
        account().reserved[entry.name] = nbytes

    def _make_room(self, entry: Entry, nbytes: int) -> None:
        """Free memory for a model's weights, some for its caches, and all that a prompt needs beside them.

        Stores give way first, then models that nobody uses, then, for weights and prompts alone, those that are in use:
        no further request gets them, and they are unloaded behind their last reply. What does not fit an empty machine
        is refused before this is called.

        Args:
            entry: the model's.
            nbytes: of its weights; 0 if they are there.
        """
        wanted = nbytes + (current_device().usable_memory // _SPARE_SHARE if nbytes else 0)
        while not self._has_room(entry, wanted):
            idle = [one for one in self._idle() if one is not entry]
            if not idle:
                break
            self._unload(idle[0], f"memory for {entry.name}")
        while not self._force and not self._has_room(entry, nbytes):
            with self._changed:
                used = [one for one in self.entries if one.source and one.model and one is not entry]
                if not used:
                    return
                leaving = min(used, key=lambda one: one.last_used)
                leaving.is_leaving = True
            self._wait(entry, partial(_is_unused, leaving), leaving, lambda: nbytes)
            with self._changed:
                if not entry.waiting or self._is_closed:
                    raise ApiError(503, "model: not asked for any more", code="server_shutdown")
            self._unload(leaving, f"memory for {entry.name}")

    def _has_room(self, entry: Entry, nbytes: int) -> bool:
        """Whether `nbytes` fit, with room beside all weights for the largest prompt that was promised some."""
        return nbytes + self._promised_room(entry) <= account().most() and _have_given_way(nbytes)

    def _promised_room(self, entry: Entry) -> int:
        """Bytes of the largest prompt that was promised room, or waits for the model."""
        with self._changed:
            promised = {*entry.waiting, *(lease for one in self.entries for lease in one.users)}
        return max((lease.room for lease in promised), default=0)


def _is_unused(entry: Entry) -> bool:
    return not entry.users


class _NotAheadError(Exception):
    """A load has no room beside what is waited for."""


def _have_given_way(nbytes: int) -> bool:
    """Let the stores of all models give way until `nbytes` are free → whether they are."""
    with EVALUATION:
        return account().shrink_stores(nbytes)


def _end(model: ServedModel) -> None:
    model.close()
    model.engine.close()


def _closing() -> ApiError:
    return ApiError(503, "server: ends, expected no new requests", code="server_shutdown")
