"""`mlxqwen serve`: a server in OpenAI's form."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from threading import Thread
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxqwen.checks import parse_duration
from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.generate import generate
from mlxqwen.cli.generate_options import check_model_options, options_named
from mlxqwen.cli.interrupts import INTERRUPTED, end_interrupted_line, leave_at_once
from mlxqwen.cli.served_models import sources_of
from mlxqwen.cli.spellings import SettableCommand, SpelledOption
from mlxqwen.console import Output
from mlxqwen.errors import OptionError, ServerError, one_line
from mlxqwen.files.json_file import parse_json
from mlxqwen.installation import install_command
from mlxqwen.status_line import StatusLine

if TYPE_CHECKING:
    from mlxqwen.server.registry import ModelRegistry
    from mlxqwen.server.settings import ServerSettings

__all__ = ["serve"]

_OF_GENERATE = (
    "revision",
    "max_kv_size",
    "kv_keep",
    "kv_bits",
    "prompt_cache",
    "prefix_cache",
    "prefill_chunk",
    "yarn_factor",
    "yarn",
    "rope_scaling",
    "dtype",
    "force",
    "ignore_adapter",
    "speculative",
    "draft",
    "draft_tokens",
)
_LIBRARIES = ("starlette", "uvicorn", "httptools", "prometheus_client")
# What model cards give to other servers, and what needs no asking for here: flags, whether a value follows, why.
_TOLD_APART = "thought and calls are told apart"
_NEEDLESS: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "reasoning_parser": (("--reasoning-parser",), True, _TOLD_APART),
    "tool_call_parser": (("--tool-call-parser",), True, _TOLD_APART),
    "enable_reasoning": (("--enable-reasoning",), False, _TOLD_APART),
    "enable_auto_tool_choice": (("--enable-auto-tool-choice",), False, _TOLD_APART),
    "tensor_parallel_size": (
        ("--tensor-parallel-size", "-tp", "--tp-size", "--tp"),
        True,
        "one machine computes it all",
    ),
    "gpu_memory_utilization": (
        ("--gpu-memory-utilization", "--mem-fraction-static"),
        True,
        "memory is taken as replies need it",
    ),
    "enable_prefix_caching": (("--enable-prefix-caching",), False, "what was read is shared by all replies"),
    "trust_remote_code": (("--trust-remote-code",), False, "no code of a model's is run"),
}


def _needless(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, (flags, takes_value, _) in _NEEDLESS.items():
        command = click.option(*flags, name, is_flag=not takes_value, hidden=True)(command)
    return command


@click.command(cls=SettableCommand)
@click.argument("model", required=False, shell_complete=complete_folder)
@click.option(
    "-m",
    "--model",
    "models",
    cls=SpelledOption,
    also=("--model-path",),
    multiple=True,
    metavar="[NAME=]MODEL",
    shell_complete=complete_folder,
    help="A model, and what clients call it; by default as given here. May be repeated: several are loaded when they "
    "are first asked for, as far as memory allows.",
)
@click.option(
    "--keep-alive",
    default="off",
    show_default=True,
    metavar="DURATION",
    help="Unload a model that nobody has used for so long, such as 5m; it is loaded again when it is asked for.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port to listen at; 0 takes a free one.")
@click.option(
    "--api-key",
    multiple=True,
    metavar="KEY",
    envvar="MLXQWEN_API_KEY",
    help="Answer only who brings this key; may be repeated. MLXQWEN_API_KEY is read too, and not shown in lists of "
    "processes.",
)
@click.option("--allow-open", is_flag=True, help="Listen at other addresses than this machine's own without a key.")
@click.option(
    "--allowed-host", multiple=True, metavar="NAME", help="A further name that clients reach the server by; repeatable."
)
@click.option(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin call, such as https://example.org; may be repeated, * is every one.",
)
@click.option("--served-model-name", metavar="NAME", help="What clients call the model; by default as given here.")
@click.option("--single", is_flag=True, help="Let any name that no model has mean the first one.")
@click.option(
    "--max-running",
    cls=SpelledOption,
    also=("--max-num-seqs", "--max-running-requests"),
    type=int,
    default=256,
    show_default=True,
    help="Replies that decode at once.",
)
@click.option("--max-queue", type=int, default=1024, show_default=True, help="Replies that wait; more get 429.")
@click.option(
    "--max-model-len",
    "--context-length",
    type=int,
    help="Most tokens of a prompt and its reply; by default the model's context.",
)
@click.option("--timeout", type=float, metavar="SECONDS", help="End requests that take longer; by default none.")
@click.option(
    "--drain",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long running replies may go on after Ctrl-C or SIGTERM.",
)
@click.option(
    "--reasoning-field",
    type=click.Choice(["reasoning_content", "reasoning", "both"]),
    default="reasoning_content",
    show_default=True,
    help="What the thought is called in chat completions.",
)
@click.option("--log-content", is_flag=True, help="Log what is asked and answered, too.")
@click.option("--json-model-override-args", "overrides", hidden=True)
@_needless
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> int:
    """Answer over HTTP, as OpenAI's API does: /v1/chat/completions and others.

    MODEL is a folder, a hub id, an alias such as qwen3:4b, or by default the demo model, which then holds 4,096 tokens.
    Ctrl-C and SIGTERM end it: no new requests, running replies go on for --drain seconds; a second one does not wait.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ServerError(
            f"serve: found no {', '.join(missing)}, which it is made with",
            hint=f"Install them: {install_command('server')}",
        )
    if options["overrides"] is not None:
        options["rope_scaling"] = _overridden_rope_scaling(options["overrides"], options["rope_scaling"])
    check_model_options(options)
    settings = _settings(options)
    key = ""
    if settings.api_keys:
        # The secret itself is not shown. The variable is what a user has who set it; with --api-key it may not be set.
        of_environment = ctx.get_parameter_source("api_key") is ParameterSource.ENVIRONMENT
        key = "$MLXQWEN_API_KEY" if of_environment else "YOUR_API_KEY"
    with leave_at_once():
        from mlxqwen.server.listener import open_socket
        from mlxqwen.server.registry import ModelRegistry

    first = options["model"]
    if options["models"] and ctx.get_parameter_source("model") is not ParameterSource.COMMANDLINE:
        first = None  # a default, which what is typed replaces
    listener = open_socket(settings.host, settings.port)
    importing = Thread(target=_import_server)
    try:
        _note_needless(options)
        _log_requests()
        models = ModelRegistry(
            sources_of(first, options["models"], options, settings), settings, force=options["force"]
        )
        try:
            importing.start()
            if len(models.entries) == 1:  # what is wrong with it is told before the server listens
                models.load(models.entries[0])
            with leave_at_once():
                from mlxqwen.server.run import serve as run
                from mlxqwen.server.service import Service
            number = run(
                Service(models, settings),
                listener,
                lambda port: _tell(settings, port, models, key),
                _end_line,
                lambda number: _leave(_status(number)),
            )
        finally:
            has_ended = models.close()
            if importing.is_alive():  # what is imported in the midst of the interpreter's end fails, and says so
                importing.join()
    finally:
        listener.close()
    status = _status(number)
    if not has_ended:  # another thread loads a model, which cannot be told to stop
        _leave(status)
    return status


def _import_server() -> None:
    """Import the libraries of HTTP, while a model loads. What is wrong with them the command's own import tells."""
    with suppress(Exception):
        import_module("mlxqwen.server.run")


def _status(number: int | None) -> int:
    return INTERRUPTED if number == signal.SIGINT else 0


def _end_line(number: int) -> None:
    if number == signal.SIGINT:
        end_interrupted_line()


def _leave(status: int) -> None:
    """End the process at once."""
    with suppress(OSError, RuntimeError):
        StatusLine.wipe_shown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(RuntimeError):  # the signal came while it was being written to
            stream.flush()
    os._exit(status)


serve.params += [option for option in generate.params if option.name in _OF_GENERATE]


def _settings(options: Mapping[str, Any]) -> ServerSettings:
    with leave_at_once():
        from mlxqwen.server.settings import ServerSettings

    with options_named():
        keep_alive = parse_duration("keep_alive", options["keep_alive"])
    names = (
        *("host", "port", "allow_open", "max_running", "max_queue", "max_kv_size", "max_model_len", "prefill_chunk"),
        *("timeout", "drain", "single", "reasoning_field"),
    )
    given = {name: options[name] for name in names}
    kept = {} if options["kv_keep"] is None else {"keep": options["kv_keep"]}
    with options_named():
        return ServerSettings(
            api_keys=options["api_key"],
            allowed_hosts=options["allowed_host"],
            cors_origins=options["cors_origin"],
            kv_bits=None if options["kv_bits"] is None else int(options["kv_bits"]),
            log_content=options["log_content"],
            keep_alive=keep_alive,
            **given,
            **kept,
        )


def _note_needless(options: Mapping[str, Any]) -> None:
    for name, (flags, _, why) in _NEEDLESS.items():
        if options[name]:
            sys.stderr.write(f"note: {flags[0]} is not needed here: {why}\n")


def _overridden_rope_scaling(text: str, other: str | None) -> str:
    """The value of --rope-scaling in SGLang's spelling. Raises `OptionError`, or `click.UsageError` beside `other`."""
    hint = "Give --rope-scaling JSON."
    try:
        given = parse_json(text)
    except ValueError:
        given = None
    if not isinstance(given, dict) or list(given) != ["rope_scaling"]:
        found = f"found {one_line(text, 100)}"
        raise OptionError(f'--json-model-override-args: {found}, expected {{"rope_scaling": …}}', hint=hint)
    if other is not None:
        raise click.UsageError("--json-model-override-args: found beside --rope-scaling, expected one of them.")
    return json.dumps(given["rope_scaling"])


class _LogHandler(logging.StreamHandler[Any]):
    """Lines on standard error, each in the place of a download's progress, which is drawn again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        StatusLine.wipe_shown()
        super().emit(record)


def _log_requests() -> None:
    """Write a line a request on standard error, and how far downloads are where no terminal is shown it."""
    handler = _LogHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("mlxqwen.server", "mlxqwen.download"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def _tell(settings: ServerSettings, port: int, models: ModelRegistry, key: str) -> None:
    """Say where the server listens, and a line that works, with `key` for the key if one is needed."""
    names = [entry.name for entry in models.entries]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    url = f"http://{host}:{port}"
    header = f' -H "Authorization: Bearer {key}"' if key else ""
    message = '{"role": "user", "content": "How many r are in strawberry?"}'
    question = f'{{"model": {json.dumps(names[0])}, "messages": [{message}]}}'
    output = Output(sys.stdout)
    output.write(f"{one_line(', '.join(names))} {'is' if len(names) == 1 else 'are'} served at {url}/v1\n")
    output.write(f"curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{question}'\n")
    if key == "YOUR_API_KEY":
        output.write("Put the key of --api-key where YOUR_API_KEY is.\n")
    output.write(f"The chat page is at {url}/\n")
    sys.stdout.flush()
