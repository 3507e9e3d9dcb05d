"""`mlxqwen generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxqwen.cli.cache import conversion_progress
from mlxqwen.cli.interrupts import INTERRUPTED, leave_at_once
from mlxqwen.cli.terminal import PrefillProgress
from mlxqwen.cli.text_input import check_unicode, read_prompt
from mlxqwen.console import Output
from mlxqwen.errors import OptionError
from mlxqwen.json_file import parse_json

if TYPE_CHECKING:
    from mlxqwen.engine import Done, Engine, Event

__all__ = ["generate"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SAMPLING_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def apply(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_PROMPT = _options(
    click.argument("prompt", required=False),
    click.option("--model", metavar="MODEL", help="Folder or hub id; the demo model by default."),
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    click.option("--system", metavar="TEXT", help="System message."),
    click.option(
        "--prompt-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Read the prompt from a file.",
    ),
    click.option(
        "--thinking/--no-thinking",
        default=None,
        help="Let the model think first, or not; its chat template decides by default (Qwen3's thinks).",
    ),
    click.option("--raw", is_flag=True, help="Continue the prompt as it is, without a chat template."),
)
_SAMPLING = _options(
    click.option("--max-tokens", type=int, help="Longest answer; 32768 by default, bounded by the context."),
    click.option("--temperature", type=float, help="0 is greedy. By default the model card's profile."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this mass."),
    click.option("--top-k", type=int, help="Keep this many likeliest tokens; 0 keeps all."),
    click.option("--min-p", type=float, help="Keep tokens at least this likely relative to the likeliest."),
    click.option("--presence-penalty", type=float, help="Against tokens that the reply has; -2 to 2."),
    click.option("--frequency-penalty", type=float, help="The same, times how often; -2 to 2."),
    click.option("--repetition-penalty", type=float, help="Against tokens of prompt and reply; 1 is off."),
    click.option("--seed", type=int, help="The same seed draws the same answer."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."),
)
_MEMORY = _options(
    click.option("--max-kv-size", type=int, help="Keep at most this many tokens in the cache (a sliding window)."),
    click.option(
        "--kv-keep", type=int, help="First tokens that the window of --max-kv-size never drops; 4 by default."
    ),
    click.option("--kv-bits", type=click.Choice(["8", "4"]), help="Quantize the cache."),
    click.option("--prefill-chunk", type=int, default=512, show_default=True, help="Prompt tokens a step."),
    click.option("--yarn-factor", type=float, help="Extend the trained context this many times by YaRN."),
    click.option("--rope-scaling", metavar="JSON", help="RoPE scaling as in config.json."),
    click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute in this dtype."),
    click.option("--force", is_flag=True, help="Load even what does not fit this machine's memory."),
)
_OUTPUT = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done."),
    click.option("--verbose", is_flag=True, help="Tell on standard error what was used and how fast it was."),
)


@click.command()
@_PROMPT
@_SAMPLING
@_MEMORY
@_OUTPUT
def generate(prompt: str | None, prompt_file: Path | None, **options: Any) -> int:
    """Answer PROMPT ('-' reads standard input).

    The answer goes to standard output, the model's reasoning to standard error.
    """
    _check_usage(options)
    text = read_prompt(prompt, prompt_file, raw=options["raw"])
    check_unicode(prompt=text, system=options["system"], model=options["model"], stop="".join(options["stop"]))
    options["rope_scaling"] = _parse_rope_scaling(options["rope_scaling"])
    printer, progress = _Printer(as_json=options["as_json"]), PrefillProgress(sys.stderr)
    try:
        for event in _events(text, options, progress):
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
    if options["verbose"] and printer.done is not None:
        _print_speed(printer.done)
    if printer.done is not None and printer.done.finish_reason == "length" and not options["as_json"]:
        _print_cut_off(printer.done, options["max_tokens"])
    return 0


def _check_usage(options: dict[str, Any]) -> None:
    """Refuse options that would do nothing."""
    if options["raw"] and (options["system"] is not None or options["thinking"] is not None):
        raise click.UsageError("--raw knows no chat template: leave out --system and --thinking/--no-thinking.")
    if options["kv_keep"] is not None and options["max_kv_size"] is None:
        raise click.UsageError("--kv-keep needs --max-kv-size, whose window it is about.")


def _parse_rope_scaling(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    hint = """For example '{"rope_type": "yarn", "factor": 4.0}'."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise OptionError(f"--rope-scaling: not JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        raise OptionError(f"--rope-scaling: found {text}, expected a JSON object", hint=hint)
    return value


def _events(text: str, options: dict[str, Any], progress: PrefillProgress) -> Iterator[Event]:
    """Load the model and let it answer."""
    with leave_at_once():
        from mlxqwen.cache import make_cache
        from mlxqwen.completion import resolve_params, stream_generate
        from mlxqwen.engine import Engine, split_reply
        from mlxqwen.generation import DEFAULT_MAX_TOKENS
        from mlxqwen.sampling import SamplingParams
        from mlxqwen.stop import StopStrings

    overrides = {name: options[name] for name in _SAMPLING_NAMES if options[name] is not None}
    SamplingParams(**overrides)  # complains before a large model is read
    StopStrings(options["stop"])
    with conversion_progress() as on_convert:
        engine = Engine.load(
            options["model"],
            revision=options["revision"],
            dtype=options["dtype"],
            rope_scaling=options["rope_scaling"],
            yarn_factor=options["yarn_factor"],
            force=options["force"],
            on_convert=on_convert,
        )
    messages = [{"role": "user", "content": text}]
    if options["system"] is not None:
        messages.insert(0, {"role": "system", "content": options["system"]})
    if options["raw"]:
        sampling = resolve_params(engine.model, overrides, thinking=True)
    else:
        sampling = engine.sampling_for(messages, thinking=options["thinking"], sampling=overrides)
    request: dict[str, Any] = {
        "sampling": sampling,
        "max_tokens": DEFAULT_MAX_TOKENS if options["max_tokens"] is None else options["max_tokens"],
        "stop": options["stop"],
        "prefill_chunk": options["prefill_chunk"],
        "on_prefill": progress,
        "cache": make_cache(
            engine.model,
            max_kv_size=options["max_kv_size"],
            keep=4 if options["kv_keep"] is None else options["kv_keep"],
            kv_bits=None if options["kv_bits"] is None else int(options["kv_bits"]),
        ),
    }
    if options["verbose"]:
        _print_request(engine, request)
    if options["raw"]:
        responses = stream_generate(engine.model, engine.tokenizer, text, **request)
        return split_reply(responses, thinking=False)
    return engine.stream(messages, thinking=options["thinking"], **request)


class _Printer:
    """Events → standard output and standard error, or one JSON object at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.done: Done | None = None
        self._as_json = as_json
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._stdout, self._stderr = Output(sys.stdout), Output(sys.stderr, dim=True)

    def print(self, event: Event) -> None:
        from mlxqwen.engine import Done

        if isinstance(event, Done):
            self.done = event
        elif event.reasoning is not None:
            self._reasoning.append(event.reasoning)
            if not self._as_json:
                self._stderr.write(event.reasoning)
        elif event.content is not None:
            self._content.append(event.content)
            if not self._as_json:
                self._stderr.end_line()
                self._stdout.write(event.content)

    def end(self, *, interrupted: bool = False) -> None:
        """Finish open lines, or print the object."""
        if self._as_json:
            self._stdout.write(self._object(interrupted) + "\n")
        elif interrupted and not (self._stdout.is_terminal and self._stdout.line_is_open):
            self._stderr.line_is_open |= self._stderr.is_terminal  # the terminal itself wrote ^C there
        self.end_lines()

    def end_lines(self) -> None:
        """Finish open lines, so that what comes next begins its own."""
        self._stdout.end_line()
        self._stderr.end_line()

    def _object(self, interrupted: bool) -> str:
        done = self.done
        fields = {
            "reasoning": "".join(self._reasoning) or None,
            "content": "".join(self._content),
            "finish_reason": "interrupted" if interrupted or done is None else done.finish_reason,
            "usage": None if done is None else asdict(done.usage),
            "timings": None if done is None else asdict(done.timings),
        }
        return json.dumps(fields, ensure_ascii=not self._stdout.is_unicode)


def _print_request(engine: Engine, request: dict[str, Any]) -> None:
    config, cache = engine.model.config, request["cache"]
    window = "" if cache.max_kv_size is None else f", window {cache.max_kv_size:,} with {cache.keep} kept"
    bits = "" if cache.kv_bits is None else f", {cache.kv_bits}-bit cache"
    context = f"context {config.context_length:,}{window}{bits}"
    if config.rope_scaling is not None:
        context += f", YaRN factor {config.rope_scaling.factor:g}"
    used = ", ".join(f"{name} {value}" for name, value in asdict(request["sampling"]).items() if value is not None)
    sys.stderr.write(f"{context}, dtype {str(engine.model.dtype).rpartition('.')[2]}\n")
    bounded = "" if cache.max_kv_size is not None else " within the context"
    sys.stderr.write(f"sampling: {used}; at most {request['max_tokens']:,} tokens{bounded}\n")


def _print_cut_off(done: Done, max_tokens: int | None) -> None:
    """An answer that ends for want of tokens looks like any other, or like none."""
    tokens = done.usage.completion_tokens
    where = "in the middle of the answer" if done.reply.content else "before the answer"
    way_out = "raise --max-tokens" if tokens == max_tokens else "the context is full; --max-kv-size slides over it"
    sys.stderr.write(f"note: stopped after {tokens:,} tokens, {where}: {way_out}\n")


def _print_speed(done: Done) -> None:
    import mlx.core as mx

    usage, timings = done.usage, done.timings
    sys.stderr.write(
        f"prompt: {usage.prompt_tokens} tokens, {timings.prefill_tokens_per_second:.1f} tokens/s\n"
        f"answer: {usage.completion_tokens} tokens ({usage.reasoning_tokens} of reasoning), "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {done.finish_reason}\n"
        f"peak memory: {mx.get_peak_memory() / 1e9:.2f} GB\n"
    )
