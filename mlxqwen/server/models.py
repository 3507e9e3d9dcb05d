"""The models that a server answers with, by name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlxqwen.engine.chat_request import Responder
from mlxqwen.engine.engine import Engine
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import shown
from mlxqwen.server.errors import ApiError
from mlxqwen.server.settings import ServerSettings
from mlxqwen.server.wakeups import Wakeups

__all__ = ["Models", "ServedModel"]


class ServedModel:
    """One engine under its name.

    Args:
        name: what clients call it.
        engine: what answers; its thread takes the steps from now on.
        settings: the server's.

    Attributes:
        name, engine: as given.
        created: when it was loaded, in seconds since 1970.
        responder: makes requests from conversations.
        wakeups: wakes those who wait for its replies.
        context: the most tokens of a prompt and its reply; None where a window slides over them.

    Raises:
        OptionError: a `max_model_len` that the model has no room for.
    """

    def __init__(self, name: str, engine: Engine, settings: ServerSettings) -> None:
        self.name = name
        self.engine = engine
        self.created = int(time.time())
        self.responder = Responder(engine.model, engine.tokenizer, engine.speculative, engine.draft_tokens)
        self.wakeups = Wakeups(engine.scheduler)
        self.wakeups.start()
        room = engine.model.config.context_length
        slides = settings.max_kv_size is not None and settings.max_kv_size <= room
        if settings.max_model_len is not None and settings.max_model_len > room and not slides:
            raise OptionError(
                f"max_model_len: found {settings.max_model_len:,}, but the model's context is {room:,} tokens",
                hint="Extend it with --yarn auto or --yarn-factor, slide over it with --max-kv-size, or ask for less.",
            )
        self.context = settings.max_model_len if slides else min(room, settings.max_model_len or room)

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has."""
        return self.engine.model.config.vocab_size

    def described(self) -> dict[str, Any]:
        """The model as `GET /v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mlxqwen",
            "root": self.name,
            "parent": None,
            "max_model_len": self.context,
        }

    def close(self) -> None:
        """Wake nobody any more."""
        self.wakeups.close()


class Models:
    """The models of a server.

    Args:
        served: at least one.
        single: whether any name, and none, means the first.
    """

    def __init__(self, served: Sequence[ServedModel], *, single: bool) -> None:
        self._served = {model.name: model for model in served}
        self._single = single

    @property
    def all(self) -> list[ServedModel]:
        """Every model, the default one first."""
        return list(self._served.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of this name. Raises `ApiError`: 404 if there is none, 400 without a name."""
        if name is not None and name in self._served:
            return self._served[name]
        if self._single:
            return self.all[0]
        if name is None:
            found = f"model: found none, expected one of {', '.join(self._served)}"
            raise ApiError(400, found, code="missing_required_parameter", param="model")
        raise ApiError(
            404,
            f"model: found {shown(name)}, expected one of {', '.join(self._served)}",
            code="model_not_found",
            param="model",
        )
