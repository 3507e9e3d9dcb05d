"""What gives the replies to one request the form of its API; OpenAI's signs of life and errors, which most share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Any

from mlxqwen.server.chat_request import Prepared
from mlxqwen.server.errors import ApiError, openai_error
from mlxqwen.server.event_stream import COMMENT, event
from mlxqwen.server.replies import Replies

__all__ = ["Presenter"]


class Presenter(ABC):
    """Gives the replies to one request the form of its API. It is made before the model is there."""

    def begin(self, prepared: Prepared) -> None:  # noqa: B027 - some need nothing of it
        """Take what the request came to, before anything of its replies is asked for."""

    @abstractmethod
    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The reply that is not streamed."""

    @abstractmethod
    def chunks(self, replies: Replies) -> AsyncGenerator[bytes]:
        """The events of the reply that is streamed; empty bytes about every second without any."""

    def comment(self) -> bytes:
        """What says that the reply is on its way, while nothing else does."""
        return COMMENT

    def waiting(self, give_up: Callable[[], object]) -> bytes:
        """What says that the request waits for its model; `give_up` ends that."""
        return self.comment()

    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream with an error."""
        return event(openai_error(error)) + b"data: [DONE]\n\n"

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Nothing further is asked for."""
