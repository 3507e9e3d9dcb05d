"""A conversation that continues: its messages, and a pin on what the model has read of them.

Asking, going back, saving and loading stand in one file, as each has to leave the messages whole when it fails.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import GEN_RUNNING, getgeneratorstate
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlxqwen.chat.prompts import check_messages, said_of_extending
from mlxqwen.chat.reply import Delta, Reply, join_deltas
from mlxqwen.chat.thinking_modes import check_budget_use
from mlxqwen.chat.turns import check_conversation, count_turns, prepare_conversation, without_oldest_turns
from mlxqwen.engine.chat_request import ChatOptions, Messages, Responder, option_names
from mlxqwen.engine.conversation_file import read_conversation, write_conversation
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Done, Event, assistant_message
from mlxqwen.engine.handle import Handle
from mlxqwen.engine.options import DEFAULT_MAX_ROUNDS
from mlxqwen.engine.prefixes import common_prefix
from mlxqwen.engine.request import Request
from mlxqwen.engine.tool_loop import ToolEvent, ToolRun, Tools, stream_tool_loop, tool_choices
from mlxqwen.errors import ContextLengthError, MessagesError, MlxqwenError, OptionError
from mlxqwen.model.given import given_kind
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.messages import prepare_messages, to_plain_json

if TYPE_CHECKING:
    from mlxqwen.cache.prefix_store import Pin

__all__ = ["Conversation"]

logger = logging.getLogger("mlxqwen")

Message = Mapping[str, Any]
_E = TypeVar("_E")
_Pins = tuple[dict[str, "Pin"], ...]

_OPENING = {"role": "user", "content": "Hello"}
_ANSWER = {"role": "assistant", "content": "Hello"}
_WAYS_OUT = (
    "Drop the oldest turns (drop_oldest=True, or conversation.drop_oldest()), shorten the last one, {extend}or slide "
    "over it in a window that fits it (--max-kv-size; Conversation(engine, max_kv_size=…))."
)
_OUTGROWN = "conversation: outgrew its YaRN factor of %g, and goes on with %g, for which all %s tokens are read anew"
_FITS_AGAIN = "conversation: fits a YaRN factor of %g again, and goes on with it: what was read for %g does not count"


class Conversation:
    """Messages of a conversation with an engine; each turn reads only what is new.

    A turn counts when its reply is complete: then the user's and the assistant's messages are added. One that fails,
    or is abandoned (by closing the iterator, by Ctrl-C, by an error), leaves the messages as they were before;
    `keep_partial` keeps what was said until then. Replies are those of `Engine.stream` for the same messages.

    What the model has read stays in the engine's store of prefixes while the conversation lives, whatever the store's
    cap. A prompt is read from the first block of tokens that differs. Behind a thought that is the header of the
    assistant's last message, as history goes without old reasoning: the short answer is read again, the thought is
    gone. `Done.usage.cached_tokens` tells how much was not read again. Messages may be edited between turns.

    Args:
        engine: answers.
        system: text of a system message.
        messages: what was said before, as in OpenAI's API; copied.
        max_kv_size, keep, kv_bits: of the cache; see `mlxqwen.make_cache`. A window that has slid on cannot go back: it
            is kept where the next turn is expected to go on.
        **options: those of `Engine.stream`, except `cache`, for every turn that gives no others.

    Raises:
        MessagesError, OptionError: messages that are no conversation, options out of range.

    Attributes:
        engine: as given.
        messages: plain dicts, the system message first if there is one. Those of a turn are added as it ends.
        options: for turns that give no others.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        max_kv_size: int | None = None,
        keep: int = 4,
        kv_bits: int | None = None,
        **options: Any,
    ) -> None:
        _check_engine(engine, "Conversation(Engine(model, tokenizer)), or Conversation(Engine.load(…))")
        self.engine = engine
        self.options = options
        self._cache: dict[str, Any] = {"max_kv_size": max_kv_size, "keep": keep, "kv_bits": kv_bits}
        # What was read stays in the store while its pins live: of the turns that count, and of what was left since.
        self._held: _Pins = ()
        self._left: _Pins = ()
        self._yarn_factor: float | None = None  # of what was read
        self._running: weakref.ref[Generator[Any]] | None = None
        self.messages: list[dict[str, Any]] = [] if messages in ([], ()) else _plain(messages)
        if self.messages:
            check_messages(engine.tokenizer, self.messages)
        if system is not None:
            if self.system is not None:
                raise MessagesError(
                    "messages[0]: found a system message beside the one given apart, expected one of them",
                    hint="Leave out system=…, or the message.",
                )
            self.system = system
        self._request([_OPENING], self._merged({}))

    def __repr__(self) -> str:
        count = len(self.messages)
        return f"<Conversation: {count:,} message{'s' * (count != 1)}>"

    @property
    def system(self) -> str | None:
        """The text of the system message, None without one. Setting it changes the message; None removes it."""
        first = prepare_conversation(self.messages[:1])[0] if self.messages else {}
        return str(first["content"] or "") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._abandon()
        turns = self.messages[0 if self.system is None else 1 :]
        if text is None:
            self.messages[:] = turns
            return
        if not isinstance(text, str):
            raise MessagesError(f"system: found {type(text).__name__}, expected text or None")
        message = {"role": "system", "content": text}
        check_conversation([message])
        self.messages[:] = [message, *turns]

    def stream(
        self, message: str | Message | Sequence[Message], *, keep_partial: bool = False, **options: Any
    ) -> Generator[Event]:
        """Send a message, and stream the answer: deltas, and `Done` at the end.

        Nothing runs before the first event is asked for. A stream that is not at its end when the conversation is next
        used is abandoned, and says so when it is asked for more.

        Args:
            message: what a user says; or a message; or several, such as the results of the tools that the last reply
                called. The last one must be there to be answered, so it is none that the model would go on with.
            keep_partial: if the stream is abandoned after its first delta, keep what was said until then as the
                assistant's message.
            **options: those of `Engine.stream`, except `cache`, which replace those of the conversation. What
            `drop_oldest`
                leaves out of the prompt stays in `messages`.

        Raises:
            MessagesError, TemplateError, OptionError, ContextLengthError: at once.
            GenerationError, or OptionError for a stream that was abandoned: while iterating.
        """
        self._abandon()
        return self._begin([*self.messages, *self._said(message)], keep_partial, options)

    def chat(self, message: str | Message | Sequence[Message], **options: Any) -> Reply:
        """Send a message, and return the whole answer; see `stream`."""
        return next(event.reply for event in self.stream(message, **options) if isinstance(event, Done))

    def stream_tools(
        self,
        message: str | Message | Sequence[Message],
        tools: Tools,
        *,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        **options: Any,
    ) -> Generator[ToolEvent]:
        """Send a message, and stream the answer with the help of functions, as `Engine.stream_tools` does.

        Each reply reads only what is new: the results of the tools before it. All that was said is added to `messages`
        when the run is over; a run that fails, or is abandoned, adds nothing.

        Args:
            message: as for `stream`.
            tools: functions by name, or a list of functions, instead of the conversation's own schemas.
            max_rounds: the most replies.
            **options: as for `stream`, for each reply; see `Engine.stream_tools` for `tool_choice`.
        """
        self._abandon()
        messages = [*self.messages, *self._said(message)]
        choices = tool_choices(options.get("tool_choice", self.options.get("tool_choice")))

        def answer(messages: Sequence[Message], schemas: Sequence[Message]) -> Iterator[Event]:
            given = {**options, "tools": schemas, "tool_choice": next(choices)}
            return self._answer(None, messages, given, keep_partial=False)

        run = self._run(messages, stream_tool_loop(answer, messages, tools, max_rounds=max_rounds))
        self._running = weakref.ref(run)
        return _until_superseded(run, ToolRun)

    def run_tools(
        self,
        message: str | Message | Sequence[Message],
        tools: Tools,
        *,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        **options: Any,
    ) -> ToolRun:
        """Send a message, and answer with the help of functions: the last event of `stream_tools`."""
        events = self.stream_tools(message, tools, max_rounds=max_rounds, **options)
        return next(event for event in events if isinstance(event, ToolRun))

    def next_sampling(self) -> SamplingParams:
        """The `SamplingParams` for the answer to a message without a soft switch."""
        return self._responder.sampling([*self.messages, _OPENING], self._merged({}))

    def retry(self, *, keep_partial: bool = False, **options: Any) -> Generator[Event]:
        """Answer the user's last message anew; once the reply is there, it replaces what followed. See `stream`.

        System messages directly behind the user's stay with it.
        """
        self._abandon()
        asked = self._last_question() + 1
        asked += self._system_messages(asked)
        return self._begin(self.messages[:asked], keep_partial, options)

    def undo(self) -> None:
        """Remove the user's last message and what followed it. Raises `MessagesError` if there is none."""
        self._abandon()
        del self.messages[self._last_question() :]

    def drop_oldest(self) -> None:
        """Remove the oldest turn: a question, its answer, and the calls and results between. System messages stay.

        Raises `MessagesError` if there is only one turn.
        """
        self._abandon()
        if not self.messages or count_turns(self.messages) < 2:
            raise MessagesError("conversation: found no turn but the last, expected an older one to drop")
        self.messages[:] = map(dict, without_oldest_turns(self.messages, 1))

    def clear(self) -> None:
        """Remove all messages except the system messages at the beginning."""
        self._abandon()
        del self.messages[self._system_messages(0) :]
        self._held = self._left = ()
        self._yarn_factor = None

    def save(self, path: str | PathLike[str]) -> None:
        """Write messages and options to a JSON file, whole or not at all.

        The options `trust_special_tokens`, `prefill_chunk` and `on_prefill` are left out: a file must not set them.
        `response_format` is left out too, as it may be a class.

        Raises:
            MessagesError: messages that are no conversation.
            OptionError: the file cannot be written.
        """
        write_conversation(Path(path), _plain(self.messages) if self.messages else [], self.options)

    @classmethod
    def load(cls, path: str | PathLike[str], engine: Engine, **arguments: Any) -> Conversation:
        """Read the conversation that `save` wrote.

        Args:
            path: the file.
            engine: any engine.
            **arguments: those of the constructor, such as `max_kv_size`, and options, which replace those of the file.

        Raises:
            MessagesError: the file cannot be read, or is no valid conversation.
            OptionError: an argument out of range.
        """
        _check_engine(engine, "Conversation.load(path, engine)")
        messages, options = read_conversation(Path(path))
        try:
            cls(engine, messages=messages, **options)
        except OptionError as error:
            raise MessagesError(f"{path}: {error.problem}", hint=error.hint) from None
        return cls(engine, messages=messages, **{**options, **arguments})

    # One turn

    def _said(self, message: str | Message | Sequence[Message]) -> list[dict[str, Any]]:
        """The new message or messages, as a list that can be answered. Raises `MessagesError`."""
        if isinstance(message, str):
            said = [{"role": "user", "content": message}]
        else:
            said = _plain([message] if isinstance(message, Mapping) else message)
        if not said:
            raise MessagesError("message: found an empty list, expected at least one message")
        if said[-1].get("role") == "assistant" and not said[-1].get("tool_calls"):
            raise MessagesError(
                "message: found role 'assistant' at the end, expected another one, such as 'user', to be answered",
                hint="Engine.stream goes on with an assistant's message; thinking=False keeps a model from thinking.",
            )
        return said

    def _begin(self, messages: Messages, keep_partial: bool, given: Mapping[str, Any]) -> Generator[Event]:
        turn = self._answer(messages, messages, given, keep_partial=keep_partial)
        self._running = weakref.ref(turn)  # a stream that nobody iterates any more is to end by itself
        return _until_superseded(turn, Done)

    def _run(self, messages: Messages, events: Generator[ToolEvent]) -> Generator[ToolEvent]:
        for event in events:
            if isinstance(event, ToolRun):
                self._held, self._left = self._left, ()
                self.messages[:] = [*map(dict, messages), *map(dict, event.messages)]
            yield event

    def _answer(
        self, said: Messages | None, messages: Messages, given: Mapping[str, Any], *, keep_partial: bool
    ) -> Generator[Event]:
        """Answer `messages`, after all checks; the reply is added to `said`, if that is given."""
        options = self._merged(given)
        return self._events(said, self._request(messages, options), options, keep_partial=keep_partial)

    def _events(
        self, said: Messages | None, request: Request, options: ChatOptions, *, keep_partial: bool
    ) -> Generator[Event]:
        def add(reply: Reply) -> None:
            """The turn counts, unless it is one of a run with tools, which counts as a whole."""
            if said is None:
                self._left = _with_pins(self._left or self._held, handle)
            else:
                self._held, self._left = _with_pins(self._held, handle), ()
                self.messages[:] = [*map(dict, said), assistant_message(reply)]

        handle: Handle = self.engine.scheduler.submit(request)
        handle.on_prefill = options.on_prefill
        self._note_yarn_factor(handle)
        deltas: list[Delta] = []
        is_over = False
        try:
            for event in handle:
                if isinstance(event, Done):
                    is_over = True
                    add(event.reply)
                else:
                    deltas.append(event)
                yield event
        finally:
            if not is_over:
                if is_kept := keep_partial and bool(deltas):
                    handle.keep()
                handle.cancel()
                if is_kept:
                    add(join_deltas(deltas))
                else:
                    self._left = (handle.pins,) if handle.pins else self._left

    def _note_yarn_factor(self, handle: Handle) -> None:
        """Log that what was read under another factor does not count any more."""
        before, factor = self._yarn_factor, handle.yarn_factor
        if before is not None and factor is not None and factor > before:
            tokens = f"{len(handle.request.prompt):,}"
            logger.warning(_OUTGROWN, before, factor, tokens)
        elif before is not None and factor is not None and factor < before:
            logger.warning(_FITS_AGAIN, factor, before)
        self._yarn_factor = factor

    @property
    def _responder(self) -> Responder:
        engine = self.engine
        return Responder(engine.model, engine.tokenizer, engine.speculative, engine.draft_tokens)

    def _request(self, messages: Messages, options: ChatOptions) -> Request:
        """The request for a turn, after all checks of messages and options."""
        self.engine.check_open()
        try:
            request, sent = self._responder.request(messages, options, holds_cache=True)
        except ContextLengthError as error:
            hint = _WAYS_OUT.format(extend=said_of_extending(error.hint))
            raise ContextLengthError(error.problem, hint=hint) from None
        if options.max_kv_size is None:
            return request
        return replace(request, returns_to=self._shared_with_next(request, sent, options))

    def _shared_with_next(self, request: Request, sent: Messages, options: ChatOptions) -> int:
        """How many tokens the prompt of the next turn is expected to share; a window that slides is kept there."""
        try:
            following = self._responder.render([*sent, _ANSWER, _OPENING], options)
        except MlxqwenError:
            return 0
        return common_prefix(request.prompt, following)

    def _merged(self, given: Mapping[str, Any]) -> ChatOptions:
        merged: dict[str, Any] = {**self.options, **given}
        option_names("a conversation", merged, "cache", *self._cache)
        # Turning off thinking for a turn sets a budget for all turns aside.
        switch = given.get("thinking") if "thinking_budget" in given else None
        budget = merged.get("thinking_budget")
        check_budget_use(self.engine.tokenizer, switch, budget, given.get("early_stop_text"))
        return ChatOptions(**merged, **self._cache)

    def _abandon(self) -> None:
        """End the stream that is still open."""
        turn = None if self._running is None else self._running()
        if turn is None:
            return
        if getgeneratorstate(turn) == GEN_RUNNING:
            raise OptionError(
                "conversation: found in use while it is answering, expected one use at a time",
                hint="Let the reply end, or close its stream, first.",
            )
        turn.close()

    def _system_messages(self, start: int) -> int:
        """How many system messages stand one behind the other from `start` on."""
        messages = prepare_conversation(self.messages[start:]) if self.messages[start:] else ()
        return sum(1 for _ in takewhile(lambda message: message["role"] == "system", messages))

    def _last_question(self) -> int:
        messages = prepare_messages(self.messages) if self.messages else []
        for i in reversed(range(len(messages))):
            if messages[i]["role"] == "user":
                return i
        raise MessagesError("conversation: found no message of a user, expected one", hint="Say something first.")


def _with_pins(before: _Pins, handle: Handle) -> _Pins:
    """The pins of a reply; a window that slides may go back only to the prompt of a turn before, whose pins stay then.

    The dict is the reply's own: another thread may be about to add to it.
    """
    if "prompt" in handle.pins:
        return (handle.pins,)
    return (*[pins for pins in before if "prompt" in pins][:1], handle.pins)


def _until_superseded(events: Generator[_E], last: type) -> Generator[_E]:
    """Yield events up to one of the type `last`. Raises `OptionError` if they end before it."""
    event: _E | None = None
    try:
        for event in events:
            yield event
    finally:
        events.close()
    if not isinstance(event, last):
        raise OptionError(
            "conversation: found a stream whose reply was abandoned, as the conversation went on with something else",
            hint="Take a reply to its end before the next turn, or hold a second Conversation.",
        )


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy made of plain JSON values. Raises `MessagesError`."""
    prepare_messages(messages)
    return [to_plain_json(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_engine(given: object, call: str) -> None:
    """Raise `OptionError` unless `given` is an engine; `call` is how the function is called."""
    if not isinstance(given, Engine):
        raise OptionError(f"engine: found {given_kind(given)}, expected an Engine", hint=f"It is called as {call}.")
