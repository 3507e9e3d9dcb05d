"""One model that answers: an engine under a name, ready for the requests of a server."""

from __future__ import annotations

from mlxqwen.engine.chat_request import Responder
from mlxqwen.engine.engine import Engine
from mlxqwen.server.settings import ServerSettings
from mlxqwen.server.wakeups import Wakeups

__all__ = ["ServedModel"]


class ServedModel:
    """One engine under its name.

    Args:
        name: what clients call it.
        engine: what answers; its thread takes the steps from now on.
        settings: the server's.
        limit_scales: whether the limit that a request gives counts in the choice of its YaRN factor, where the model
            scales by request. Without, the reply ends with the context of the factor that its prompt asks for.

    Attributes:
        name, engine, limit_scales: as given.
        responder: makes requests from conversations.
        wakeups: wakes those who wait for its replies.
        context: the most tokens of a prompt and its reply; None where a window slides over them.

    Raises:
        OptionError: a `max_model_len` that the model has no room for.
    """

    def __init__(self, name: str, engine: Engine, settings: ServerSettings, *, limit_scales: bool = True) -> None:
        self.name = name
        self.engine = engine
        self.limit_scales = limit_scales
        self.context = settings.context(engine.model.config)
        self.responder = Responder(engine.model, engine.tokenizer, engine.speculative, engine.draft_tokens)
        self.wakeups = Wakeups(engine.scheduler)
        self.wakeups.start()

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has."""
        return self.engine.model.config.vocab_size

    def close(self) -> None:
        """Wake nobody any more."""
        self.wakeups.close()
