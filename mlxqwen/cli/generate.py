"""`mlxqwen generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.generate_options import (
    check_usage,
    check_values,
    generate_options,
    load_engine,
    new_cache,
    sampling_overrides,
)
from mlxqwen.cli.interrupts import INTERRUPTED, leave_at_once
from mlxqwen.cli.reply_printer import ReplyPrinter, print_note, print_request, print_speed
from mlxqwen.cli.terminal import PrefillProgress
from mlxqwen.cli.text_input import check_unicode, read_prompt, read_text, source_name

if TYPE_CHECKING:
    from mlxqwen.engine import Event
    from mlxqwen.request_files import Conversation

__all__ = ["generate"]


@click.command()
@generate_options
def generate(**options: Any) -> int:
    """Answer PROMPT ('-' reads standard input), a conversation, or a file of prompts.

    The answer goes to standard output, the model's reasoning to standard error.

    With --batch each answer becomes a line of --output with "index" (the line's number in the input, from 0), "id",
    "reasoning", "content", "tool_calls", "finish_reason" and "usage", or with "error" if the line could not be
    answered. After any end of a run the same command goes on with the lines that have no answer.
    """
    check_usage(options)
    if options["batch"] is not None:
        with leave_at_once():
            from mlxqwen.cli.batch import generate_batch
        return generate_batch(options)
    return _generate_one(options)


def _generate_one(options: Mapping[str, Any]) -> int:
    asked: str | Conversation
    asked = _read_text(options) if options["raw"] else _read_conversation(options)
    check_values(options)
    printer, progress = ReplyPrinter(as_json=options["as_json"]), PrefillProgress(sys.stderr)
    try:
        for event in _events(asked, options, progress):
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
        print_note(printer.done, options["max_tokens"])
    return 0


def _read_text(options: Mapping[str, Any]) -> str:
    """What the user says."""
    file = options["prompt_file"]
    text = read_prompt(options["prompt"], None if file is None else Path(file), raw=options["raw"])
    check_unicode(prompt=text)
    return text


def _read_conversation(options: Mapping[str, Any]) -> Conversation:
    """Messages and tools from all options that give some."""
    with leave_at_once():
        from mlxqwen.request_files import Conversation, parse_conversation, parse_tools

    messages, tools = options["messages"], options["tools"]
    conversation = Conversation(())
    if messages is not None:
        conversation = parse_conversation(read_text(messages), source_name(messages))
    if messages is None or options["prompt"] is not None or options["prompt_file"] is not None:
        conversation = conversation.with_user(_read_text(options))
    if tools is not None:
        conversation = conversation.with_tools(parse_tools(read_text(tools), source_name(tools)))
    return conversation.with_system(options["system"])


def _events(asked: str | Conversation, options: Mapping[str, Any], progress: PrefillProgress) -> Iterator[Event]:
    """Load the model and let it answer."""
    with leave_at_once():
        from mlxqwen.completion import resolve_params, stream_generate
        from mlxqwen.engine import split_reply
        from mlxqwen.generation import DEFAULT_MAX_TOKENS

    overrides = sampling_overrides(options)
    engine = load_engine(options)
    thinking = {name: options[name] for name in ("thinking", "thinking_budget")}
    if isinstance(asked, str):
        sampling = resolve_params(engine.model, overrides, thinking=True)
    else:
        sampling = engine.sampling_for(asked.messages, **thinking, sampling=overrides)
    request: dict[str, Any] = {
        "sampling": sampling,
        "max_tokens": DEFAULT_MAX_TOKENS if options["max_tokens"] is None else options["max_tokens"],
        "thinking_budget": options["thinking_budget"],
        "early_stop_text": options["early_stop_text"],
        "stop": options["stop"],
        "stop_on_loop": options["stop_on_loop"],
        "prefill_chunk": options["prefill_chunk"],
        "on_prefill": progress,
        "cache": new_cache(engine, options),
    }
    if options["verbose"]:
        print_request(engine, sampling, options, overrides)
    if isinstance(asked, str):
        responses = stream_generate(engine.model, engine.tokenizer, asked, **request)
        return split_reply(responses, thinking=False)
    return engine.stream(
        asked.messages,
        thinking=options["thinking"],
        tools=asked.tools,
        trust_special_tokens=options["trust_special_tokens"],
        drop_oldest=options["drop_oldest"],
        **request,
    )
