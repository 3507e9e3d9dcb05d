"""`mlxqwen bench`: how fast a model is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxqwen import __version__
from mlxqwen.cli.bench_plot import check_plot, write_plot
from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.generate import generate
from mlxqwen.cli.generate_options import cache_options, check_model_options, options_named
from mlxqwen.cli.interrupts import INTERRUPTED, leave_at_once
from mlxqwen.cli.model_loading import load_model_alone, located_model
from mlxqwen.cli.spellings import ModelCommand
from mlxqwen.cli.table import Column, columns_of, table
from mlxqwen.console import Output
from mlxqwen.errors import OptionError, one_line
from mlxqwen.status_line import StatusLine

if TYPE_CHECKING:
    from mlxqwen.engine.benchmark import BenchmarkRun, Speed
    from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = ["bench"]

_OF_GENERATE = (
    "revision",
    "max_kv_size",
    "kv_keep",
    "kv_bits",
    "prefill_chunk",
    "yarn_factor",
    "rope_scaling",
    "dtype",
    "force",
    "ignore_adapter",
)
_COLUMNS = (
    Column("context", right=True),
    Column("first token", right=True),
    Column("prefill", right=True),
    Column("decode", right=True),
    Column("cache", right=True, left_out=1),
    Column("peak memory", right=True, left_out=2),
)


@click.command(cls=ModelCommand)
@click.argument("model", required=False, shell_complete=complete_folder)
@click.option(
    "--context",
    metavar="N,N,…",
    help="Lengths of prompt to measure; by default 128,512,2048,8192 as far as the model's context goes.",
)
@click.option("--tokens", type=int, default=64, show_default=True, help="Tokens to decode behind each prompt.")
@click.option("--repeat", type=int, default=3, show_default=True, help="Runs of each, of which the median counts.")
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw the speeds into a .png, .svg or .pdf file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every run in it.")
def bench(**options: Any) -> int:
    """Measure how fast MODEL reads prompts and writes answers, by the length of the prompt.

    MODEL is a folder, a hub id, or by default the demo model; it needs no tokenizer. Prompts are random tokens and
    answers greedy. "First token" is how long a prompt of that length makes wait, prefill its tokens divided by that
    time, and decode the speed of the tokens behind the first. Memory is what MLX holds: keys and values, and the most
    at any time, weights included.

    Ctrl-C ends it with what has been measured so far.
    """
    check_model_options(options)
    asked = _contexts(options["context"])
    with options_named():
        _check_counts(options["tokens"], options["repeat"], asked or [])
    if options["plot"] is not None:
        check_plot(Path(options["plot"]))
    runs: list[BenchmarkRun] = []
    interrupted = False
    model, seconds = _load(options)
    contexts = _chosen_contexts(model, asked, options)
    line = StatusLine(sys.stderr)
    try:
        _measure(model, contexts, options, runs, line)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        line.wipe()
    planned = len(contexts) * options["repeat"]
    facts = _facts(model, seconds, options, runs, planned, interrupted=interrupted)
    _print(facts, runs, as_json=options["as_json"])
    if options["plot"] is not None and runs:
        from mlxqwen.engine.benchmark import summarize

        write_plot(Path(options["plot"]), summarize(runs), title=facts["model"])
    return INTERRUPTED if interrupted else 0


bench.params += [option for option in generate.params if option.name in _OF_GENERATE]


def _contexts(given: str | None) -> list[int] | None:
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 12 for part in parts):
        raise OptionError(
            f"--context: found {given!r}, expected numbers of tokens", hint="For example --context 128,2048"
        )
    return [int(part) for part in parts]


def _check_counts(tokens: int, repeat: int, contexts: Sequence[int]) -> None:
    """Check the numbers before the model is loaded. Raises `OptionError`."""
    from mlxqwen.checks import check_integer

    for name, value in (("tokens", tokens), ("repeat", repeat), *(("context", context) for context in contexts)):
        check_integer(name, value, 1)


def _load(options: Mapping[str, Any]) -> tuple[Qwen3ForCausalLM, float]:
    """Load the model → it, and the seconds that it took, without downloads and conversions."""
    folder = located_model(options, needs_tokenizer=False)
    started = [time.perf_counter()]
    model = load_model_alone(options, folder, on_progress=lambda: started.append(time.perf_counter()))
    return model, time.perf_counter() - started[-1]


def _chosen_contexts(model: Qwen3ForCausalLM, asked: list[int] | None, options: Mapping[str, Any]) -> list[int]:
    with leave_at_once():
        from mlxqwen.engine.benchmark import choose_contexts

    with options_named():
        return choose_contexts(model, asked, tokens=options["tokens"], max_kv_size=options["max_kv_size"])


def _measure(
    model: Qwen3ForCausalLM,
    contexts: list[int],
    options: Mapping[str, Any],
    runs: list[BenchmarkRun],
    line: StatusLine,
) -> None:
    with leave_at_once():
        from mlxqwen.cache import make_cache
        from mlxqwen.engine.benchmark import benchmark

    tokens, repeat = options["tokens"], options["repeat"]
    with options_named():
        measuring = benchmark(
            model,
            contexts,
            lambda: make_cache(model, **cache_options(options)),
            tokens=tokens,
            repeat=repeat,
            prefill_chunk=options["prefill_chunk"],
            force=options["force"],
        )
    line.draw("Warming up")
    for run in measuring:
        runs.append(run)
        done, total = len(runs), len(contexts) * repeat
        following = contexts[done % len(contexts)]
        line.draw(
            f"Measuring: {done} of {total} runs done, next a prompt of {following:,} tokens", f"{done} of {total}"
        )


def _facts(
    model: Qwen3ForCausalLM,
    load_seconds: float,
    options: Mapping[str, Any],
    runs: list[BenchmarkRun],
    planned_runs: int,
    *,
    interrupted: bool,
) -> dict[str, Any]:
    from importlib.metadata import version

    from mlxqwen.device import current_device
    from mlxqwen.engine.benchmark import summarize, weight_bytes

    device = current_device()
    return {
        "model": options["model"] or "the demo model",
        "mlxqwen": __version__,
        "mlx": version("mlx"),
        "device": {"name": device.name, "is_gpu": device.is_gpu, "memory": device.memory},
        "dtype": str(model.dtype).rpartition(".")[2],
        "max_kv_size": options["max_kv_size"],
        "kv_bits": None if options["kv_bits"] is None else int(options["kv_bits"]),
        "prefill_chunk": options["prefill_chunk"],
        "load_seconds": load_seconds,
        "weight_bytes": weight_bytes(model),
        "tokens": options["tokens"],
        "repeat": options["repeat"],
        "planned_runs": planned_runs,
        "interrupted": interrupted,
        "speeds": [asdict(speed) for speed in summarize(runs)],
    }


def _print(facts: dict[str, Any], runs: list[BenchmarkRun], *, as_json: bool) -> None:
    out = Output(sys.stdout)
    if as_json:
        out.write(json.dumps({**facts, "runs": [asdict(run) for run in runs]}) + "\n")
        return
    from mlxqwen.engine.benchmark import summarize

    device = facts["device"]
    window = "" if facts["max_kv_size"] is None else f", window {facts['max_kv_size']:,}"
    bits = "" if facts["kv_bits"] is None else f", {facts['kv_bits']}-bit cache"
    out.write(
        f"{one_line(facts['model'])}, {facts['dtype']}{window}{bits}\n"
        f"{one_line(device['name'])} ({'GPU' if device['is_gpu'] else 'CPU'}), mlx {facts['mlx']}, "
        f"mlxqwen {facts['mlxqwen']}\n"
        f"loaded in {facts['load_seconds']:.2f} s, weights {_size(facts['weight_bytes'])}\n\n"
    )
    speeds = summarize(runs)
    if not speeds:
        out.write("Nothing was measured yet.\n")
        return
    out.write(table(_COLUMNS, [_row(speed) for speed in speeds], columns_of(sys.stdout)))
    least, most = min(speed.runs for speed in speeds), max(speed.runs for speed in speeds)
    count = f"{most} run{'s' * (most != 1)}" if least == most else f"{least} to {most} runs"
    out.write(f"\nMedians of {count}, {facts['tokens']:,} tokens decoded in each.\n")
    if facts["interrupted"]:
        out.write(f"Interrupted when {len(runs):,} of {facts['planned_runs']:,} runs were done.\n")


def _row(speed: Speed) -> tuple[str, ...]:
    return (
        f"{speed.context:,}",
        f"{speed.prefill_seconds:.3f} s",
        f"{speed.prefill_tokens_per_second:,.1f} tokens/s",
        f"{speed.decode_tokens_per_second:,.1f} tokens/s",
        _size(speed.cache_bytes),
        _size(speed.peak_bytes),
    )


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 10**9 else f"{number / 1e6:.1f} MB"
