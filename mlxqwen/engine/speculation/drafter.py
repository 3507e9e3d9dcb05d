"""Drafters: what guesses the next tokens, and how many guesses are worth a pass of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from mlxqwen.errors import OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.model.given import given_kind
from mlxqwen.sampling.sampler import Sampler

__all__ = ["DraftLength", "Drafter", "Speculative", "as_drafter", "check_vocabulary"]


@runtime_checkable
class Drafter(Protocol):
    """Guesses how a text continues. A wrong guess costs time and changes nothing else."""

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> list[int]:
        """Guess at most `count` tokens that may follow `text`; fewer, or none, if they are unlikely to be right.

        Args:
            text: ids of prompt and reply. One reply passes the same list each time, and the list only grows.
            count: at least 1.
            sampler: the reply's sampler, in its state at the first of these tokens; it must be left in that state.
        """
        ...


Speculative: TypeAlias = Literal["lookup"] | Drafter | None
"""What guesses: the text itself, a `DraftModel`, anything else that proposes tokens, or nothing."""


def as_drafter(speculative: object, config: ModelConfig | None = None) -> Drafter:
    """The drafter that `speculative` means. Raises `OptionError` for no drafter, or one of another vocabulary."""
    if isinstance(speculative, Drafter) and not isinstance(speculative, type):  # a class has the method, too
        draft = getattr(speculative, "model", None)
        if config is not None and draft is not None:
            check_vocabulary(draft.config, config)
        return speculative
    if speculative == "lookup":
        from mlxqwen.engine.speculation.prompt_lookup import PromptLookup

        return PromptLookup()
    found = repr(speculative) if isinstance(speculative, str | int) else given_kind(speculative)
    raise OptionError(
        f"speculative: found {found}, expected 'lookup', a DraftModel or None",
        hint="A draft model is DraftModel(model), of a model that load returns.",
    )


def check_vocabulary(draft: ModelConfig, model: ModelConfig) -> None:
    """Check that a draft model has the vocabulary of the model. Raises `OptionError`."""
    found, expected = draft.vocab_size, model.vocab_size
    if found != expected:
        raise OptionError(
            f"draft model: found a vocabulary of {found:,} tokens, expected the model's own of {expected:,}",
            hint="Take a smaller model of the same family, which shares its tokenizer.",
        )


class DraftLength:
    """The length of the next draft: twice the last one if it was right, else one more than its tokens that were right.

    After a wrong draft of one token there is a pause, twice as long as the pause before.

    Args:
        most: tokens of the longest draft.
    """

    _FIRST, _LONGEST_PAUSE = 4, 16

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = min(self._FIRST, most)
        self._pause = self._left = 0

    def next(self) -> int:
        """Tokens to draft now. 0 during a pause; each call takes one step of the pause."""
        if self._left:
            self._left -= 1
            return 0
        return self._length

    def record(self, drafted: int, accepted: int) -> None:
        """Record how many tokens of a draft were right."""
        if accepted == drafted:
            self._length = min(self._most, max(self._length, 2 * drafted))
        else:
            self._length = min(self._most, accepted + 1)
        if accepted:
            self._pause = 0
        elif drafted == 1:
            self._pause = self._left = min(self._LONGEST_PAUSE, 2 * self._pause or 1)
