"""What `submit` returns: the tokens and events of a request as they come, its result, and the way to cancel it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlxqwen.chat.reply import Reply
from mlxqwen.engine.events import Done, Event, Timings, Usage
from mlxqwen.engine.generation import FinishReason, GeneratedToken, Generation, Progress
from mlxqwen.engine.logprobs import TokenLogprobs
from mlxqwen.engine.request import config_of
from mlxqwen.errors import OptionError

if TYPE_CHECKING:
    from mlxqwen.cache.prefix_store import Pin
    from mlxqwen.engine.request import Request
    from mlxqwen.engine.scheduler import Scheduler

__all__ = ["Handle", "events_of"]

logger = logging.getLogger("mlxqwen")


def events_of(begin: Callable[[], Handle]) -> Iterator[Event]:
    """The events of a request: a `Delta` as each piece becomes certain, and `Done` at the end.

    Args:
        begin: gives its handle; called when the first event is asked for. Left early, the request ends.
    """
    handle = begin()
    while True:
        try:
            token = handle.next_token()
        except StopIteration:
            return
        yield from token.deltas
        if token.finish_reason is not None:
            yield handle.done(token)
            return


class Handle:
    """A request that was submitted. Iterating gives its events; when the handle is garbage, the request is cancelled.

    Any thread may take the next event, one thread at a time.

    Attributes:
        on_prefill: called with (tokens read, tokens to read) by the thread that takes the next token, outside any step.
    """

    def __init__(self, generation: Generation, scheduler: Scheduler) -> None:
        self._generation = generation
        self._scheduler = scheduler
        self._started = time.perf_counter()
        self._first = 0.0
        self._last = 0.0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._deltas = 0  # how many were taken
        self._warned = 0
        self.on_prefill: Callable[[int, int], None] | None = None

    @property
    def request(self) -> Request:
        """The request that was submitted."""
        return self._generation.request

    @property
    def pins(self) -> dict[str, Pin]:
        """What the store keeps of the request, if it `holds_cache`: of its "prompt", and of prompt and "reply"."""
        return self._generation.pins

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were copied rather than read."""
        return self._generation.cached_tokens

    @property
    def yarn_factor(self) -> float | None:
        """See `mlxqwen.Done`."""
        model = self._generation.model
        if not model.config.yarn_choices:
            return None
        scaling = config_of(self.request.cache, model).rope_scaling
        return 1.0 if scaling is None else scaling.factor

    def generation_of(self, scheduler: Scheduler) -> Generation:
        """The scheduler's state of this request. Raises `OptionError` if it was submitted to another scheduler."""
        if scheduler is not self._scheduler:
            raise OptionError("handle: found one of another scheduler, expected one that this scheduler gave")
        return self._generation

    def cancel(self) -> None:
        """End the request, with no further events. Does nothing if it is over."""
        self._scheduler.cancel(self)

    def keep(self) -> None:
        """Let the store have what was read and said so far; see `Scheduler.keep`."""
        self._scheduler.keep(self)

    def next_token(self) -> GeneratedToken:
        """The next token. A thread that waits for it takes steps of the scheduler.

        Raises:
            StopIteration: the reply is over.
            MlxqwenError: it failed.
        """
        generation, scheduler = self._generation, self._scheduler
        while True:
            token = self.poll()
            if token is not None:
                return token
            if (error := generation.take_error()) is not None:
                try:
                    raise error
                finally:  # its traceback refers to this frame
                    del error, generation, scheduler, self
            if generation.is_over:
                raise StopIteration
            scheduler.driver.drive(scheduler, generation)

    def poll(self) -> GeneratedToken | None:
        """The next token if it is there, else None."""
        records = self._generation.records
        if self._generation.is_cancelled:
            records.clear()
        while records:
            record = records.popleft()
            if isinstance(record, Progress):
                if self.on_prefill is not None:
                    self.on_prefill(record.done, record.total)
                continue
            self._first = self._first or record.time
            self._last = record.time
            self._tokens.append(record.token)
            self._deltas += len(record.deltas)
            if record.logprobs is not None:
                self._logprobs.append(record.logprobs)
            self._log_warnings()
            return record
        if self._generation.is_parked:  # it may go on: whoever only polls waits in no `drive` that says so
            self._scheduler.driver.wake()
        return None

    def _log_warnings(self) -> None:
        """Log why calls of the reply were kept as text, once each."""
        pipeline = self._generation.pipeline
        if pipeline is None or len(pipeline.warnings) == self._warned:
            return
        for warning in pipeline.warnings[self._warned :]:
            logger.warning(warning)
        self._warned = len(pipeline.warnings)

    def wait(self) -> None:
        """Wait until there may be something new; the thread may take steps of the scheduler meanwhile."""
        self._scheduler.driver.drive(self._scheduler, self._generation)

    @property
    def is_ready(self) -> bool:
        """Whether a token, or the end, can be taken without waiting."""
        return bool(self._generation.records) or self._generation.is_over

    @property
    def has_begun(self) -> bool:
        """Whether its prompt is being read, or was."""
        generation = self._generation
        return generation.prefill is not None or generation.batch is not None or generation.count > 0

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Those of the prompt's tokens, from the second on; None until all are there, or if they were not asked for."""
        generation = self._generation
        if generation.request.prompt_logprobs is None or generation.lacks_prompt_logprobs:
            return None
        return tuple(generation.prompt_logprobs)

    @property
    def token_count(self) -> int:
        """How many tokens were taken."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that were taken."""
        return tuple(self._tokens)

    @property
    def is_over(self) -> bool:
        """Whether there are no further tokens."""
        return self._generation.is_over and not self._generation.records

    @property
    def error(self) -> BaseException | None:
        """The error that ended the request and was not raised yet; None if there is none."""
        return self._generation.error

    def take_error(self) -> BaseException | None:
        """The error that ended the request, once; None if there is none."""
        return self._generation.take_error()

    def __iter__(self) -> Iterator[Event]:
        """Yield a `Delta` as each piece becomes certain, and `Done` at the end."""
        return events_of(lambda: self)

    def poll_done(self) -> Done | None:
        """Take the tokens that are there → `Done` if they end the reply, else None. Raises the error of the request."""
        while (token := self.poll()) is not None:
            if token.finish_reason is not None:
                return self.done(token)
        if (error := self._generation.take_error()) is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame
        return None

    def result(self) -> Done:
        """Wait for the end of the reply. Raises the error of the request."""
        for event in self:
            if isinstance(event, Done):
                return event
        raise OptionError("handle: found a request that was cancelled, expected its end")

    def done(self, last: GeneratedToken) -> Done:
        """The `Done` of the reply up to `last`, the last token that was taken. The engine may be ahead of it."""
        generation = self._generation
        pipeline = generation.pipeline
        reply = Reply(None, "") if pipeline is None else pipeline.reply_of(self._deltas)
        stop_string = None if pipeline is None or last.finish_reason is None else pipeline.stop_string
        finish_reason: FinishReason = last.finish_reason or "stop"
        if reply.tool_calls and finish_reason == "stop" and stop_string is None:
            finish_reason = "tool_calls"
        prompt_tokens, count = len(generation.request.prompt), len(self._tokens)
        usage = Usage(
            prompt_tokens,
            count,
            last.reasoning_tokens,
            last.budget_exhausted,
            generation.cached_tokens,
            last.drafted_tokens,
            last.accepted_tokens,
        )
        prefill, decode = self._first - self._started, self._last - self._first
        timings = Timings(
            prefill,
            decode,
            (prompt_tokens - generation.cached_tokens) / max(prefill, 1e-9),
            (count - 1) / max(decode, 1e-9),
        )
        tokens, logprobs = tuple(self._tokens), tuple(self._logprobs)
        return Done(reply, finish_reason, usage, timings, tokens, self.yarn_factor, logprobs, stop_string)

    def prompt_speed(self) -> float:
        """Tokens of the prompt read per second, until the first token."""
        read = len(self._generation.request.prompt) - self._generation.cached_tokens
        return read / max(self._first - self._started, 1e-9)

    def decode_speed(self) -> float:
        """Tokens per second since the first."""
        return (len(self._tokens) - 1) / max(self._last - self._first, 1e-9)
