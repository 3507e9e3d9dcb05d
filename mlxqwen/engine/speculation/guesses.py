"""A step of one reply that takes several tokens: they are guessed, and one pass of the model checks the guesses."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import mlx.core as mx

from mlxqwen.cache.tentative import TentativeStep
from mlxqwen.checks import check_token_ids
from mlxqwen.engine.speculation.drafter import Drafter, DraftLength
from mlxqwen.sampling.constraint import apply_masks
from mlxqwen.sampling.sampler import Sampler, SamplerState

if TYPE_CHECKING:
    from mlxqwen.cache import KVCache
    from mlxqwen.engine.generation import Generation

__all__ = ["Guesser", "Guesses"]


class Guesser:
    """Guesses for one reply; how many are worth a pass follows from how many were right lately.

    Args:
        drafter: proposes tokens.
        most: the most that are guessed at once.
    """

    def __init__(self, drafter: Drafter, most: int) -> None:
        self.drafter = drafter
        self._length = DraftLength(most)

    def guess(self, generation: Generation, cache: KVCache, sampler: Sampler) -> Guesses | None:
        """Feed the last token told with guesses behind it, and draw behind each; None where nothing is guessed.

        Raises `OptionError` for guesses that are no tokens.
        """
        room = generation.limit - generation.count - 1  # one token more is drawn than is fed behind the last
        count = min(room, self._length.next())
        if count < 1:
            return None
        drafts = self.drafter.propose(generation.text, count, sampler)[:count]
        drafts = check_token_ids("draft", drafts, generation.model.config.vocab_size)
        masks = [generation.mask()]
        forks = [constraint.fork() for constraint in generation.constraints]
        for place, draft in enumerate(drafts):
            try:
                for fork in forks:
                    fork.advance(draft)
            except ValueError:  # not allowed there: the model will not draw it either
                del drafts[place:]
                break
            masks.append(generation.mask_of(forks))
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
    """What one pass has come to: guesses, what the sampler draws behind the last token and behind each guess."""

    def __init__(
        self, length: DraftLength, drafts: list[int], drawn: list[int], states: list[SamplerState], step: TentativeStep
    ) -> None:
        self._length = length
        self._drafts = drafts
        self._drawn = drawn
        self._states = states
        self._step = step

    def tell(self, generation: Generation, sampler: Sampler) -> int:
        """Tell draws while they are what was guessed, and the first that is not → the last token told.

        The cache then holds all that comes before that token, and the sampler stands behind its draw.
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
