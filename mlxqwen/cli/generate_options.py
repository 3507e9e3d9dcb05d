"""What the options of `mlxqwen generate` may be, and what they become; `option_list` has the options themselves.

Several commands take parts of these options, and each is checked and used in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import click

from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.option_list import DEFAULT_KV_KEEP
from mlxqwen.cli.text_input import check_unicode, read_text, source_name
from mlxqwen.errors import MessagesError, OptionError
from mlxqwen.files.json_file import parse_json

if TYPE_CHECKING:
    from mlxqwen.chat.structured.response_format import AnswerFormat

__all__ = [
    "CacheOptions",
    "cache_options",
    "check_model_options",
    "check_usage",
    "check_values",
    "files_named",
    "options_named",
    "parse_rope_scaling",
    "read_form",
    "sampling_overrides",
]


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


def check_usage(options: Mapping[str, Any]) -> None:
    """Check that options go together and none would do nothing. Raises `click.UsageError`."""
    given = {name for name, value in options.items() if value not in (None, False, ())}
    given |= {"thinking"} if options["thinking"] is not None else set()
    templated = {"system", "thinking", "messages", "tools", "drop_oldest", "trust_special_tokens"}
    _refuse(given, "raw", templated, "knows no chat template")
    _refuse(given, "batch", {"prompt", "prompt_file", "messages"}, "reads its prompts from the file")
    _refuse(given, "batch", {"raw"}, "asks by the chat template")
    _refuse(given, "batch", {"as_json"}, "writes JSON to --output")
    _check_guessing_usage(options)
    if "batch" in given and "output" not in given:
        raise click.UsageError("--batch needs --output, the file that the answers go to.")
    if options["output"] == "-":
        raise click.UsageError("--output cannot be '-': only from a file can a run that was ended be taken up.")
    for name in ("output", "batch_size"):
        if name in given and "batch" not in given:
            raise click.UsageError(f"{_flag(name)} needs --batch, whose answers it is about.")
    if given >= {"quiet", "verbose"}:
        raise click.UsageError("--quiet and --verbose: give one of them.")
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
    check_model_options(options)


def read_form(options: Mapping[str, Any]) -> AnswerFormat | None:
    """What --json-schema says; None without it. Raises `OptionError`."""
    if options["json_schema"] is None:
        return None
    with leave_at_once():
        from mlxqwen.chat.request_files.schema_file import parse_schema

    return parse_schema(read_text(options["json_schema"], what="the schema, as JSON"), _schema_name(options))


def _schema_name(options: Mapping[str, Any]) -> str:
    return f"--json-schema: {source_name(options['json_schema'])}"


@contextmanager
def files_named(options: Mapping[str, Any]) -> Iterator[None]:
    """Let errors about the form of answers name the file of --json-schema, those about messages that of --messages."""
    try:
        yield
    except MessagesError as error:
        # With --system the messages are counted from another one on.
        if options["messages"] is not None and options["system"] is None and error.problem.startswith("messages["):
            error.problem = f"{source_name(options['messages'])}: {error.problem}"
        raise
    except OptionError as error:
        if options["json_schema"] is not None and error.problem.startswith("response_format: "):
            error.problem = f"{_schema_name(options)}: {error.problem.removeprefix('response_format: ')}"
        raise


def check_model_options(options: Mapping[str, Any]) -> None:
    """Check the options of loading and running. Raises `OptionError`, `click.UsageError`."""
    with leave_at_once():
        from mlxqwen.cache import check_window
        from mlxqwen.checks import check_integer, check_number
        from mlxqwen.device import current_device
        from mlxqwen.engine.request import check_draft_tokens
        from mlxqwen.engine.stores import open_prompt_cache, prefix_cache_bytes

    _check_window_usage(options)
    _check_guessing_usage(options)
    if options["yarn_factor"] is not None:
        if options.get("yarn") is not None:
            raise click.UsageError("--yarn chooses the factor: leave out --yarn-factor.")
        if options["rope_scaling"] is not None:
            raise click.UsageError("--rope-scaling and --yarn-factor: found both, expected one, as either sets YaRN.")
    with options_named():
        check_unicode(model=options["model"], revision=options["revision"])
        if options["prefill_chunk"] is not None:
            check_integer("prefill_chunk", options["prefill_chunk"], 1)
        if options["yarn_factor"] is not None:
            check_number("yarn_factor", options["yarn_factor"], 1.0, 1024.0)
        check_window(options["max_kv_size"], _kv_keep(options))
        if options.get("draft_tokens") is not None:
            check_draft_tokens(options["draft_tokens"])
        if options.get("prefix_cache") is not None:
            prefix_cache_bytes(options["prefix_cache"], current_device())
        if options.get("prompt_cache") is not None:
            open_prompt_cache(options["prompt_cache"])
    parse_rope_scaling(options["rope_scaling"])


def _check_guessing_usage(options: Mapping[str, Any]) -> None:
    draft, speculative = options.get("draft"), options.get("speculative")
    if draft is not None and speculative is not None:
        raise click.UsageError("--draft does the guessing: leave out --speculative.")
    if options.get("draft_tokens") is not None and draft is None and speculative is None:
        raise click.UsageError("--draft-tokens needs --draft or --speculative, whose guesses it is about.")


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


def parse_rope_scaling(text: str | None) -> dict[str, Any] | None:
    """The value of --rope-scaling; None without it. Raises `OptionError`."""
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
