"""A name that a server knows, its model while that is loaded, and the use of it by a request."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from mlxqwen.engine.engine import Engine
from mlxqwen.engine.loading import MakeRoom
from mlxqwen.files.json_file import shown
from mlxqwen.server.errors import ApiError
from mlxqwen.server.models import ServedModel

__all__ = ["Entry", "Lease", "ModelSource"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the model of a name comes from.

    Args:
        name: what clients call it.
        load: makes its engine; called by a thread of the registry's.
        location: folder or hub id, which errors tell the log and no client.
        repo_id: its hub id, which clients may call it by, too.
        context: the most tokens of a prompt and its reply, if that is known before it is loaded.
        limit_scales: see `ServedModel`.
        fetch: has its files on this machine before it is loaded, which may take hours; called by a thread of its own.
    """

    name: str
    load: Callable[[MakeRoom], Engine]
    location: str = ""
    repo_id: str | None = None
    context: int | None = None
    limit_scales: bool = True
    fetch: Callable[[], object] | None = None


class Entry:
    """A name of the registry's and what is known of its model.

    Args:
        name: what clients call it.
        source: where its model comes from; None for one that is loaded already and stays.
        now: by the registry's clock.

    Attributes:
        created: when the server began to serve it, in seconds since 1970.
        model: what answers; None while it is not loaded.
        users: the leases that have the model.
        waiting: those that are to have it.
        waited: how many have waited since one began to, and when that was by the registry's clock.
        loading: ends with its load; its files are being fetched, or it is queued or under way.
        weight_bytes: of its weights, once a load has come so far; None before.
        is_leaving: whether another model needs its memory, so that no further request gets it.
        last_used: by the registry's clock.
    """

    def __init__(self, name: str, source: ModelSource | None, now: float) -> None:
        self.name = name
        self.created = int(time.time())
        self.model: ServedModel | None = None
        self.known_context = None if source is None else source.context
        self.source = source
        self.users: set[Lease] = set()
        self.waiting: set[Lease] = set()
        self.waited = (0, now)
        self.loading: Future[None] | None = None
        self.weight_bytes: int | None = None
        self.is_leaving = False
        self.last_used = now

    @property
    def state(self) -> str:
        """`loaded`, `loading` or `unloaded`."""
        if self.model is not None and not (self.is_leaving and self.waiting):
            return "loaded"  # also where a prompt waits for more memory beside it
        return "unloaded" if self.loading is None else "loading"

    @property
    def context(self) -> int | None:
        """The most tokens of a prompt and its reply; None where it is not known yet, or a window slides."""
        if self.model is not None:
            self.known_context = self.model.context
        return self.known_context

    def described(self) -> dict[str, object]:
        """The model as `GET /v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mlxqwen",
            "root": self.name,
            "parent": None,
            "max_model_len": self.context,
            "state": self.state,
        }


class Lease:
    """The use of a model by one request: until it is released, the model stays.

    Args:
        entry: the model's.
        release: ends the use; may be called again.
        room: bytes for the cache of a prompt that does not fit beside the weights that are there; 0 for none.

    Attributes:
        room: as given, until the prompt has been read.
        held: the model, once it is there, until the use ends.
        loading: ends once `model` can be asked for; None if it can be at once.
    """

    def __init__(self, entry: Entry, release: Callable[[Lease], None], room: int = 0) -> None:
        self.entry = entry
        self.room = room
        self._release = release
        self.held: ServedModel | None = None
        self.loading: Future[None] | None = None

    @property
    def model(self) -> ServedModel:
        """The model. Raises `ApiError` if it is not there."""
        if self.held is None:
            raise ApiError(503, f"model: {shown(self.entry.name)} is not loaded, expected it to be")
        return self.held

    def release(self) -> None:
        """Use the model no more."""
        self._release(self)
