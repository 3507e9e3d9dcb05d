"""The replies that one HTTP request waits for: rows of the engine, their tokens as they come, and their end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from mlxqwen.chat.tags import Tag
from mlxqwen.engine.events import Done
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.server.chat_request import Prepared
from mlxqwen.server.leases import Lease
from mlxqwen.server.load import Load
from mlxqwen.server.metrics import Metrics

__all__ = ["Replies"]


class Replies:
    """Replies to one HTTP request, one for each of its choices. Closing them frees their rows within a step.

    Args:
        prepared: the model, and one request for each reply.
        lease: of the model; released when they are closed.
        load: counts them; room for them has been taken there.
        metrics: are told of their tokens.
        deadline: when to give up, in seconds of `time.monotonic`; None for never.
        arrived: when the request came, in seconds of `time.perf_counter`; None for now.
        seconds_waited: how long it has waited for the model.

    Attributes:
        seconds_waited: as given.
        done: the end of each reply, by its number, as far as they have ended.
        is_cut: whether replies were closed before their end.

    Raises:
        MlxqwenError: the model cannot answer one of them.
    """

    def __init__(
        self,
        prepared: Prepared,
        lease: Lease,
        load: Load,
        metrics: Metrics,
        deadline: float | None = None,
        *,
        arrived: float | None = None,
        seconds_waited: float = 0.0,
    ) -> None:
        model, requests = prepared.model, prepared.requests
        self._model = model
        self._lease = lease
        self._choices = prepared.choices
        self._load = load
        self._metrics = metrics
        self._deadline = deadline
        self._arrived = time.perf_counter() if arrived is None else arrived
        self.seconds_waited = seconds_waited
        self._last: dict[int, GeneratedToken] = {}
        self._first: float | None = None
        self.done: dict[int, Done] = {}
        self.is_cut = False
        scheduler = model.engine.scheduler
        try:
            self.handles = [scheduler.submit(request) for request in requests]
        except BaseException:
            load.leave(len(requests))
            raise
        self._running = dict(enumerate(self.handles))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(handle.request.prompt) for handle in self.handles[:: self._choices])

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that were not read, as they were known before."""
        return sum(handle.cached_tokens for handle in self.handles[:: self._choices])

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thought so far, in all replies."""
        return sum(token.reasoning_tokens for token in self._last.values())

    @property
    def is_over(self) -> bool:
        """Whether all replies have ended."""
        return not self._running

    @property
    def seconds_to_first(self) -> float | None:
        """Seconds from the request's arrival to the first token; None while there is none."""
        return self._first

    def texts(self) -> list[str]:
        """What was said, thought and tags included, for the log."""
        tokenizer = self._model.engine.tokenizer
        return [tokenizer.decode(handle.tokens) for handle in self.handles]

    async def tokens(self) -> AsyncIterator[list[tuple[int, GeneratedToken]]]:
        """Yield what has come, as numbers of replies and tokens; about every second without any, nothing.

        Raises:
            ApiError: the deadline has passed, or the server ends.
            MlxqwenError: one of the replies failed.
        """
        running, wakeups = self._running, self._model.wakeups
        while running:
            is_ready = await wakeups.wait(running.values())
            self._load.check_time(self._deadline)
            come = self._poll()
            if come or not is_ready:
                yield come

    def _poll(self) -> list[tuple[int, GeneratedToken]]:
        come: list[tuple[int, GeneratedToken]] = []
        for row, handle in list(self._running.items()):
            while (token := handle.poll()) is not None:
                come.append((row, token))
                self._note(row, token)
                if token.finish_reason is not None:
                    self.done[row] = handle.done(token)
                    self._leave(row)
                    break
            else:
                if handle.is_over:
                    if (error := handle.take_error()) is not None:
                        raise error
                    self._leave(row)
        return come

    def _note(self, row: int, token: GeneratedToken) -> None:
        before = self._last.get(row)
        self._metrics.told.note(None if before is None else token.time - before.time)
        if before is None:
            self._lease.room = 0  # it has it
            seconds = token.time - self._arrived
            self._first = seconds if self._first is None else self._first
            if row % self._choices == 0:
                self._metrics.read(len(self.handles[row].request.prompt), self.handles[row].cached_tokens)
            self._metrics.first_token.observe(seconds)
        self._last[row] = token

    def ended_in_thought(self, row: int) -> bool:
        """Whether a reply that is over has said nothing but its thought, if even that."""
        done = self.done[row]
        if done.reply.content or done.reply.tool_calls:
            return False
        think = self._model.engine.tokenizer.token_to_id(Tag.THINK.value)
        has_begun = self.handles[row].request.begins_in_thought is True or think in done.tokens
        return has_begun or bool(done.reply.reasoning)

    def end(self, row: int) -> None:
        """End one reply where it is: what it has counts as its whole."""
        handle = self._running.get(row)
        if handle is None:
            return
        if row in self._last:
            self.done[row] = handle.done(self._last[row])
        handle.cancel()
        self._leave(row)

    def close(self) -> None:
        """End the replies that are not over."""
        self.is_cut |= bool(self._running)
        if self._running:
            self._metrics.aborted.inc(len(self._running))
        for row in list(self._running):
            self.end(row)
        self._model.engine.scheduler.driver.wake()
        self._lease.release()

    def _leave(self, row: int) -> None:
        del self._running[row]
        self._load.leave(1)

    def steps(self) -> int:
        """How many steps the engine has begun."""
        return self._model.engine.scheduler.steps
