"""Files of a model that are fetched while other models are loaded, and what ends that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from mlxqwen.errors import HubError
from mlxqwen.server.errors import ApiError
from mlxqwen.server.leases import Lease, ModelSource
from mlxqwen.server.registry import ModelRegistry
from mlxqwen.server.settings import ServerSettings
from mlxqwen.text.tokenizer import Tokenizer
from tests.asgi_calls import PATIENCE
from tests.several_models import Weights


class Files:
    """Files that come when a test lets them."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.fetches = 0

    def __call__(self) -> None:
        self.fetches += 1
        self.begun.set()
        assert self.may_end.wait(PATIENCE)
        if self.error is not None:
            raise self.error


class Served:
    """Models `far` and `farther`, whose files have to come, and `near`, whose files are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.files = {"far": Files(), "farther": Files()}
        names = ("far", "farther", "near")
        self.weights = {name: Weights(tokenizer) for name in names}
        sources = [ModelSource(name, self.weights[name], fetch=self.files.get(name)) for name in names]
        self.models = ModelRegistry(sources, ServerSettings())

    def lease(self, name: str) -> Lease:
        return self.models.lease(self.models.find(name))


@pytest.fixture
def served(tokenizer: Tokenizer) -> Iterator[Served]:
    made = Served(tokenizer)
    yield made
    for files in made.files.values():
        files.may_end.set()
    assert made.models.close(PATIENCE)


def test_a_download_keeps_no_model_from_being_loaded(served: Served) -> None:
    far = served.lease("far")
    assert far.loading is not None
    assert served.files["far"].begun.wait(PATIENCE)
    near = served.lease("near")
    assert near.loading is not None
    near.loading.result(PATIENCE)
    assert (near.model.name, served.models.find("far").state) == ("near", "loading")
    second = served.lease("far")
    served.files["far"].may_end.set()
    far.loading.result(PATIENCE)
    assert far.model is second.model
    assert (served.files["far"].fetches, served.weights["far"].loads) == (1, 1)


def test_one_download_at_a_time(served: Served) -> None:
    leases = [served.lease("far"), served.lease("farther")]
    begun = [served.files[name].begun for name in ("far", "farther")]
    first = 0 if begun[0].wait(PATIENCE) else 1
    assert not begun[1 - first].wait(0.05)
    for files in served.files.values():
        files.may_end.set()
    for lease in leases:
        assert lease.loading is not None
        lease.loading.result(PATIENCE)
        assert lease.model.name == lease.entry.name


def test_a_download_that_fails_is_told_and_tried_again(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("mlxqwen.server"), "propagate", True)
    files = served.files["far"]
    files.error = HubError("Qwen/x: nothing came for 20 seconds")
    files.may_end.set()
    lease = served.lease("far")
    assert lease.loading is not None
    with pytest.raises(ApiError) as told:
        lease.loading.result(PATIENCE)
    assert told.value.status == 503
    assert "far: cannot be loaded: Qwen/x: nothing came for 20 seconds" in caplog.messages
    assert (served.models.find("far").state, served.weights["far"].loads) == ("unloaded", 0)
    files.error = None
    again = served.lease("far")
    assert again.loading is not None
    again.loading.result(PATIENCE)
    assert again.model.name == "far"


def test_what_nobody_waits_for_any_more_is_not_loaded(served: Served) -> None:
    lease = served.lease("far")
    assert served.files["far"].begun.wait(PATIENCE)
    lease.release()
    served.files["far"].may_end.set()
    assert lease.loading is not None
    lease.loading.result(PATIENCE)
    assert (served.models.find("far").state, served.weights["far"].loads) == ("unloaded", 0)


def test_the_servers_end_is_told_at_once(served: Served) -> None:
    leases = [served.lease("far"), served.lease("farther")]
    assert served.files["far"].begun.wait(PATIENCE) or served.files["farther"].begun.wait(PATIENCE)
    assert not served.models.close(0.01)
    for lease in leases:
        assert lease.loading is not None
        with pytest.raises(ApiError) as told:
            lease.loading.result(PATIENCE)
        assert (told.value.status, told.value.code) == (503, "server_shutdown")
    for files in served.files.values():
        files.may_end.set()
    assert served.models.close(PATIENCE)
    assert sum(files.fetches for files in served.files.values()) == 1
    assert not any(weights.loads for weights in served.weights.values())
