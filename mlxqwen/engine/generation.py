"""The state of one request: its tokens, sampler and constraints, and the tokens that nobody has taken yet."""

from __future__ import annotations

import operator
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Literal, NamedTuple

import mlx.core as mx

from mlxqwen.chat.reply import Delta
from mlxqwen.engine.logprobs import BegunLogprobs, TokenLogprobs
from mlxqwen.engine.loops import LoopDetector
from mlxqwen.engine.request import CacheKind, Request, config_of, held_tokens, room_for_answer
from mlxqwen.errors import MlxqwenError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.constraint import Constraint, Finishing, check_mask, check_mask_shape
from mlxqwen.sampling.sampler import BAD_TOKEN, Sampler, check_token

if TYPE_CHECKING:
    from mlxqwen.cache.prefix_store import Match, Pin
    from mlxqwen.engine.prefill import Prefill
    from mlxqwen.engine.running import RunningBatch

__all__ = ["MAX_UNREAD", "FinishReason", "GeneratedToken", "Generation", "Progress"]

MAX_UNREAD = 256
"""Tokens that a reply may be ahead of its reader, before it waits."""

FinishReason = Literal["stop", "length", "loop", "tool_calls"]
"""How a reply ends: tokens know the first three, what the text means the last."""


class GeneratedToken(NamedTuple):
    """One token of a reply, and what it made certain.

    Args:
        token: its id.
        deltas: the pieces of the reply that are certain now.
        finish_reason: on the last token, "stop" (an end token or a stop string), "length" or "loop".
        is_forced: whether a constraint put it in the place of the token drawn.
        reasoning_tokens, budget_exhausted, drafted_tokens, accepted_tokens: see `mlxqwen.Usage`; so far.
        time: when it was recorded, in seconds of `time.perf_counter`.
        logprobs: how likely it was, if the request asks for that.
    """

    token: int
    deltas: tuple[Delta, ...]
    finish_reason: FinishReason | None
    is_forced: bool
    reasoning_tokens: int
    budget_exhausted: bool
    drafted_tokens: int
    accepted_tokens: int
    time: float
    logprobs: TokenLogprobs | None = None


class Progress(NamedTuple):
    """How many tokens of the prompt have been read (`done`), of those that have to be (`total`)."""

    done: int
    total: int


class Generation:
    """The scheduler's state of one request. Only its handle keeps it alive.

    Attributes:
        request: what was submitted.
        number: its place in the order of submission.
        submitted: when it was, in seconds of `time.monotonic`.
        text: ids of the prompt and the reply.
        count, limit: tokens of the reply so far, and at most.
        sampler: the request's own, while it is in no batch.
        records: tokens and progress that the handle has not taken yet.
        finish_reason, error: how it ended; both None while it runs or waits.
        is_cancelled: whether its handle is gone or has cancelled it.
        cached_tokens: tokens of the prompt that were copied from the store or the caller's cache.
        prefill, batch: where it runs; both None while it waits.
        begun_logprobs: of the token that is being drawn, if the request asks for them.
        prompt_logprobs: of the prompt's tokens, from the second on, as far as they were read, if they are asked for.
        match: the blocks of the store for its text, from admission until they are copied.
        pin: what the store keeps for it.
    """

    __slots__ = (
        "__weakref__",
        "_reader",
        "accepted_tokens",
        "batch",
        "begun_logprobs",
        "budget",
        "cached_tokens",
        "constraints",
        "count",
        "drafted_tokens",
        "epoch",
        "error",
        "finish_reason",
        "finishing",
        "is_cancelled",
        "is_parked",
        "limit",
        "loops",
        "match",
        "model",
        "number",
        "own_cache",
        "pins",
        "pipeline",
        "prefill",
        "prompt_logprobs",
        "read",
        "records",
        "request",
        "sampler",
        "submitted",
        "text",
    )

    def __init__(self, request: Request, model: Qwen3ForCausalLM, number: int) -> None:
        self.request = request
        self.model = model
        self.number = number
        self.submitted = time.monotonic()
        self.text = list(request.prompt)
        self.count = 0
        window = request.cache.max_kv_size
        room = room_for_answer(config_of(request.cache, model), held_tokens(request) + len(request.prompt), window)
        self.limit = min(request.most_tokens, room)
        self.pipeline = None if request.tokenizer is None else request.make_pipeline(request.tokenizer)
        self.budget = None if self.pipeline is None else request.make_budget(self.pipeline)
        made = [factory(self.pipeline) for factory in request.constraints]
        self.constraints: list[Constraint] = made if self.budget is None else [self.budget, *made]
        self.finishing = [one for one in made if isinstance(one, Finishing)]
        for one in self.finishing:
            one.end_within(self.limit)
        self.loops = LoopDetector() if request.stop_on_loop else None
        self.sampler: Sampler | None = None
        self.records: deque[GeneratedToken | Progress] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.is_cancelled = False
        self.is_parked = False
        self.epoch = 0  # of the weights that it began with
        self.cached_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.read = -1  # the most of the prompt that was told as read
        self.prefill: Prefill | None = None
        self.batch: RunningBatch | None = None
        self.begun_logprobs: BegunLogprobs | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.match: Match | None = None
        self.own_cache = None if isinstance(request.cache, CacheKind) else request.cache
        self.pins: dict[str, Pin] = {}
        self._reader: weakref.ref[Generation] | None = None

    @property
    def is_over(self) -> bool:
        """Whether it needs no further token."""
        return self.is_cancelled or self.finish_reason is not None or self.error is not None

    @property
    def urgency(self) -> tuple[int, int]:
        """The sort key of requests, the most urgent first: by priority, then by the order of submission."""
        return self.request.priority, self.number

    @property
    def rank(self) -> tuple[int, float]:
        """The sort key beside replies of other schedulers, the most urgent first."""
        return self.request.priority, self.submitted

    @property
    def reader(self) -> Generation | None:
        """The generation that is reading blocks which this one will share; None if there is none."""
        return None if self._reader is None else self._reader()

    @reader.setter
    def reader(self, other: Generation | None) -> None:
        self._reader = None if other is None else weakref.ref(other)

    def waits_for_reader(self) -> bool:
        """Whether what it will share is still being read."""
        reader = self.reader
        if reader is not None and reader.request.priority > self.request.priority:
            return False  # the less urgent one may wait long
        return reader is not None and not reader.is_over and reader.batch is None and reader.count == 0

    @property
    def may_begin_anew(self) -> bool:
        """Whether its row can be taken: of no cache of its caller's, and read by itself or decoding."""
        return self.own_cache is None and (self.prefill is None or len(self.prefill.rows) == 1)

    @property
    def is_forcing(self) -> bool:
        """Whether a constraint is known to replace the next token drawn."""
        return self.budget is not None and self.budget.is_forcing

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether those of its prompt are asked for, and not all there."""
        request = self.request
        return request.prompt_logprobs is not None and len(self.prompt_logprobs) < len(request.prompt) - 1

    def make_sampler(self) -> Sampler:
        """Make the request's sampler, whose arrays are not evaluated."""
        if self.sampler is None:
            request = self.request
            self.sampler = Sampler([request.sampling], [request.prompt], self.model.config.vocab_size)
        return self.sampler

    def mask(self) -> mx.array | None:
        """The mask of all constraints together for the next token; None allows every token."""
        mask = self.mask_of(self.constraints)
        if mask is not None:
            check_mask_shape(mask, self.model.config.vocab_size)
        return mask

    @staticmethod
    def mask_of(constraints: Sequence[Constraint]) -> mx.array | None:
        """The mask of these constraints together; None allows every token."""
        masks = [mask for constraint in constraints if (mask := constraint.mask()) is not None]
        return reduce(operator.and_, masks) if masks else None

    def settle(self, drawn: int) -> int:
        """The token that the constraints use where `drawn` was drawn."""
        for constraint in self.constraints:
            drawn = constraint.settle(drawn)
        return drawn

    def tell(self, drawn: int, guess: int | None = None) -> int:
        """Record the next token, given the draw → the token that is used. The reply may be over afterwards.

        Args:
            drawn: the token that the sampler drew.
            guess: the token that was guessed at this place, if there was a guess.

        Raises:
            GenerationError: the logits were no distribution.
        """
        token = self.settle(drawn)
        if token == BAD_TOKEN:
            if (mask := self.mask()) is not None:
                check_mask(mask, self.model.config.vocab_size)
            check_token(token)
        self.accepted_tokens += token == drawn == guess
        self.count += 1
        self.text.append(token)
        request = self.request
        ends = token in request.end_token_ids
        reason: FinishReason | None = "stop" if ends else "length" if self.count >= self.limit else None
        if self.loops is not None and self.loops.feed(token):
            reason = reason or "loop"
        deltas: list[Delta] = []
        pipeline = self.pipeline
        if pipeline is not None:
            deltas = pipeline.feed(token, ends=ends)
            if reason is not None and not pipeline.stopped:
                deltas += pipeline.finish()
            if pipeline.stopped:
                reason = "stop"
        if ends and any(one.was_cut_short for one in self.finishing):
            reason = "length"
        if reason is None:
            for constraint in self.constraints:
                constraint.advance(token)
        elif self.budget is not None:
            self.budget.advance(token)  # which may be the first that it forced
        self.records.append(
            GeneratedToken(
                token,
                tuple(deltas),
                reason,
                token != drawn,
                0 if pipeline is None else pipeline.reasoning_tokens,
                self.budget is not None and self.budget.exhausted,
                self.drafted_tokens,
                self.accepted_tokens,
                time.perf_counter(),
                None if self.begun_logprobs is None else self.begun_logprobs.of(token),
            )
        )
        self.begun_logprobs = None
        self.finish_reason = reason
        return token

    def progress(self, done: int, total: int) -> None:
        """Record how much of the prompt was read, if it is more than was recorded before."""
        if self.request.reports_progress and self.count == 0 and done > self.read:
            self.read = done
            self.records.append(Progress(done, total))

    @property
    def mark(self) -> int:
        """How many tokens of the prompt a later prompt is expected to share."""
        most = len(self.request.prompt) - 1
        return most if self.request.returns_to is None else min(self.request.returns_to, most)

    @property
    def fills_window(self) -> bool:
        """Whether reading its text pushes tokens out of a window that is not the caller's."""
        window = None if self.own_cache is not None else self.request.cache.max_kv_size
        return window is not None and len(self.text) > window

    def fail(self, error: BaseException) -> None:
        """End with an error, which the handle raises."""
        if not self.is_over:
            if (frames := traceback.extract_tb(error.__traceback__)) and not isinstance(error, MlxqwenError):
                error.add_note(f"raised in {frames[-1].filename}, line {frames[-1].lineno}")
            self.error = error.with_traceback(None)  # whose frames would keep the caches of a whole batch
        self.let_go()

    def take_error(self) -> BaseException | None:
        """The error that it failed with, once: an error that was raised refers to the frames that it went through."""
        error = self.error
        if error is not None:
            self.error, self.is_cancelled = None, True
        return error

    def park_if_ahead(self) -> None:
        """Park it once `MAX_UNREAD` records are unread; let it go on once half of them are taken."""
        self.is_parked = len(self.records) >= (MAX_UNREAD // 2 if self.is_parked else MAX_UNREAD)

    def let_go(self) -> None:
        """Drop all references to caches."""
        self.prefill = self.batch = self.match = self.sampler = self.begun_logprobs = None
