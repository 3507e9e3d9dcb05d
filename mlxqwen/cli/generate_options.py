"""The options of `mlxqwen generate`: their definitions, their checks, and the values made of them.

One file, so that what an option is, what it may be and what it becomes stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.conversion_progress import conversion_progress
from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.text_input import check_unicode, read_text, source_name
from mlxqwen.errors import OptionError
from mlxqwen.files.json_file import parse_json

if TYPE_CHECKING:
    from mlxqwen.cache import KVCache
    from mlxqwen.chat.structured.response_format import AnswerFormat
    from mlxqwen.engine.engine import Engine

__all__ = [
    "CacheOptions",
    "cache_options",
    "check_model_options",
    "check_usage",
    "check_values",
    "generate_options",
    "load_engine",
    "new_cache",
    "options_named",
    "read_form",
    "sampling_overrides",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)

DEFAULT_KV_KEEP = 4


class CacheOptions(TypedDict):
    """The options of a cache, as `mlxqwen.make_cache` takes them."""

    max_kv_size: int | None
    keep: int
    kv_bits: int | None


_MOST_TOKENS = 1 << 40

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
_PROMPT = (
    click.argument("prompt", nargs=-1, metavar="[PROMPT]"),
    click.option(
        "--model",
        metavar="MODEL",
        shell_complete=complete_folder,
        help="Folder or hub id, modelscope:ID for one of ModelScope; the demo model by default.",
    ),
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    click.option("--system", metavar="TEXT", help="System message."),
    click.option(
        "--prompt-file",
        type=click.Path(exists=True, dir_okay=False),
        help="Read the prompt from a file.",
    ),
    click.option(
        "--messages",
        type=_FILE,
        metavar="FILE.json",
        help='Go on with a conversation: a list of messages, {"messages": […], "tools": […]}, or what /save in the '
        'chat has written, without its options; "-" reads standard input. A prompt given besides is the '
        "user's next message.",
    ),
    click.option(
        "--tools",
        type=_FILE,
        metavar="FILE.json",
        help="Functions that the model may call: a list of their schemas. Calls are printed behind the answer, a JSON "
        "line each.",
    ),
    click.option(
        "--json-schema",
        type=_FILE,
        metavar="FILE.json",
        help="Answer with JSON that fits this schema, behind a free thought.",
    ),
    click.option(
        "--drop-oldest",
        is_flag=True,
        help="Leave out the oldest turns of a conversation that is too long; system messages stay.",
    ),
    click.option(
        "--raw",
        is_flag=True,
        help="Continue the prompt as it is, without a chat template: <|im_end|> and the like in it are tokens, "
        "and all of the reply is content.",
    ),
    click.option(
        "--trust-special-tokens",
        is_flag=True,
        help="Read <|im_end|>, <think> and the like in messages as tokens; by default they are text.",
    ),
)
_BATCH = (
    click.option(
        "--batch",
        type=_FILE,
        metavar="FILE.jsonl",
        help='Answer many prompts: {"prompt": …} or {"messages": […]} a line, if wanted with "id", "tools", '
        '"max_tokens", "thinking", "thinking_budget", "seed", "sampling" and "response_format" of its own. Needs '
        "--output.",
    ),
    click.option(
        "--output",
        type=click.Path(),
        metavar="FILE.jsonl",
        help="Where the answers to --batch go, as they are finished. If it has some already, the others are added.",
    ),
    click.option("--batch-size", type=int, help="Prompts that are answered at once; 8 by default."),
)
_THINKING = (
    click.option(
        "--thinking/--no-thinking",
        default=None,
        help="Let the model think first, or not; its chat template decides by default (Qwen3's thinks).",
    ),
    click.option("--thinking-budget", type=int, metavar="N", help="End the thought after N tokens; 0 is no thought."),
    click.option("--early-stop-text", metavar="TEXT", help="The sentence that ends it then; Qwen's by default."),
)
_SAMPLING = (
    click.option("--max-tokens", type=int, help="Longest answer; 32768 by default, bounded by the context."),
    click.option("--temperature", type=float, help="0 is greedy. By default the model card's profile."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this mass."),
    click.option("--top-k", type=int, help="Keep this many likeliest tokens; 0 keeps all."),
    click.option("--min-p", type=float, help="Keep tokens at least this likely relative to the likeliest."),
    click.option("--presence-penalty", type=float, help="Against tokens that the reply has; -2 to 2."),
    click.option("--frequency-penalty", type=float, help="The same, times how often; -2 to 2."),
    click.option("--repetition-penalty", type=float, help="Against tokens of prompt and reply; 1 is off."),
    click.option("--seed", type=int, help="The same seed draws the same answer."),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End the answer before this text; may be repeated, up to 64 times.",
    ),
    click.option("--stop-on-loop", is_flag=True, help="End a reply that goes round in circles."),
)
_MEMORY = (
    click.option("--max-kv-size", type=int, help="Keep at most this many tokens in the cache (a sliding window)."),
    click.option(
        "--kv-keep",
        type=int,
        help=f"First tokens that the window of --max-kv-size never drops; {DEFAULT_KV_KEEP} by default.",
    ),
    click.option("--kv-bits", type=click.Choice(["8", "4"]), help="Quantize the cache."),
    click.option(
        "--prompt-cache",
        type=click.Path(),
        metavar="FOLDER",
        help="Keep what was read of prompts and replies in this folder, and read only what is new in the next run. It "
        "takes at most a tenth of the disk; what was not used for longest goes first.",
    ),
    click.option(
        "--prefix-cache",
        metavar="SIZE",
        help='Memory for what was read, shared by all answers of a run, such as 2GB; "off" keeps nothing. By default '
        "an eighth of what the machine has for models.",
    ),
    click.option(
        "--prefill-chunk", type=int, help="Prompt tokens a step; 512 by default, fewer for wide models on a CPU."
    ),
    click.option("--yarn-factor", type=float, help="Extend the trained context this many times by YaRN."),
    click.option(
        "--yarn",
        type=click.Choice(["auto"]),
        help="Scale each prompt by its own length: not at all if it fits the trained context with its --max-tokens (or "
        "4,096 tokens, at most a quarter of that context), else by YaRN's factor 2 or 4.",
    ),
    click.option("--rope-scaling", metavar="JSON", help="RoPE scaling as in config.json."),
    click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute in this dtype."),
    click.option("--force", is_flag=True, help="Load even what does not fit this machine's memory."),
    click.option("--ignore-adapter", is_flag=True, help="Leave out an adapter that lies beside the weights."),
)
_SPECULATION = (
    click.option(
        "--speculative",
        type=click.Choice(["lookup"]),
        help="Guess that the text goes on as it did before, several tokens at once: passes are saved where a reply "
        "repeats its prompt, and the reply is the same but for rounding. On a CPU all but tiny models get slower.",
    ),
    click.option(
        "--draft",
        metavar="MODEL",
        shell_complete=complete_folder,
        help="Let a smaller model with the same tokenizer guess, folder or hub id; the reply is the same but for "
        "rounding. On a CPU it gets slower.",
    ),
    click.option("--draft-tokens", type=int, help="The most tokens that are guessed at once, up to 64; 8 by default."),
)
_OUTPUT = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done."),
    click.option("--verbose", is_flag=True, help="Tell on standard error what was used and how fast it was."),
)


def generate_options(command: _Command) -> _Command:
    """Add all options to a command, in the order of the help."""
    for option in reversed((*_PROMPT, *_BATCH, *_THINKING, *_SAMPLING, *_SPECULATION, *_MEMORY, *_OUTPUT)):
        command = option(command)
    return command


def check_usage(options: Mapping[str, Any]) -> None:
    """Check that options go together and none would do nothing. Raises `click.UsageError`."""
    given = {name for name, value in options.items() if value not in (None, False, ())}
    given |= {"thinking"} if options["thinking"] is not None else set()
    templated = {"system", "thinking", "messages", "tools", "drop_oldest", "trust_special_tokens"}
    _refuse(given, "raw", templated, "knows no chat template")
    _refuse(given, "batch", {"prompt", "prompt_file", "messages"}, "reads its prompts from the file")
    _refuse(given, "batch", {"raw"}, "asks by the chat template")
    _refuse(given, "batch", {"as_json"}, "writes JSON to --output")
    _refuse(given, "draft", {"speculative"}, "does the guessing")
    if "draft_tokens" in given and not given & {"speculative", "draft"}:
        raise click.UsageError("--draft-tokens needs --draft or --speculative, whose guesses it is about.")
    if "batch" in given and "output" not in given:
        raise click.UsageError("--batch needs --output, the file that the answers go to.")
    if options["output"] == "-":
        raise click.UsageError("--output cannot be '-': only from a file can a run that was ended be taken up.")
    for name in ("output", "batch_size"):
        if name in given and "batch" not in given:
            raise click.UsageError(f"{_flag(name)} needs --batch, whose answers it is about.")
    _check_window_usage(options)
    budget = options["thinking_budget"]
    if budget is not None and options["thinking"] is False:
        raise click.UsageError("--no-thinking leaves nothing to --thinking-budget: give one of them.")
    if budget == 0 and options["thinking"] is True:
        raise click.UsageError("--thinking-budget 0 is --no-thinking: leave out --thinking.")
    if options["early_stop_text"] is not None and not budget and "batch" not in given:
        raise click.UsageError("--early-stop-text needs a --thinking-budget above 0, which it is said at the end of.")
    from_stdin = [name for name in ("prompt", "messages", "tools", "json_schema", "batch") if options[name] == "-"]
    if len(from_stdin) > 1:
        raise click.UsageError(f"{_flag(from_stdin[0])} and {_flag(from_stdin[1])}: only one can be '-'.")


def _refuse(given: set[str], option: str, others: set[str], why: str) -> None:
    found = [_flag(name) for name in sorted(given & others)]
    if option in given and found:
        raise click.UsageError(f"{_flag(option)} {why}: leave out {' and '.join(found)}.")


def _flag(name: str) -> str:
    special = {"prompt": "PROMPT", "as_json": "--json", "thinking": "--thinking/--no-thinking"}
    return special.get(name, f"--{name.replace('_', '-')}")


def check_values(options: Mapping[str, Any]) -> None:
    """Check values before a large model is read or converted. Raises `OptionError`."""
    with leave_at_once():
        from mlxqwen.chat.thinking import check_early_stop_text
        from mlxqwen.checks import check_integer
        from mlxqwen.device import current_device
        from mlxqwen.engine.request import check_draft_tokens
        from mlxqwen.engine.stores import open_prompt_cache, prefix_cache_bytes
        from mlxqwen.sampling.params import SamplingParams
        from mlxqwen.text.stop import StopStrings

    names = ("prompt", "system", "early_stop_text", "draft", "prompt_cache")
    with options_named():
        check_unicode(**{name: options[name] for name in names}, stop="".join(options["stop"]))
        SamplingParams(**sampling_overrides(options))
        StopStrings(options["stop"])
        if options["thinking_budget"] is not None:
            check_integer("thinking_budget", options["thinking_budget"], 0, _MOST_TOKENS)
        if options["early_stop_text"] is not None:
            check_early_stop_text(options["early_stop_text"])
        for name in ("max_tokens", "batch_size"):
            if options[name] is not None:
                check_integer(name, options[name], 1)
        if options["draft_tokens"] is not None:
            check_draft_tokens(options["draft_tokens"])
        if options["prefix_cache"] is not None:
            prefix_cache_bytes(options["prefix_cache"], current_device())
        if options["prompt_cache"] is not None:
            open_prompt_cache(options["prompt_cache"])
    check_model_options(options)


def read_form(options: Mapping[str, Any]) -> AnswerFormat | None:
    """What --json-schema says; None without it. Raises `OptionError`."""
    if options["json_schema"] is None:
        return None
    with leave_at_once():
        from mlxqwen.chat.request_files.schema_file import parse_schema

    return parse_schema(read_text(options["json_schema"]), source_name(options["json_schema"]))


def check_model_options(options: Mapping[str, Any]) -> None:
    """Check the options of loading and running. Raises `OptionError`, `click.UsageError`."""
    with leave_at_once():
        from mlxqwen.cache import check_window
        from mlxqwen.checks import check_integer

    _check_window_usage(options)
    if options.get("yarn") is not None and options["yarn_factor"] is not None:
        raise click.UsageError("--yarn chooses the factor: leave out --yarn-factor.")
    with options_named():
        check_unicode(model=options["model"], revision=options["revision"])
        if options["prefill_chunk"] is not None:
            check_integer("prefill_chunk", options["prefill_chunk"], 1)
        check_window(options["max_kv_size"], _kv_keep(options))
    _parse_rope_scaling(options["rope_scaling"])


def _check_window_usage(options: Mapping[str, Any]) -> None:
    if options["kv_keep"] is not None and options["max_kv_size"] is None:
        raise click.UsageError("--kv-keep needs --max-kv-size, whose window it is about.")


@contextmanager
def options_named() -> Iterator[None]:
    """Let an `OptionError` name the option as it is typed, instead of the library's parameter."""
    try:
        yield
    except OptionError as error:
        parameter, found, rest = error.problem.partition(": ")
        option = _flag({"keep": "kv_keep"}.get(parameter, parameter))
        raise OptionError(f"{option}{found}{rest}", hint=error.hint) from None


def sampling_overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options that were given."""
    return {name: options[name] for name in _SAMPLING_NAMES if options[name] is not None}


def load_engine(options: Mapping[str, Any], on_progress: Callable[[], None] | None = None) -> Engine:
    """Load the model; a conversion shows its progress, and calls `on_progress` each time."""
    with leave_at_once():
        from mlxqwen.engine.engine import Engine

    with conversion_progress() as show:

        def on_convert(stage: str, done: int, total: int) -> None:
            show(stage, done, total)
            if on_progress is not None:
                on_progress()

        engine = Engine.load(
            options["model"],
            revision=options["revision"],
            dtype=options["dtype"],
            rope_scaling=_parse_rope_scaling(options["rope_scaling"]),
            yarn_factor=options["yarn_factor"],
            yarn=options.get("yarn"),
            force=options["force"],
            ignore_adapter=options["ignore_adapter"],
            on_convert=on_convert,
            draft=options.get("draft"),
            speculative=options.get("speculative"),
            prefix_cache=options.get("prefix_cache"),
            prompt_cache=options.get("prompt_cache"),
            max_running=options.get("max_running"),
            **({} if options.get("draft_tokens") is None else {"draft_tokens": options["draft_tokens"]}),
        )
    if options.get("draft") is not None:
        _size_draft_cache(engine, options)
    return engine


def _size_draft_cache(engine: Engine, options: Mapping[str, Any]) -> None:
    """Give the draft model a cache of the kind that the options ask for."""
    from mlxqwen.engine.speculation.draft_model import DraftModel

    if isinstance(engine.speculative, DraftModel):
        engine.speculative = DraftModel(
            engine.speculative.model,
            max_kv_size=options["max_kv_size"],
            kv_bits=_kv_bits(options),
            prefill_chunk=options["prefill_chunk"],
        )


def new_cache(engine: Engine, options: Mapping[str, Any], *, rows: int = 1) -> KVCache:
    """An empty cache of the kind that the options ask for."""
    from mlxqwen.cache import make_cache

    return make_cache(engine.model, **cache_options(options), batch_size=rows)


def cache_options(options: Mapping[str, Any]) -> CacheOptions:
    """The options of the cache that were given."""
    return {
        "max_kv_size": options["max_kv_size"],
        "keep": _kv_keep(options),
        "kv_bits": _kv_bits(options),
    }


def _kv_bits(options: Mapping[str, Any]) -> int | None:
    return None if options["kv_bits"] is None else int(options["kv_bits"])


def _kv_keep(options: Mapping[str, Any]) -> int:
    return DEFAULT_KV_KEEP if options["kv_keep"] is None else int(options["kv_keep"])


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
