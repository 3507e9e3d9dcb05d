"""`mlxqwen generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxqwen.cli.terminal import INTERRUPTED, ConversionProgress, Output, PrefillProgress
from mlxqwen.errors import OptionError

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
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
)
_MEMORY = _options(
    click.option("--max-kv-size", type=int, help="Keep at most this many tokens in the cache (a sliding window)."),
    click.option("--kv-keep", type=int, default=4, show_default=True, help="First tokens the window never drops."),
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
    text = _read_prompt(prompt, prompt_file, raw=options["raw"])
    rope_scaling = _parse_rope_scaling(options["rope_scaling"])
    if not text.strip():
        raise OptionError("prompt: found no text, expected a question", hint='For example: mlxqwen generate "Hello"')

    from mlxqwen.engine import Engine

    conversion = ConversionProgress(sys.stderr)
    try:
        engine = Engine.load(
            options["model"],
            revision=options["revision"],
            dtype=options["dtype"],
            rope_scaling=rope_scaling,
            yarn_factor=options["yarn_factor"],
            force=options["force"],
            on_convert=conversion,
        )
    finally:
        conversion.close()
    return _answer(engine, text, options)


def _read_prompt(prompt: str | None, prompt_file: Path | None, *, raw: bool) -> str:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("Give PROMPT or --prompt-file, not both.")
    if prompt_file is not None:
        source, data = str(prompt_file), prompt_file.read_bytes()
    elif prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        source, data = "standard input", sys.stdin.buffer.read()
    elif prompt is None:
        raise click.UsageError("Give a PROMPT, --prompt-file, or '-' for standard input.")
    else:
        return prompt
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{source}: found byte {data[error.start]:#04x} at {error.start}, expected UTF-8 text",
            hint="Convert it to UTF-8 first.",
        ) from None
    return text if raw else text.removesuffix("\n")


def _parse_rope_scaling(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"--rope-scaling: not JSON: {error}",
            hint="""For example '{"rope_type": "yarn", "factor": 4.0}'.""",
        ) from None
    if not isinstance(value, dict):
        raise OptionError(f"--rope-scaling: found {text}, expected a JSON object")
    return value


def _answer(engine: Engine, text: str, options: dict[str, Any]) -> int:
    from mlxqwen.cache import make_cache
    from mlxqwen.completion import resolve_params, stream_generate
    from mlxqwen.engine import split_reply
    from mlxqwen.generation import DEFAULT_MAX_TOKENS

    messages = [{"role": "user", "content": text}]
    if options["system"] is not None:
        messages.insert(0, {"role": "system", "content": options["system"]})
    overrides = {name: options[name] for name in _SAMPLING_NAMES}
    if options["raw"]:
        sampling = resolve_params(engine.model, overrides, thinking=True)
    else:
        sampling = engine.sampling_for(messages, thinking=options["thinking"], sampling=overrides)
    request: dict[str, Any] = {
        "sampling": sampling,
        "max_tokens": DEFAULT_MAX_TOKENS if options["max_tokens"] is None else options["max_tokens"],
        "stop": options["stop"],
        "prefill_chunk": options["prefill_chunk"],
        "on_prefill": PrefillProgress(sys.stderr),
        "cache": make_cache(
            engine.model,
            max_kv_size=options["max_kv_size"],
            keep=options["kv_keep"],
            kv_bits=None if options["kv_bits"] is None else int(options["kv_bits"]),
        ),
    }
    if options["raw"]:
        responses = stream_generate(engine.model, engine.tokenizer, text, **request)
        events = split_reply(responses, thinking=False)
    else:
        events = engine.stream(messages, thinking=options["thinking"], **request)
    if options["verbose"]:
        _print_request(engine, request)
    printer = _Printer(as_json=options["as_json"])
    try:
        for event in events:
            printer.print(event)
    except KeyboardInterrupt:
        printer.end(interrupted=True)
        return INTERRUPTED
    printer.end()
    if options["verbose"] and printer.done is not None:
        _print_speed(printer.done)
    return 0


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
            if self._reasoning and not self._content and not self._as_json:
                self._stderr.end_line()
            self._content.append(event.content)
            if not self._as_json:
                self._stdout.write(event.content)

    def end(self, *, interrupted: bool = False) -> None:
        """Finish open lines, or print the object."""
        if not self._as_json:
            (self._stdout if self._content else self._stderr).end_line()
            return
        fields: dict[str, Any] = {
            "reasoning": "".join(self._reasoning) or None,
            "content": "".join(self._content),
            "finish_reason": "interrupted" if interrupted else None,
        }
        if self.done is not None:
            fields["finish_reason"] = self.done.finish_reason
            fields["usage"] = asdict(self.done.usage)
            fields["timings"] = asdict(self.done.timings)
        self._stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _print_request(engine: Engine, request: dict[str, Any]) -> None:
    config, cache = engine.model.config, request["cache"]
    window = "" if cache.max_kv_size is None else f", window {cache.max_kv_size:,} with {cache.keep} kept"
    bits = "" if cache.kv_bits is None else f", {cache.kv_bits}-bit cache"
    context = f"context {config.context_length:,}{window}{bits}"
    if config.rope_scaling is not None:
        context += f", YaRN factor {config.rope_scaling.factor:g}"
    used = ", ".join(f"{name} {value}" for name, value in asdict(request["sampling"]).items() if value is not None)
    sys.stderr.write(f"{context}, dtype {str(engine.model.dtype).rpartition('.')[2]}\n")
    sys.stderr.write(f"sampling: {used}, max_tokens {request['max_tokens']}\n")


def _print_speed(done: Done) -> None:
    import mlx.core as mx

    usage, timings = done.usage, done.timings
    sys.stderr.write(
        f"prompt: {usage.prompt_tokens} tokens, {timings.prefill_tokens_per_second:.1f} tokens/s\n"
        f"answer: {usage.completion_tokens} tokens ({usage.reasoning_tokens} of reasoning), "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {done.finish_reason}\n"
        f"peak memory: {mx.get_peak_memory() / 1e9:.2f} GB\n"
    )
