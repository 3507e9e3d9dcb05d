"""A session of `mlxqwen chat`: what each message and command does."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxqwen.cli.chat_answer import show_answer
from mlxqwen.cli.chat_calls import OpenCalls
from mlxqwen.cli.chat_commands import HELP, HELP_INDENT, ChatCommand, Message, parse_line
from mlxqwen.cli.chat_room import check_system_fits, explained
from mlxqwen.cli.chat_thinking import describe_thinking, without_sentence
from mlxqwen.cli.chat_view import ChatView
from mlxqwen.cli.generate_options import sampling_overrides
from mlxqwen.cli.reply_printer import print_note, print_speed
from mlxqwen.console import counted
from mlxqwen.engine.conversation import Conversation
from mlxqwen.engine.engine import Engine
from mlxqwen.engine.events import Done, Event
from mlxqwen.engine.text_generation import drafts_line, yarn_line
from mlxqwen.errors import ContextLengthError, MlxqwenError, OptionError

__all__ = ["ChatSession"]

_WORDS_TO_LEAVE = ("exit", "quit")  # of users of llm, Python and mlx-lm
_MOST_BUDGET = 999_999_999


class ChatSession:
    """A conversation, the options of its turns, and its view.

    Args:
        options: those of the command line, as click gives them, but for `tools`, which are checked schemas or None.
        is_interactive: whether somebody is there to stop an answer by Ctrl-C and go on.
    """

    def __init__(
        self,
        engine: Engine,
        view: ChatView,
        options: Mapping[str, Any],
        *,
        is_interactive: bool,
    ) -> None:
        self._engine = engine
        self._view = view
        self._is_interactive = is_interactive
        self._is_verbose = bool(options["verbose"])
        self._given = {**_cache_options(options), **_turn_options(options)}
        self._conversation = _conversation(engine, options, self._given)
        self._calls = OpenCalls()
        self._answers = 0
        self._last: Done | None = None
        self._was_stopped = False
        self._file: Path | None = None  # that the conversation was last saved to or loaded from
        if options["messages"] is not None:
            self._file = Path(options["messages"])
            self._tell_loaded(options["messages"])

    def handle(self, text: str) -> bool:
        """Do what was typed → whether the chat continues.

        Raises:
            MlxqwenError: it could not be done, and nothing has changed.
        """
        if self._is_interactive and text.strip() in _WORDS_TO_LEAVE:
            return False
        said = parse_line(text)
        if isinstance(said, Message):
            self.say(said.text)
        elif isinstance(said, ChatCommand):
            if said.name == "/quit":
                return False
            self._do(said)
        return True

    # Answers

    def say(self, text: str) -> None:
        """Send a message, or the result of a call that waits for one, and show the answer."""
        said: str | list[dict[str, Any]] | None = text
        if self._calls.are_open(self._conversation.messages):
            said = self._calls.take(self._conversation.messages, text)
        if said is None:
            self._ask_for_result()
        else:
            message = said
            new = [{"role": "user", "content": message}] if isinstance(message, str) else message
            try:
                self._answer(
                    [*self._conversation.messages, *new],
                    lambda options: self._conversation.stream(message, keep_partial=True, **options),
                )
            except MlxqwenError:
                if not isinstance(message, str):  # the result is asked for again
                    self._calls.take_back()
                raise

    def _ask_for_result(self) -> None:
        question = self._calls.next_question(self._conversation.messages)
        if question is not None:
            self._view.say(question)

    def _counted(self, events: Generator[Event]) -> Generator[Event]:
        """The events, at their end without the sentence of a budget among the tokens of the thought."""
        with closing(events):
            for event in events:
                if isinstance(event, Done):
                    event = without_sentence(event, self._engine.tokenizer, self._options)
                yield event

    def _answer(self, asked: Sequence[Mapping[str, Any]], begin: Callable[[dict[str, Any]], Generator[Event]]) -> None:
        """Show the answer that `begin` streams to the messages `asked`."""
        seed = self._options.get("seed")
        options: dict[str, Any] = {} if seed is None else {"seed": seed + self._answers}
        try:
            answer = show_answer(
                lambda on_prefill: self._counted(begin({**options, "on_prefill": on_prefill})),
                self._view,
                stoppable=self._is_interactive,
            )
        except ContextLengthError as error:
            raise explained(error, self._engine, asked, self._options) from None
        self._answers += 1
        if answer.done is not None or answer.has_begun:
            self._last, self._was_stopped = answer.done, answer.done is None
        if answer.done is not None:
            if self._is_verbose:
                print_speed(answer.done)
            print_note(answer.done, self._options.get("max_tokens"), self._engine.model.config)
            self._ask_for_result()
        elif answer.has_begun:
            self._conversation.messages[-1].pop("tool_calls", None)  # the last may be half a call
            self._view.say("Stopped; what is shown stays.")
        else:
            self._view.say("Stopped before the first word: nothing has changed.")

    def _retry(self) -> None:
        asked = self._conversation.messages
        self._answer(asked, lambda options: self._conversation.retry(keep_partial=True, **options))

    @property
    def _options(self) -> dict[str, Any]:
        """The options of the next turns, which are saved and loaded with the conversation."""
        return self._conversation.options

    # Commands

    def _do(self, command: ChatCommand) -> None:
        actions: dict[str, Callable[[str], None]] = {
            "/think": lambda _: self._set_thinking(True),
            "/no_think": lambda _: self._set_thinking(False),
            "/budget": self._set_budget,
            "/reasoning": self._fold,
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/undo": lambda _: self._undo(),
            "/drop": lambda _: self._drop(),
            "/retry": lambda _: self._retry(),
            "/stats": lambda _: self._view.say(self._stats()),
            "/clear": lambda _: self._clear(),
            "/help": lambda _: self._view.say(HELP, hanging=HELP_INDENT),
        }
        actions[command.name](command.argument)

    def _set_thinking(self, thinks: bool) -> None:
        self._options["thinking"] = thinks
        if self._options.get("thinking_budget") == 0:
            self._options["thinking_budget"] = None
        self._view.say(self._describe_thinking())

    def _set_budget(self, argument: str) -> None:
        is_number = argument.isascii() and argument.isdecimal() and len(argument) < 1_000
        if is_number or argument == "off":
            budget = int(argument) if is_number else None
            if budget is not None and budget > _MOST_BUDGET:
                raise OptionError(f"/budget: found {argument}, expected at most {_MOST_BUDGET:,} tokens, or off")
            self._options["thinking_budget"] = budget
            if budget == 0 or self._options.get("thinking") is False:
                self._options["thinking"] = None
        elif argument:
            raise OptionError(f"/budget: found {argument!r}, expected a number of tokens, or off")
        self._view.say(self._describe_thinking())

    def _describe_thinking(self) -> str:
        return describe_thinking(self._engine.tokenizer, self._options)

    def _fold(self, argument: str) -> None:
        if argument in ("show", "hide"):
            self._view.folds_reasoning = argument == "hide"
            self._view.say(f"Reasoning: {'folded into a line' if argument == 'hide' else 'shown'}.")
        elif argument:
            raise OptionError(f"/reasoning: found {argument!r}, expected show, hide or nothing")
        else:
            self._view.say(self._last_reasoning() or "There was no reasoning in the last answer.")

    def _last_reasoning(self) -> str:
        for message in reversed(self._conversation.messages):
            if message["role"] == "assistant":
                return str(message.get("reasoning_content") or "")
        return ""

    def _set_system(self, argument: str) -> None:
        if argument and argument != "-":
            check_system_fits(self._engine, argument, self._given)
        if argument:
            self._conversation.system = None if argument == "-" else argument
        system = self._conversation.system
        self._view.say("No system message." if system is None else f"System message: {system}")

    def _save(self, argument: str) -> None:
        path = _path("/save", argument)
        if os.path.lexists(path) and path != self._file:
            raise OptionError(f"/save: found {path} there already", hint="Choose another name, or remove it first.")
        self._conversation.save(path)
        self._file = path
        self._view.say(f"Saved {self._count()} to {path}.")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        conversation = Conversation.load(path, self._engine, **self._given)
        self._conversation, self._file = conversation, path
        self._forget_last()
        self._tell_loaded(path)

    def _tell_loaded(self, path: Path | str) -> None:
        messages = self._conversation.messages
        is_open = bool(messages) and messages[-1]["role"] in ("user", "tool")
        unanswered = " The last message has no answer yet: /retry answers it." if is_open else ""
        self._view.say(f"Loaded {self._count()} from {path}.{unanswered}")
        self._ask_for_result()

    def _undo(self) -> None:
        self._conversation.undo()
        self._forget_last()
        self._view.say(f"Undone; {self._count()} left.")

    def _drop(self) -> None:
        self._conversation.drop_oldest()
        self._forget_last()
        self._view.say(f"Dropped the oldest turn; {self._count()} left.")

    def _clear(self) -> None:
        self._conversation.clear()
        self._file = None
        self._forget_last()
        self._view.say("Cleared." if self._conversation.system is None else "Cleared, but for the system message.")

    def _count(self) -> str:
        return counted(len(self._conversation.messages), "message")

    def _forget_last(self) -> None:
        self._last, self._was_stopped = None, False

    def _stats(self) -> str:
        none = (
            "The last answer was stopped: its tokens were not counted."
            if self._was_stopped
            else "There is no last answer."
        )
        return (
            (
                _last_answer(self._last, self._engine, self._given.get("max_kv_size"))
                if self._last is not None
                else f"{none}\n"
            )
            + f"Conversation: {self._count()}.\n"
            + f"{self._describe_thinking()}\n"
            + f"Answers are drawn with {self._sampling()}.\n"
        )

    def _sampling(self) -> str:
        params = self._conversation.next_sampling()
        return ", ".join(f"{name} {value}" for name, value in asdict(params).items() if value is not None)


def _conversation(engine: Engine, options: Mapping[str, Any], given: Mapping[str, Any]) -> Conversation:
    """A new conversation, or that of --messages."""
    system = {} if options["system"] is None else {"system": options["system"]}
    try:
        if options["messages"] is None:
            return Conversation(engine, **system, **given)
        return Conversation.load(options["messages"], engine, **system, **given)
    except ContextLengthError as error:  # whatever is asked, the functions leave it no room
        raise explained(error, engine, [{"role": "user", "content": "Hello"}], given) from None


def _path(command: str, argument: str) -> Path:
    """The one file name in the argument of a command, with quotes as in a shell."""
    hint = f'Put a name with blanks or quotes in quotes, such as {command} "my chat.json".'
    try:
        name, *others = shlex.split(argument)
    except ValueError as error:
        raise OptionError(f"{command}: found {argument!r}: {str(error).lower()}", hint=hint) from None
    if others or not name:
        raise OptionError(f"{command}: found {argument!r}, expected one file name", hint=hint)
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise OptionError(f"{command}: found {name!r}, whose user has no home folder") from None


def _cache_options(options: Mapping[str, Any]) -> dict[str, Any]:
    keep, bits = options["kv_keep"], options["kv_bits"]
    given = {"max_kv_size": options["max_kv_size"], "keep": keep, "kv_bits": None if bits is None else int(bits)}
    return {name: value for name, value in given.items() if value is not None}


def _turn_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; a conversation's file or the model decides the others."""
    names = ("thinking", "thinking_budget", "early_stop_text", "max_tokens", "seed", "prefill_chunk")
    switches = ("tools", "drop_oldest", "stop", "stop_on_loop", "trust_special_tokens")
    sampling = {name: value for name, value in sampling_overrides(options).items() if name != "seed"}
    return {
        **{name: options[name] for name in names if options[name] is not None},
        **{name: options[name] for name in switches if options[name]},
        **({"sampling": sampling} if sampling else {}),
    }


def _last_answer(done: Done, engine: Engine, window: int | None) -> str:
    usage, timings = done.usage, done.timings
    context = engine.model.config.context_length
    slides = window is not None and window <= context
    of_what = f"tokens, a window of {window:,} slides over them" if slides else f"of {context:,} tokens"
    ended = ", all that its budget allows" if usage.budget_exhausted else ""
    tokens = usage.prompt_tokens + usage.completion_tokens
    return (
        f"Prompt: {counted(usage.prompt_tokens, 'token')}, {usage.cached_tokens:,} of them from the cache, "
        f"the others at {timings.prefill_tokens_per_second:.1f} tokens/s.\n"
        f"Answer: {counted(usage.completion_tokens, 'token')}, {usage.reasoning_tokens:,} of reasoning{ended}, "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {done.finish_reason}.\n"
        f"{drafts_line('Drafts', usage.drafted_tokens, usage.accepted_tokens)}"
        f"{yarn_line('YaRN', done.yarn_factor)}"
        f"Context: {tokens:,} {of_what}.\n"
    )
