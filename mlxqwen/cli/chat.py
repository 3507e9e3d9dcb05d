"""`mlxqwen chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from mlxqwen import __version__
from mlxqwen.cli import is_out_of_memory
from mlxqwen.cli.generate import generate
from mlxqwen.cli.generate_options import check_usage, check_values, load_engine, sampling_overrides
from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.terminal import print_error
from mlxqwen.errors import MlxqwenError, OptionError

if TYPE_CHECKING:
    from mlxqwen.cli.chat_input import Source
    from mlxqwen.cli.chat_session import ChatSession
    from mlxqwen.cli.chat_view import ChatView
    from mlxqwen.engine.engine import Engine

__all__ = ["chat"]

_NOT_IN_A_CHAT = {"prompt", "prompt_file", "messages", "tools", "raw", "batch", "output", "batch_size", "as_json"}
_MAX_LINE_BYTES = 64 * 1024 * 1024


@click.command(params=[option for option in generate.params if option.name not in _NOT_IN_A_CHAT])
def chat(**options: Any) -> int:
    """Talk with a model in the terminal; /help lists what can be typed besides messages.

    If standard input is no terminal, each of its lines is a message or a command: answers go to standard output, all
    else to standard error.
    """
    options = {**dict.fromkeys(_NOT_IN_A_CHAT), **options}
    check_usage(options)
    check_values(options)
    engine = load_engine(options)
    with leave_at_once():
        from mlxqwen.cli.chat_input import Keyboard, Lines
        from mlxqwen.cli.chat_session import ChatSession

    if options["verbose"]:
        _print_request(engine, options)
    status = 0
    with engine:
        if sys.stdin.isatty():
            view = _view(engine)
            session = ChatSession(engine, view, options, is_interactive=True)
            _greet(view, options)
            _talk(session, view, Keyboard())
        else:
            session = ChatSession(engine, _plain_view(engine, folds=False), options, is_interactive=False)
            status = _answer_lines(session, Lines(_stdin_lines()))
    return status


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


def _talk(session: ChatSession, view: ChatView, source: Source) -> None:
    """Answer until the user leaves; an error in a turn is printed, and the chat continues."""
    while True:
        reads = True
        try:
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


def _answer_lines(session: ChatSession, source: Source) -> int:
    """Answer one line after the other → 1 if one of them failed, else 0."""
    status = 0
    while True:
        try:
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
