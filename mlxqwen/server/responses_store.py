"""The responses that later ones may follow: a bounded number of them, in memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from mlxqwen.server.event_stream import to_json

__all__ = ["ResponseStore", "StoredResponse"]

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
    """

    response: dict[str, Any]
    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    nbytes: int


class Cancellable(Protocol):
    """A response that is on its way."""

    def cancel(self) -> dict[str, Any]:
        """End it → the response, as far as it has come."""


class ResponseStore:
    """Keeps responses; those that were used least lately go first. One thread, that of the loop, uses it.

    Args:
        most, most_bytes: how many, and how large all together.

    Attributes:
        running: what ends the responses that are on their way, by id.
    """

    def __init__(self, most: int = _MOST, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._nbytes = 0
        self.running: dict[str, Cancellable] = {}

    def keep(self, response: dict[str, Any], items: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
        """Keep a response that is over."""
        nbytes = sum(len(to_json(part)) for part in (response, items, messages))
        self._kept[response["id"]] = StoredResponse(response, items, messages, nbytes)
        self._nbytes += nbytes
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
