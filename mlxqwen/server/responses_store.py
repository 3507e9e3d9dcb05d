"""The responses that later ones may follow: a bounded number of them, in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mlxqwen.server.background import Background
from mlxqwen.server.event_stream import to_json

__all__ = ["ResponseStore", "RunningResponse", "StoredResponse"]

_MOST = 1000
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that is over.

    Args:
        response: as it was sent.
        items: what was put in, with ids.
        messages: the whole conversation, its answer included, without instructions.
        nbytes: what it takes.
        events: of its stream, if it ran in the background.
    """

    response: dict[str, Any]
    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    nbytes: int
    events: Sequence[bytes] = ()


class RunningResponse(Protocol):
    """A response that is on its way."""

    def shown(self) -> dict[str, Any]:
        """The response, as far as it has come."""

    def input_items(self) -> list[dict[str, Any]]:
        """What was put in, with ids."""

    def cancel(self) -> dict[str, Any]:
        """End it → the response, as far as it has come."""

    def forget(self) -> None:
        """End it, and do not keep it."""

    @property
    def background(self) -> Background | None:
        """What it runs as, if it does so in the background."""


class ResponseStore:
    """Keeps responses; those that were used least lately go first. One thread, that of the loop, uses it.

    Args:
        most, most_bytes: how many, and how large all together.

    Attributes:
        running: the responses that are on their way, by id.
    """

    def __init__(self, most: int = _MOST, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._nbytes = 0
        self.running: dict[str, RunningResponse] = {}

    def keep(self, response: dict[str, Any], items: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
        """Keep a response that is over."""
        nbytes = sum(len(to_json(part)) for part in (response, items, messages))
        self._kept[response["id"]] = StoredResponse(response, items, messages, nbytes)
        self._nbytes += nbytes
        self._make_room()

    def keep_events(self, response_id: str, events: Sequence[bytes]) -> None:
        """Keep the events of a response, if it is kept itself."""
        stored = self._kept.get(response_id)
        if stored is not None:
            nbytes = sum(map(len, events))
            self._kept[response_id] = replace(stored, events=events, nbytes=stored.nbytes + nbytes)
            self._nbytes += nbytes
            self._make_room()

    def _make_room(self) -> None:
        while len(self._kept) > self._most or (self._nbytes > self._most_bytes and self._kept):
            _, dropped = self._kept.popitem(last=False)
            self._nbytes -= dropped.nbytes

    def find(self, response_id: str) -> StoredResponse | None:
        """The response of this id, if it is kept."""
        if response_id in self._kept:
            self._kept.move_to_end(response_id)
        return self._kept.get(response_id)

    def drop(self, response_id: str) -> bool:
        """Forget a response → whether it was kept."""
        stored = self._kept.pop(response_id, None)
        self._nbytes -= 0 if stored is None else stored.nbytes
        return stored is not None
