"""A conversation that goes on: messages and the cache of what the model has read of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from inspect import GEN_RUNNING, getgeneratorstate
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

from mlxqwen.cache import KVCache, make_cache
from mlxqwen.cache.prefix import PrefixCache
from mlxqwen.chat.reply import Reply
from mlxqwen.chat.thinking import check_budget_use
from mlxqwen.chat.turns import check_conversation, count_turns, without_oldest_turns
from mlxqwen.engine.cached_replies import stream_cached
from mlxqwen.engine.chat_options import ChatOptions, RequestOptions, ToolRunOptions, check_option_names
from mlxqwen.engine.conversation_file import read_conversation, write_conversation
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Done, Event, assistant_message
from mlxqwen.engine.prompt_cache import PromptCache, check_prompt_cache
from mlxqwen.engine.requests import PreparedRequest, check_shared_options, choose_sampling, prepare_request
from mlxqwen.engine.tool_loop import DEFAULT_MAX_ROUNDS, ToolEvent, ToolRun, stream_tool_loop
from mlxqwen.errors import ContextLengthError, MessagesError, OptionError
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.messages import prepare_messages, to_plain_json

__all__ = ["Conversation"]

Message = Mapping[str, Any]
_E = TypeVar("_E")

_OPENING = {"role": "user", "content": "Hello"}
_WAYS_OUT = (
    "Drop the oldest turns (drop_oldest=True, or conversation.drop_oldest()), shorten the last one, extend the context "
    "(--yarn-factor; in Python load(yarn_factor=…)), or slide over it in a window that fits it (--max-kv-size; "
    "Conversation(engine, max_kv_size=…))."
)


class Conversation:
    """Messages of a conversation with an engine, and a cache, so that each turn reads only what is new.

    A turn counts when its reply is complete: then the user's and the assistant's messages are added. One that fails,
    or is abandoned (by closing the iterator, by Ctrl-C, by an error), leaves messages and cache as they were before;
    `keep_partial` keeps what was said until then, and a prompt cache keeps a prompt that was read to its end. Replies
    are those of `Engine.stream` for the same messages.

    The model reads a prompt from where it differs from what the cache holds. Behind a thought that is the header of the
    assistant's last message, as history goes without old reasoning: the short answer is read again, the thought is
    gone. `Done.usage.cached_tokens` tells how much was not read again. Messages may be edited between turns.

    Args:
        engine: answers.
        system: text of a system message.
        messages: what was said before, as in OpenAI's API; copied.
        max_kv_size, keep, kv_bits: of the cache; see `mlxqwen.make_cache`. A window that has slid on cannot go back:
            it takes up to three times its memory while a reply is made, and up to twice between replies.
        prompt_cache: goes on with what it holds, instead of a cache of one's own; its `save` is for the caller to call.
        **options: those of `Engine.stream`, but for `cache`, for every turn that gives no others.

    Raises:
        MessagesError, OptionError: messages or options that cannot be.

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
        prompt_cache: PromptCache | None = None,
        **options: Unpack[ChatOptions],
    ) -> None:
        self.engine = engine
        self.options = options
        if prompt_cache is None:
            self._unused = make_cache(engine.model, max_kv_size=max_kv_size, keep=keep, kv_bits=kv_bits)
            self._held = PrefixCache(make_cache(engine.model, max_kv_size=max_kv_size, keep=keep, kv_bits=kv_bits))
        else:
            if (max_kv_size, keep, kv_bits) != (None, 4, None):
                raise OptionError(
                    "prompt_cache: found beside options of a cache, expected it alone",
                    hint="Give max_kv_size, keep and kv_bits to PromptCache.",
                )
            self._unused = check_prompt_cache("prompt_cache", prompt_cache, engine.model).new_cache()
            self._held = prompt_cache.held
        self._has_file = prompt_cache is not None
        self._running: weakref.ref[Generator[Any]] | None = None
        self.messages: list[dict[str, Any]] = [] if messages in ([], ()) else _plain(messages)
        if self.messages:
            check_conversation(self.messages)
        if system is not None:
            if self.system is not None:
                raise MessagesError(
                    "messages[0]: found a system message beside the one given apart, expected one of them",
                    hint="Leave out system=…, or the message.",
                )
            self.system = system
        self._prepare([_OPENING], self._merged({}))

    @property
    def cache(self) -> KVCache:
        """What the model has read: at rest, no more than what the next turn is likely to go on with."""
        return self._held.cache

    @property
    def system(self) -> str | None:
        """The text of the system message, None without one; set it to change it, or to None to remove it."""
        first = prepare_messages(self.messages[:1])[0] if self.messages else {}
        return str(first["content"]) if first.get("role") == "system" else None

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
        self, message: str | Message | Sequence[Message], *, keep_partial: bool = False, **options: Unpack[ChatOptions]
    ) -> Generator[Event]:
        """Say something, and have it answered piece by piece: deltas, and `Done` at the end.

        Nothing runs before the first event is asked for. A stream that is not at its end when the conversation is next
        used is abandoned, and says so when it is asked for more.

        Args:
            message: what a user says; or a message; or several, such as the results of the tools that the last reply
                called. The last one must be there to be answered: of a user or a tool.
            keep_partial: if the stream is abandoned after its first delta, keep what was said until then as the
                assistant's message.
            **options: those of `Engine.stream`, but for `cache`, over those of the conversation. What `drop_oldest`
                leaves out of the prompt stays in `messages`.

        Raises:
            MessagesError, TemplateError, OptionError, ContextLengthError: at once.
            GenerationError, or OptionError for a stream that was abandoned: while iterating.
        """
        self._abandon()
        return self._begin([*self.messages, *self._said(message)], keep_partial, options)

    def chat(self, message: str | Message | Sequence[Message], **options: Unpack[ChatOptions]) -> Reply:
        """Say something, and have it answered; see `stream`."""
        return next(event.reply for event in self.stream(message, **options) if isinstance(event, Done))

    def stream_tools(
        self,
        message: str | Message | Sequence[Message],
        tools: Mapping[str, Callable[..., Any]],
        *,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        **options: Unpack[ToolRunOptions],
    ) -> Generator[ToolEvent]:
        """Say something, and have it answered with the help of functions, as `Engine.stream_tools` does.

        Each reply reads only what is new: the results of the tools before it. All that was said is added to `messages`
        when the run is over; a run that fails, or is abandoned, adds nothing.

        Args:
            message: as for `stream`.
            tools: functions by name, instead of the conversation's own schemas.
            max_rounds: the most replies.
            **options: as for `stream`, for each reply.
        """
        self._abandon()
        messages = [*self.messages, *self._said(message)]

        def answer(messages: Sequence[Message], schemas: Sequence[Message]) -> Iterator[Event]:
            merged = self._merged(cast(ChatOptions, {**options, "tools": schemas}))
            return self._answer(None, self._prepare(messages, merged), merged, keep_partial=False)

        run = self._run(messages, stream_tool_loop(answer, messages, tools, max_rounds=max_rounds))
        self._running = weakref.ref(run)
        return _until_superseded(run, ToolRun)

    def run_tools(
        self,
        message: str | Message | Sequence[Message],
        tools: Mapping[str, Callable[..., Any]],
        *,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        **options: Unpack[ToolRunOptions],
    ) -> ToolRun:
        """Say something, and have it answered with the help of functions: the last event of `stream_tools`."""
        events = self.stream_tools(message, tools, max_rounds=max_rounds, **options)
        return next(event for event in events if isinstance(event, ToolRun))

    def next_sampling(self) -> SamplingParams:
        """What the answer to a message without a switch of its own will be drawn with."""
        options = _request_options(self._merged({}))
        return choose_sampling(
            self.engine.model, self.engine.tokenizer, [*self.messages, _OPENING], self._unused, **options
        )

    def retry(self, *, keep_partial: bool = False, **options: Unpack[ChatOptions]) -> Generator[Event]:
        """Answer the last user's message anew; what followed it is replaced when the reply is there. See `stream`."""
        self._abandon()
        return self._begin(self.messages[: self._last_question() + 1], keep_partial, options)

    def undo(self) -> None:
        """Take back the last user's message and what followed it. Raises `MessagesError` if there is none."""
        self._abandon()
        del self.messages[self._last_question() :]

    def drop_oldest(self) -> None:
        """Forget the oldest turn: a question, its answer, and what tools had to do with it. A system message stays.

        Raises `MessagesError` if there is no turn but the last.
        """
        self._abandon()
        if not self.messages or count_turns(self.messages) < 2:
            raise MessagesError("conversation: found no turn but the last, expected an older one to drop")
        self.messages[:] = map(dict, without_oldest_turns(self.messages, 1))

    def clear(self) -> None:
        """Forget all that was said; a system message stays."""
        self._abandon()
        del self.messages[0 if self.system is None else 1 :]
        if not self._has_file:  # whose front the next question may share
            self._held.clear()

    def save(self, path: str | PathLike[str]) -> None:
        """Write messages and options to a JSON file, whole or not at all.

        Left out are `trust_special_tokens`, `prefill_chunk` and `on_prefill`, which are not for a file to say.

        Raises:
            MessagesError: messages that no conversation can hold.
            OptionError: the file cannot be written.
        """
        write_conversation(Path(path), _plain(self.messages) if self.messages else [], self.options)

    @classmethod
    def load(cls, path: str | PathLike[str], engine: Engine, **arguments: Any) -> Conversation:
        """The conversation that `save` wrote.

        Args:
            engine: any.
            **arguments: those of the constructor, such as `max_kv_size`, and options over those of the file.

        Raises:
            MessagesError: the file cannot be read, or is no sound conversation.
            OptionError: arguments that cannot be.
        """
        messages, options = read_conversation(Path(path))
        try:
            cls(engine, messages=messages, **options)
        except OptionError as error:
            raise MessagesError(f"{path}: {error.problem}", hint=error.hint) from None
        return cls(engine, messages=messages, **{**options, **arguments})

    # One turn

    def _said(self, message: str | Message | Sequence[Message]) -> list[dict[str, Any]]:
        """What is said, as messages that can be answered. Raises `MessagesError`."""
        if isinstance(message, str):
            said = [{"role": "user", "content": message}]
        else:
            said = _plain([message] if isinstance(message, Mapping) else message)
        if not said or said[-1].get("role") not in ("user", "tool"):
            # Roles that do not exist are told by the check of the whole conversation.
            check_conversation([*self.messages, *said])
            raise MessagesError(
                f"message: found role {said[-1]['role']!r} at the end, expected 'user' or 'tool', to be answered",
                hint="Engine.stream goes on with an assistant's message; thinking=False keeps a model from thinking.",
            )
        return said

    def _begin(self, messages: Sequence[dict[str, Any]], keep_partial: bool, given: ChatOptions) -> Generator[Event]:
        options = self._merged(given)
        turn = self._answer(messages, self._prepare(messages, options), options, keep_partial=keep_partial)
        self._running = weakref.ref(turn)  # a stream that nobody iterates any more is to end by itself
        return _until_superseded(turn, Done)

    def _run(self, messages: Sequence[dict[str, Any]], events: Generator[ToolEvent]) -> Generator[ToolEvent]:
        for event in events:
            if isinstance(event, ToolRun):
                self.messages[:] = [*messages, *map(dict, event.messages)]
            yield event

    def _answer(
        self,
        said: Sequence[dict[str, Any]] | None,
        request: PreparedRequest,
        options: ChatOptions,
        *,
        keep_partial: bool,
    ) -> Generator[Event]:
        """The events of a reply; `said` are the messages that it is added to, or None if its caller sees to that."""

        def add(reply: Reply) -> None:
            if said is not None:
                self.messages[:] = [*said, assistant_message(reply)]

        return stream_cached(
            self.engine.reply,
            self.engine.tokenizer,
            self._held,
            request,
            options,
            on_end=add,
            keep_partial=keep_partial,
            keep_prompt=self._has_file,
        )

    def _prepare(self, messages: Sequence[Message], options: ChatOptions) -> PreparedRequest:
        """What is sent; all that can be wrong with messages or options is raised."""
        model, tokenizer = self.engine.model, self.engine.tokenizer
        check_shared_options(tokenizer, options)
        try:
            return prepare_request(model, tokenizer, messages, self._unused, **_request_options(options))
        except ContextLengthError as error:
            raise ContextLengthError(error.problem, hint=_WAYS_OUT) from None

    def _merged(self, options: ChatOptions) -> ChatOptions:
        merged: dict[str, Any] = {**self.options, **options}
        check_option_names("a conversation", merged, [name for name in ChatOptions.__annotations__ if name != "cache"])
        # Turning off thinking for a turn sets a budget for all turns aside.
        switch = options.get("thinking") if "thinking_budget" in options else None
        check_budget_use(switch, merged.get("thinking_budget"), options.get("early_stop_text"))
        return cast(ChatOptions, merged)

    def _abandon(self) -> None:
        """End a stream that is still open."""
        turn = None if self._running is None else self._running()
        if turn is None:
            return
        if getgeneratorstate(turn) == GEN_RUNNING:
            raise OptionError(
                "conversation: found in use while it is answering, expected one use at a time",
                hint="Let the reply end, or close its stream, first.",
            )
        turn.close()

    def _last_question(self) -> int:
        messages = prepare_messages(self.messages) if self.messages else []
        for i in reversed(range(len(messages))):
            if messages[i]["role"] == "user":
                return i
        raise MessagesError("conversation: found no message of a user, expected one", hint="Say something first.")


def _until_superseded(events: Generator[_E], last: type) -> Generator[_E]:
    """The events, up to one of the type `last`. Raises `OptionError` if they were ended from elsewhere before it."""
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


def _request_options(options: ChatOptions) -> RequestOptions:
    named = {name: value for name, value in options.items() if name in RequestOptions.__annotations__}
    return cast(RequestOptions, named)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy out of plain JSON values. Raises `MessagesError`."""
    prepare_messages(messages)
    return [to_plain_json(message, f"messages[{i}]") for i, message in enumerate(messages)]
