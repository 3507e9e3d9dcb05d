"""`mlxqwen generate`: the answer to a prompt, a conversation or a batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from secrets import randbelow
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.defaults import told_defaults
from mlxqwen.cli.generate_options import (
    cache_options,
    check_usage,
    check_values,
    files_named,
    read_form,
    sampling_overrides,
)
from mlxqwen.cli.interrupts import INTERRUPTED, leave_at_once
from mlxqwen.cli.model_loading import load_engine
from mlxqwen.cli.option_list import generate_options
from mlxqwen.cli.piped_input import PromptWords, read_context, with_context
from mlxqwen.cli.reply_printer import (
    ReplyPrinter,
    print_note,
    print_request,
    print_short_speed,
    print_speed,
)
from mlxqwen.cli.spellings import SpelledCommand
from mlxqwen.cli.terminal import PrefillProgress, be_quiet
from mlxqwen.cli.text_input import check_unicode, read_prompt, read_text, source_name
from mlxqwen.errors import OptionError, one_line

if TYPE_CHECKING:
    from mlxqwen.chat.request_files.conversations import MessagesWithTools
    from mlxqwen.chat.structured.response_format import AnswerFormat
    from mlxqwen.engine.engine import Done, Engine, Event

__all__ = ["generate"]


@click.command(cls=SpelledCommand)
@generate_options
@click.pass_context
def generate(ctx: click.Context, /, **options: Any) -> int:
    """Answer PROMPT, a conversation, or a file of prompts.

    What is piped in beside PROMPT is its context: git diff | mlxqwen generate "Review this". It stands before PROMPT,
    or where '-' is: mlxqwen generate "Review this:" - "Be brief.". Alone, '-' or a pipe is the whole prompt.

    The answer goes to standard output, the model's reasoning to standard error. A terminal is shown control characters,
    bidirectional overrides and soft hyphens spelled out, such as \\u202e; pipes and files get what the model wrote.

    With --batch each answer becomes a line of --output with "index" (the line's number in the input, from 0), "id",
    "reasoning", "content", "tool_calls", "finish_reason" and "usage" (and "yarn_factor" with --yarn auto), or with
    "error" and perhaps "hint" if the line could not be answered. After any end of a run the same command goes on with
    the lines that have no answer.
    """
    words = PromptWords.parse(_prompt_words(options))
    options["prompt"] = words.prompt
    check_usage(options)
    if options["quiet"]:
        be_quiet()
    if options["verbose"]:
        sys.stderr.writelines(f"default: {one_line(line)}\n" for line in told_defaults(ctx))
    if options["drop_oldest"] and options["messages"] is None and options["batch"] is None:
        raise click.UsageError("--drop-oldest needs --messages or --batch: a prompt alone has no older turns.")
    if options["batch"] is not None:
        with leave_at_once():
            from mlxqwen.cli.batch import generate_batch
        return generate_batch(options)
    return _generate_one(options, words)


def _model(options: Mapping[str, Any]) -> str:
    """The name of the model: its id, as it was given, or that of the demo."""
    from mlxqwen.files.model_names import DEMO_NAME

    given = options["model"]
    if given is None:
        return DEMO_NAME
    from mlxqwen.files.aliases import hub_id_of_alias

    return given if os.path.isdir(given) else hub_id_of_alias(given) or given


def _prompt_words(options: Mapping[str, Any]) -> Sequence[str]:
    """PROMPT, which may also be given as --prompt."""
    words: Sequence[str] = options["prompt"]
    if options["prompt_option"] is None:
        return words
    if words:
        raise click.UsageError("Give PROMPT or --prompt, not both.")
    return [options["prompt_option"]]


def _generate_one(options: Mapping[str, Any], words: PromptWords) -> int:
    asked: str | MessagesWithTools
    asked = _read_text(options, words) if options["raw"] else _read_conversation(options, words)
    form = read_form(options)
    check_values(options)
    # Drawn here where none is given, so that it can be told, and the answer drawn again.
    options = {**options, "seed": randbelow(1 << 32) if options["seed"] is None else options["seed"]}
    told = {"model": _model(options), "seed": options["seed"]}
    printer = ReplyPrinter(as_json=options["as_json"], hides_reasoning=options["quiet"], asked=told)
    progress = PrefillProgress(sys.stderr)
    try:
        engine = load_engine(options)
        progress.begin()
        with files_named(options), closing(engine), closing(_events(engine, asked, form, options, progress)) as events:
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
    elif printer.done is not None and not options["as_json"] and not options["quiet"]:
        print_short_speed(printer.done)
    _check_answered(asked, printer.done, options)
    if printer.done is not None and not options["as_json"] and not options["quiet"]:
        print_note(printer.done, options["max_tokens"], engine.model.config)
    return 0


def _check_answered(asked: str | MessagesWithTools, done: Done | None, options: Mapping[str, Any]) -> None:
    """Raise `OptionError` if nothing was added to a conversation that ends with an answer."""
    from mlxqwen.chat.reply import Reply

    if isinstance(asked, str) or done is None or asked.messages[-1]["role"] != "assistant":
        return
    if done.reply == Reply(None, ""):
        raise OptionError(
            f"{source_name(options['messages'])}: ends with an answer, to which the model has added nothing, "
            "expected a question at the end",
            hint='Ask one: mlxqwen generate --messages FILE "And then?"',
        )


def _read_text(options: Mapping[str, Any], words: PromptWords) -> str:
    """The user's text: the prompt, with what was piped in beside it."""
    file, raw = options["prompt_file"], options["raw"]
    text = words.around(read_prompt(options["prompt"], None if file is None else Path(file), raw=raw), raw=raw)
    stdin_is_free = "-" not in (options["prompt"], options["messages"], options["tools"], options["json_schema"])
    if stdin_is_free and not raw and (options["prompt"] is not None or file is not None):
        context = read_context()
        text = with_context(text, context) if context else text
    check_unicode(prompt=text)
    return text


def _read_conversation(options: Mapping[str, Any], words: PromptWords) -> MessagesWithTools:
    """Messages and tools from all options that give them."""
    with leave_at_once():
        from mlxqwen.chat.request_files.conversations import MessagesWithTools, parse_conversation, parse_tools

    messages, tools = options["messages"], options["tools"]
    conversation = MessagesWithTools(())
    if messages is not None:
        conversation = parse_conversation(read_text(messages, what="the messages, as JSON"), source_name(messages))
    if messages is None or options["prompt"] is not None or options["prompt_file"] is not None:
        conversation = conversation.with_user(_read_text(options, words))
    if tools is not None:
        conversation = conversation.with_tools(
            parse_tools(read_text(tools, what="the tools, as JSON"), source_name(tools))
        )
    return conversation.with_system(options["system"])


def _events(
    engine: Engine,
    asked: str | MessagesWithTools,
    form: AnswerFormat | None,
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
        "response_format": form,
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
    """Continue a text: all of it is content, and no part is reasoning, but where the content has to fit a schema."""
    from mlxqwen.chat.thinking_modes import thinking_modes
    from mlxqwen.engine.engine import Done
    from mlxqwen.engine.text_generation import resolve_params

    thinks = thinking_modes(engine.tokenizer).default
    sampling = resolve_params(engine.model, request["sampling"], thinking=thinks)
    if options["verbose"]:
        print_request(engine, sampling, options, request["sampling"])
    splits = request["response_format"] is not None
    for event in engine.reply(text, split=splits, **{**request, "sampling": sampling}):
        if splits:
            yield event
            continue
        yield replace(event, usage=replace(event.usage, reasoning_tokens=0)) if isinstance(event, Done) else event
