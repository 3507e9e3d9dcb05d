"""`mlxqwen generate`: the answer to a prompt, a conversation or a batch."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.generate_options import (
    cache_options,
    check_usage,
    check_values,
    generate_options,
    load_engine,
    sampling_overrides,
)
from mlxqwen.cli.interrupts import INTERRUPTED, leave_at_once
from mlxqwen.cli.reply_printer import (
    ReplyPrinter,
    print_note,
    print_request,
    print_speed,
)
from mlxqwen.cli.terminal import PrefillProgress
from mlxqwen.cli.text_input import check_unicode, read_prompt, read_text, source_name

if TYPE_CHECKING:
    from mlxqwen.chat.request_files.conversations import MessagesWithTools
    from mlxqwen.engine.engine import Engine, Event

__all__ = ["generate"]


@click.command()
@generate_options
def generate(**options: Any) -> int:
    """Answer PROMPT ('-' reads standard input), a conversation, or a file of prompts.

    The answer goes to standard output, the model's reasoning to standard error. A terminal is shown control characters,
    bidirectional overrides and soft hyphens spelled out, such as \\u202e; pipes and files get what the model wrote.

    With --batch each answer becomes a line of --output with "index" (the line's number in the input, from 0), "id",
    "reasoning", "content", "tool_calls", "finish_reason" and "usage", or with "error" and perhaps "hint" if the
    line could not be answered. After any end of a run the same command goes on with the lines that have no answer.
    """
    check_usage(options)
    if options["drop_oldest"] and options["messages"] is None and options["batch"] is None:
        raise click.UsageError("--drop-oldest needs --messages or --batch: a prompt alone has no older turns.")
    if options["batch"] is not None:
        with leave_at_once():
            from mlxqwen.cli.batch import generate_batch
        return generate_batch(options)
    return _generate_one(options)


def _generate_one(options: Mapping[str, Any]) -> int:
    asked: str | MessagesWithTools
    asked = _read_text(options) if options["raw"] else _read_conversation(options)
    check_values(options)
    printer, progress = ReplyPrinter(as_json=options["as_json"]), PrefillProgress(sys.stderr)
    try:
        engine = load_engine(options)
        with closing(engine), closing(_events(engine, asked, options, progress)) as events:
            for event in events:
                printer.print(event)
    except KeyboardInterrupt:
        progress.wipe()
        printer.end(interrupted=True)
        return INTERRUPTED
    except Exception:
        progress.wipe()
        printer.end_lines()
        raise
    printer.end()
    if printer.done is not None and options["verbose"]:
        print_speed(printer.done)
    if printer.done is not None and not options["as_json"]:
        print_note(printer.done, options["max_tokens"], engine.model.config)
    return 0


def _read_text(options: Mapping[str, Any]) -> str:
    """The user's text."""
    file = options["prompt_file"]
    text = read_prompt(options["prompt"], None if file is None else Path(file), raw=options["raw"])
    check_unicode(prompt=text)
    return text


def _read_conversation(options: Mapping[str, Any]) -> MessagesWithTools:
    """Messages and tools from all options that give them."""
    with leave_at_once():
        from mlxqwen.chat.request_files.conversations import MessagesWithTools, parse_conversation, parse_tools

    messages, tools = options["messages"], options["tools"]
    conversation = MessagesWithTools(())
    if messages is not None:
        conversation = parse_conversation(read_text(messages), source_name(messages))
    if messages is None or options["prompt"] is not None or options["prompt_file"] is not None:
        conversation = conversation.with_user(_read_text(options))
    if tools is not None:
        conversation = conversation.with_tools(parse_tools(read_text(tools), source_name(tools)))
    return conversation.with_system(options["system"])


def _events(
    engine: Engine,
    asked: str | MessagesWithTools,
    options: Mapping[str, Any],
    progress: PrefillProgress,
) -> Generator[Event]:
    """Ask for the answer, and yield its events."""
    from mlxqwen.engine.request import CacheKind

    overrides, cache = sampling_overrides(options), cache_options(options)
    shared = ("early_stop_text", "stop", "stop_on_loop", "prefill_chunk")
    running: dict[str, Any] = {
        **{name: options[name] for name in shared},
        "on_prefill": progress,
    }
    request: dict[str, Any] = {
        "sampling": overrides,
        "max_tokens": options["max_tokens"],
        "thinking_budget": options["thinking_budget"],
    }
    if isinstance(asked, str):
        yield from _continue(engine, asked, {**request, **running, "cache": CacheKind(**cache)}, options)
        return
    own = ("thinking", "trust_special_tokens", "drop_oldest")
    request = {**request, **cache, **{name: options[name] for name in own}, "tools": asked.tools}
    if options["verbose"]:
        sampling = engine.sampling_for(asked.messages, **request)
        print_request(engine, sampling, options, overrides)
    yield from engine.stream(asked.messages, **request, **running)


def _continue(engine: Engine, text: str, request: dict[str, Any], options: Mapping[str, Any]) -> Iterator[Event]:
    """Continue a text: all of it is content, and no part is reasoning."""
    from mlxqwen.chat.thinking_modes import thinking_modes
    from mlxqwen.engine.engine import Done
    from mlxqwen.engine.text_generation import resolve_params

    thinks = thinking_modes(engine.tokenizer).default
    sampling = resolve_params(engine.model, request["sampling"], thinking=thinks)
    if options["verbose"]:
        print_request(engine, sampling, options, request["sampling"])
    for event in engine.reply(text, split=False, **{**request, "sampling": sampling}):
        yield replace(event, usage=replace(event.usage, reasoning_tokens=0)) if isinstance(event, Done) else event
