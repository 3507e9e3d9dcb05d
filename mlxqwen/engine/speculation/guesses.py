"""One step of a reply with guesses: they are fed in one pass, and those that are right count."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import mlx.core as mx

from mlxqwen.cache.tentative import TentativeStep
from mlxqwen.checks import check_token_ids
from mlxqwen.engine.speculation.draft_model import DraftModel
from mlxqwen.engine.speculation.drafter import Drafter, DraftLength
from mlxqwen.errors import GenerationError
from mlxqwen.sampling.constraint import apply_masks
from mlxqwen.sampling.sampler import Sampler, SamplerState

if TYPE_CHECKING:
    from mlxqwen.cache import KVCache
    from mlxqwen.engine.generation import Generation

__all__ = ["Guesser", "Guesses"]


class Guesser:
    """Makes guesses for one reply, as many as were right lately.

    Args:
        drafter: proposes tokens.
        most: the most that are guessed at once.
    """

    def __init__(self, drafter: Drafter, most: int) -> None:
        self.drafter = drafter
        self._length = DraftLength(most)

    def guess(self, generation: Generation, cache: KVCache, sampler: Sampler) -> Guesses | None:
        """Feed the last token with guesses after it, and draw after each; None if nothing is guessed.

        Raises `OptionError` if the drafter proposes ids outside the vocabulary.
        """
        room = generation.limit - generation.count - 1  # one token more is drawn than is fed behind the last
        count = min(room, self._length.next())
        if count < 1:
            return None
        if isinstance(self.drafter, DraftModel) and not self.drafter.catch_up(generation.text):
            return None  # a text that others kept it from reading is read a chunk a step
        drafts = self.drafter.propose(generation.text, count, sampler)[:count]
        drafts = check_token_ids("draft", drafts, generation.model.config.vocab_size)
        masks = [generation.mask()]
        forks = [constraint.fork() for constraint in generation.constraints]
        for place, draft in enumerate(drafts):
            try:
                for fork in forks:
                    fork.advance(draft)
                masks.append(generation.mask_of(forks))
            except (ValueError, GenerationError):  # not allowed there, or too costly to check behind it
                del drafts[place:]
                break
        if not drafts:
            return None
        step = TentativeStep(cache)
        fed = mx.array([[generation.text[-1], *drafts]], dtype=mx.int32)
        logits = generation.model.logits(generation.model.model(fed, step))
        drawn, states = [], []
        for place in range(len(drafts) + 1):
            remember = _one(drafts[place]) if place < len(drafts) else None
            drawn.append(sampler(apply_masks(logits[:, place], [masks[place]]), remember=remember))
            states.append(sampler.state)
        generation.drafted_tokens += len(drafts)
        return Guesses(self._length, drafts, cast(list[int], mx.concatenate(drawn).tolist()), states, step)


class Guesses:
    """The result of one pass: the guesses, and the draws after the last token and after each guess."""

    def __init__(
        self, length: DraftLength, drafts: list[int], drawn: list[int], states: list[SamplerState], step: TentativeStep
    ) -> None:
        self._length = length
        self._drafts = drafts
        self._drawn = drawn
        self._states = states
        self._step = step

    def tell(self, generation: Generation, sampler: Sampler) -> int:
        """Record the draws up to the first that differs from its guess, that one included → the last token recorded.

        Afterwards the cache holds all tokens before it, and the sampler is in its state after that draw.
        """
        place = 0
        while True:
            self._step.settle(place + 1)
            is_last = place == len(self._drafts)
            token = generation.tell(self._drawn[place], None if is_last else self._drafts[place])
            if generation.is_over or is_last or token != self._drafts[place]:
                break
            place += 1
        self._length.record(len(self._drafts), place)
        sampler.restore(self._states[place])
        remembered = self._drawn[-1] if is_last else self._drafts[place]
        if token != remembered:
            sampler.replace(_one(remembered), _one(token))
        return token


def _one(token: int) -> mx.array:
    return mx.array([token], dtype=mx.int32)
