"""Loads that go ahead of one that waits for memory: those that fit, a few, and none that would keep it waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from mlxqwen.engine.engine import Engine
from mlxqwen.engine.loading import MakeRoom
from mlxqwen.engine.memory import MemoryAccount, weight_bytes
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.errors import ApiError
from mlxqwen.server.leases import Lease, ModelSource
from mlxqwen.server.registry import ModelRegistry
from mlxqwen.server.settings import ServerSettings
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import PATIENCE
from tests.conftest import random_model
from tests.scheduling import machine

BIG = 8  # times the smallest weights
SMALL = dict.fromkeys("abcd", 1)


@pytest.fixture(autouse=True)
def _no_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.server.registry._SPARE_SHARE", 1 << 40)


class Served:
    """Models by name, and how often each was begun to load.

    Args:
        sizes: how many times the smallest weights each has.

    Attributes:
        loads: that came to their end.
        broken: whose load fails.
        is_broken_late: whether it does once it has memory, else before.
    """

    def __init__(self, tokenizer: Tokenizer, sizes: Mapping[str, int]) -> None:
        self.begun = dict.fromkeys(sizes, 0)
        self.loads: list[str] = []
        self.broken = ""
        self.is_broken_late = False
        self.put_off = threading.Event()
        sources = [ModelSource(name, self._loader(tokenizer, name, size)) for name, size in sizes.items()]
        self.models = ModelRegistry(sources, ServerSettings())

    def _loader(self, tokenizer: Tokenizer, name: str, size: int) -> Callable[[MakeRoom], Engine]:
        def load(make_room: MakeRoom) -> Engine:
            self.begun[name] += 1
            if name == self.broken and not self.is_broken_late:
                raise ValueError(name)
            made = model_of(tokenizer, size)
            try:
                make_room(weight_bytes(made))
            except ApiError:
                raise
            except Exception:
                self.put_off.set()
                raise
            if name == self.broken:
                raise ValueError(name)
            self.loads.append(name)
            return Engine(made, tokenizer)

        return load

    def lease(self, name: str) -> Lease:
        return self.models.lease(self.models.find(name))

    def loaded(self, name: str) -> Lease:
        """The use of a model, once it is there."""
        return there(self.lease(name))


def there(lease: Lease) -> Lease:
    if lease.loading is not None:
        lease.loading.result(PATIENCE)
    assert lease.held is not None
    return lease


def model_of(tokenizer: Tokenizer, size: int) -> Qwen3ForCausalLM:
    """A model whose vocabulary, and with it nearly all that it takes, is so many times the tokenizer's."""
    return random_model(vocab_size=size * tokenizer.vocab_size, context=512, layers=1)


@contextmanager
def served(tokenizer: Tokenizer, room: float, sizes: Mapping[str, int]) -> Iterator[Served]:
    """Where beside the first model there is room for the weights of so many of the smallest."""
    first = model_of(tokenizer, next(iter(sizes.values())))
    with machine(first, int(room * weight_bytes(model_of(tokenizer, 1)))):
        made = Served(tokenizer, sizes)
        try:
            yield made
        finally:
            assert made.models.close(PATIENCE)


def test_what_fits_beside_what_is_waited_for_goes_ahead(tokenizer: Tokenizer) -> None:
    sizes = {"used": BIG, "waits": BIG, "a": 1, "b": 1, "c": 1}
    with served(tokenizer, 2.5, sizes) as made:
        used = made.loaded("used")
        waits = made.lease("waits")
        there(made.lease("a")).release()
        b = made.loaded("b")
        c = made.lease("c")  # which has no room
        assert made.put_off.wait(PATIENCE)
        assert waits.loading is not None
        assert not waits.loading.done()
        assert c.loading is not None
        assert not c.loading.done()
        used.release()
        there(waits).release()
        there(c).release()
        b.release()
        assert made.begun == {"used": 1, "waits": 1, "a": 1, "b": 1, "c": 2}


def test_what_would_keep_the_other_waiting_does_not(tokenizer: Tokenizer) -> None:
    sizes = {"used": BIG, "waits": BIG + 3, "a": 1}
    with served(tokenizer, 2.8, sizes) as made:  # room for `a` now, and not once `waits` is there
        used = made.loaded("used")
        waits, a = made.lease("waits"), made.lease("a")
        assert made.put_off.wait(PATIENCE)
        assert a.loading is not None
        assert not a.loading.done()
        used.release()
        there(waits).release()
        there(a)
        assert made.begun == {"used": 1, "waits": 1, "a": 2}


def test_no_more_than_a_few_go_ahead(tokenizer: Tokenizer) -> None:
    sizes = {"used": BIG, "waits": BIG, **SMALL}
    with served(tokenizer, 4.5, sizes) as made:
        used = made.loaded("used")
        waits = made.lease("waits")
        for name in "abc":
            there(made.lease(name)).release()
        d = made.lease("d")
        assert waits.loading is not None
        assert d.loading is not None
        assert not d.loading.done()
        used.release()
        there(waits)
        there(d)
        assert list(made.begun.values()) == [1] * 6


def test_loads_that_are_put_off_keep_their_places_and_take_none_of_those_that_go_ahead(tokenizer: Tokenizer) -> None:
    large = ("first", "second", "third")  # how large, is known once they are put off
    with served(tokenizer, 4.5, {"used": BIG, "waits": BIG, **dict.fromkeys(large, BIG), **SMALL}) as made:
        used = made.loaded("used")
        waits, put_off = made.lease("waits"), [made.lease(name) for name in large]
        for name in "abc":
            there(made.lease(name)).release()
        d = made.lease("d")
        assert not any(one.loading is None or one.loading.done() for one in (waits, d, *put_off))
        used.release()
        for one in (waits, *put_off, d):
            there(one).release()
        assert made.loads == ["used", "a", "b", "c", "waits", *large, "d"]
        assert made.begun == {"used": 1, "waits": 1, **dict.fromkeys(large, 2), **SMALL}


@pytest.mark.parametrize("has_room", [False, True])
def test_a_load_that_fails_takes_a_place_only_once_it_has_memory(tokenizer: Tokenizer, has_room: bool) -> None:
    with served(tokenizer, 4.5, {"used": BIG, "waits": BIG, "broken": 1, **SMALL}) as made:
        made.broken, made.is_broken_late = "broken", has_room
        used = made.loaded("used")
        waits, broken = made.lease("waits"), made.lease("broken")
        assert broken.loading is not None
        with pytest.raises(ApiError):
            broken.loading.result(PATIENCE)
        leases = [made.lease(name) for name in SMALL]
        gone_ahead = 2 if has_room else 3
        for lease in leases[:gone_ahead]:
            there(lease).release()
        assert [made.begun[name] for name in SMALL] == [1, 1, not has_room, 0]
        used.release()
        for lease in (waits, *leases[gone_ahead:]):
            there(lease).release()


def test_who_waits_behind_a_model_that_a_reply_wants_to_go(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tokenizer, 2.5, dict.fromkeys("abc", 1)) as made:
        made.loaded("a").release()
        entry = made.models.find("a")
        assert entry.model is not None
        wanted = entry.model.engine.scheduler
        monkeypatch.setattr(MemoryAccount, "is_wanted", lambda self, scheduler: scheduler is wanted)
        monkeypatch.setattr(MemoryAccount, "claimed", lambda self: weight_bytes(model_of(tokenizer, 1)))
        a = made.lease("a")
        there(made.lease("b")).release()
        assert a.loading is not None
        assert not a.loading.done()
        monkeypatch.setattr(MemoryAccount, "is_wanted", lambda self, scheduler: False)
        there(a).release()
        assert made.begun == {"a": 1, "b": 1, "c": 0}


def test_the_end_is_told_who_waits_and_who_is_queued_behind(tokenizer: Tokenizer) -> None:
    with served(tokenizer, 0.5, {"used": BIG, "waits": BIG, "a": 1}) as made:
        made.loaded("used")
        leases = [made.lease("waits"), made.lease("a")]
        assert made.put_off.wait(PATIENCE)
        made.models.close(PATIENCE)
        for lease in leases:
            assert lease.loading is not None
            with pytest.raises(ApiError) as told:
                lease.loading.result(PATIENCE)
            assert told.value.code == "server_shutdown"
