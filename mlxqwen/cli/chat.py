"""`mlxqwen chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxqwen import __version__
from mlxqwen.cli import is_out_of_memory
from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.defaults import told_defaults
from mlxqwen.cli.generate import generate
from mlxqwen.cli.generate_options import check_usage, check_values, sampling_overrides
from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.model_loading import load_engine
from mlxqwen.cli.spellings import ExistingFile, SpelledCommand, SpelledOption
from mlxqwen.cli.terminal import print_error
from mlxqwen.cli.text_input import check_unicode, read_text
from mlxqwen.cli.typed_ahead import typing_unseen
from mlxqwen.errors import HubError, MlxqwenError, OptionError, one_line
from mlxqwen.files.hub import located

if TYPE_CHECKING:
    from mlxqwen.cli.chat_input import Source
    from mlxqwen.cli.chat_session import ChatSession
    from mlxqwen.cli.chat_view import ChatView
    from mlxqwen.engine.engine import Engine

__all__ = ["chat"]

_NOT_IN_A_CHAT = {
    *("prompt", "prompt_option", "prompt_file", "messages", "tools", "json_schema", "raw"),
    *("batch", "output", "batch_size", "as_json", "quiet"),
}
_FILE = ExistingFile(exists=True, dir_okay=False)
_OWN = [
    click.Argument(["model_argument"], required=False, metavar="[MODEL]", shell_complete=complete_folder),
    click.Argument(["message"], required=False, metavar="[MESSAGE]"),
    SpelledOption(
        ["--messages"], group="Input", type=_FILE, metavar="FILE.json", help="Go on with a conversation, as /load does."
    ),
    SpelledOption(
        ["--tools"],
        group="Input",
        type=_FILE,
        metavar="FILE.json",
        help="Functions that the model may call: a list of their schemas. You type what they return.",
    ),
    SpelledOption(
        ["--history/--no-history"],
        group="Input",
        default=True,
        help="Keep the lines that are typed for the next chat, in a file that is yours alone; on by default.",
    ),
]
_MAX_LINE_BYTES = 64 * 1024 * 1024


class _Chat(SpelledCommand):
    """Tells of what is typed in the chat where it is given as an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from mlxqwen.cli.chat_commands import ALIASES, COMMANDS

            typed = f"/{error.option_name.lstrip('-').replace('-', '_')}"
            typed = ALIASES.get(typed, typed)
            if typed not in COMMANDS:
                raise
            way = "; --messages FILE begins with a conversation" if typed == "/load" else ""
            said = f"{typed} {COMMANDS[typed].argument}".strip()
            raise click.UsageError(
                f"No such option {error.option_name!r}. In the chat it is {said}{way}.", ctx
            ) from None


@click.command(cls=_Chat, params=[*_OWN, *(option for option in generate.params if option.name not in _NOT_IN_A_CHAT)])
@click.pass_context
def chat(context: click.Context, /, **options: Any) -> int:
    """Talk with MODEL, beginning with MESSAGE; /help lists what can be typed besides messages.

    MODEL may also be given by --model. A single argument with blanks in it is the message.

    If standard input is no terminal, each of its lines is a message or a command: answers go to standard output, all
    else to standard error.
    """
    options = _with_arguments(context, {**dict.fromkeys(_NOT_IN_A_CHAT), **options})
    check_usage(options)
    check_values(options)
    options = {**_with_files(options), "defaults": told_defaults(context)}
    with typing_unseen():
        return _run(load_engine(options), options)


def _check_word(word: str) -> None:
    """Raise `HubError` for a single word that is no model: it may be meant as a message."""
    try:
        located(word, None)
    except HubError as error:
        way_out = f"A first message of one word needs a model before it: mlxqwen chat MODEL {word}."
        raise HubError(error.problem, hint=f"{error.hint} {way_out}") from None


def _with_arguments(context: click.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the model and the first message from the arguments."""
    words = [word for name in ("model_argument", "message") if (word := options[name]) is not None]
    if context.get_parameter_source("model") is ParameterSource.COMMANDLINE:
        if len(words) > 1:
            raise click.UsageError(f"Give MODEL or --model, not both: found {words[0]!r} before the message.")
        if words and os.path.isdir(words[0]):
            raise click.UsageError(f"Give MODEL or --model, not both: {words[0]!r} is a folder, expected a message.")
        model = options["model"]
    elif words and (len(words) > 1 or not any(map(str.isspace, words[0])) or os.path.isdir(words[0])):
        model = words.pop(0)
        if not words:
            _check_word(model)
    else:
        model = options["model"]
    message = words[0] if words else None
    check_unicode(message=message)
    if message is not None and not message.strip():
        raise OptionError("message: found no text, expected the first words of the chat", hint="Leave it out.")
    return {**options, "model": model, "message": message}


def _with_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the schemas of --tools; both files are checked before a model is loaded."""
    with leave_at_once():
        from mlxqwen.chat.request_files.conversations import parse_tools
        from mlxqwen.engine.conversation_file import read_conversation

    if options["messages"] is not None:
        read_conversation(Path(options["messages"]))
    tools = options["tools"]
    return {
        **options,
        "tools": None if tools is None else list(parse_tools(read_text(tools, what="the tools, as JSON"), tools)),
    }


def _run(engine: Engine, options: Mapping[str, Any]) -> int:
    """The whole chat → the exit status."""
    with leave_at_once():
        from mlxqwen.cli.chat_history import history_path, open_history
        from mlxqwen.cli.chat_input import Keyboard, Lines
        from mlxqwen.cli.chat_session import ChatSession

    if options["verbose"]:
        sys.stderr.writelines(f"default: {one_line(line)}\n" for line in options["defaults"])
        _print_request(engine, options)
    message = options["message"]
    with engine:
        if not sys.stdin.isatty():
            session = ChatSession(engine, _plain_view(engine, folds=False), options, is_interactive=False)
            return _answer_lines(session, Lines(_stdin_lines()), message)
        view = _view(engine)
        _greet(view, options)
        session = ChatSession(engine, view, options, is_interactive=True)
        keyboard = Keyboard(open_history(history_path() if options["history"] else None))
        if message is not None:
            view.say(f"> {message}")
        _talk(session, view, keyboard, message)
    return 0


def _view(engine: Engine) -> ChatView:
    """The view for a user who types: on a terminal, or plain."""
    from mlxqwen.cli.chat_view import TerminalView

    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return TerminalView(sys.stdout, _token_counter(engine))
    return _plain_view(engine, folds=True)


def _plain_view(engine: Engine, *, folds: bool) -> ChatView:
    from mlxqwen.cli.chat_view import PlainView

    return PlainView(sys.stdout, sys.stderr, folds_reasoning=folds, count_tokens=_token_counter(engine))


def _token_counter(engine: Engine) -> Callable[[str], int]:
    """A function that counts the tokens of a thought, with the line breaks that Qwen3 puts around it."""
    return lambda thought: len(engine.tokenizer.encode_plain(f"\n{thought}\n"))


def _greet(view: ChatView, options: Mapping[str, Any]) -> None:
    model = options["model"] or "the demo model"
    view.say(f"mlxqwen {__version__}, {model}. /help lists what can be typed besides messages, Ctrl-D leaves.")


def _talk(session: ChatSession, view: ChatView, source: Source, message: str | None) -> None:
    """Answer until the user leaves; an error in a turn is printed, and the chat continues.

    Args:
        message: to the model, before anything is read.
    """
    while True:
        reads = message is None
        try:
            if message is not None:
                first, message = message, None
                session.say(first)
                continue
            text = source.read()
            reads = False
            if not session.handle(text):
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            view.say("Ctrl-C again leaves, and so does Ctrl-D." if reads else "Interrupted.")
        except MlxqwenError as error:
            print_error(error.problem, error.hint)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print_error("out of memory", "/drop or /clear make room; so do --kv-bits 8 and --max-kv-size.")


def _answer_lines(session: ChatSession, source: Source, message: str | None) -> int:
    """Answer `message`, if there is one, and one line after the other → 1 if one of them failed, else 0."""
    status = 0
    while True:
        try:
            if message is not None:
                first, message = message, None
                session.say(first)
            if not session.handle(source.read()):
                return status
        except EOFError:
            return status
        except MlxqwenError as error:
            print_error(error.problem, error.hint)
            status = 1


def _stdin_lines() -> Iterator[str]:
    number = 0
    while line := sys.stdin.buffer.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise OptionError(f"standard input: found more than {_MAX_LINE_BYTES:,} bytes in line {number}")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise OptionError(
                f"standard input: found byte {line[error.start]:#04x} in line {number}, expected UTF-8 text",
                hint="Convert it to UTF-8 first.",
            ) from None


def _print_request(engine: Engine, options: Mapping[str, Any]) -> None:
    from mlxqwen.cli.reply_printer import print_request

    overrides = sampling_overrides(options)
    opening = [{"role": "user", "content": "Hello"}]
    thinking = {name: options[name] for name in ("thinking", "thinking_budget")}
    sampling = engine.sampling_for(opening, **thinking, sampling=overrides)
    print_request(engine, sampling, options, overrides)
