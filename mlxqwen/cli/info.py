"""`mlxqwen info`: what a model takes, and whether it fits this machine."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.fit import measured
from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.spellings import DtypeChoice, ModelCommand
from mlxqwen.cli.terminal import count_of
from mlxqwen.cli.text_input import check_unicode
from mlxqwen.console import Output
from mlxqwen.errors import TokenizerError, one_line
from mlxqwen.status_line import terminal_size

if TYPE_CHECKING:
    from pathlib import Path

    from mlxqwen.files.config import ModelConfig

__all__ = ["info"]

_NAMES = 19  # characters for the names of rows


@click.command(cls=ModelCommand)
@click.argument("model", required=False, shell_complete=complete_folder)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--context", type=int, help="Tokens to size the cache for; the model's whole context by default.")
@click.option("--kv-bits", type=click.Choice(["8", "4"]), help="Size a quantized cache.")
@click.option("--dtype", type=DtypeChoice(), help="Compute dtype to size for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(
    model: str | None,
    revision: str | None,
    context: int | None,
    kv_bits: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Tell what MODEL takes, and whether it fits this machine.

    MODEL is a folder, a hub id (whose weights are not downloaded), or by default the demo model. Of its weights only
    headers are read.
    """
    with leave_at_once():
        from mlxqwen.blas import blas_in_use
        from mlxqwen.checks import check_integer
        from mlxqwen.cli.generate_options import options_named
        from mlxqwen.device import current_device
        from mlxqwen.files.hub import looked_at
        from mlxqwen.files.model_names import model_name
        from mlxqwen.model.footprint import size_up

    check_unicode(model=model, revision=revision)
    if context is not None:
        with options_named():
            check_integer("context", context, 1)
    with looked_at(model, revision=revision) as folder:
        stored, loaded = measured(folder)
        name = model_name(folder)
        tokenizer_error, notes = _looked_for_text(folder, name)
    bits = None if kv_bits is None else int(kv_bits)
    needed = size_up(loaded or stored, current_device(), tokens=context, kv_bits=bits, dtype=dtype)
    facts = {
        "model": name,
        "path": str(folder),
        "type": stored.config.model_type,
        "format": stored.format,
        "runs": stored.runs,
        "converts": not stored.runs and not stored.refusal and loaded is not None,
        "refusal": stored.refusal,
        "tokenizer_error": tokenizer_error,
        "notes": [*(loaded or stored).notes, *notes],
        "parameters": stored.parameters,
        "active_parameters": stored.active_parameters,
        "bits_per_weight": round(stored.bits_per_weight, 3),
        "disk_bytes": stored.disk_bytes,
        "context_length": stored.config.context_length,
        "yarn_factor": _yarn_factor(stored.config, needed.tokens),
        "dtype": str(needed.dtype).rpartition(".")[2],
        "weight_bytes": needed.weight_bytes,
        "cache_tokens": needed.tokens,
        "cache_bytes": needed.cache_bytes,
        "total_bytes": needed.total_bytes,
        "device": {**asdict(needed.device), "products": None if needed.device.is_gpu else blas_in_use()},
        "fits": needed.fits,
    }
    Output(sys.stdout).write(json.dumps(facts) + "\n" if as_json else _table(facts))


def _table(facts: dict[str, Any]) -> str:
    device, active = facts["device"], facts["active_parameters"]
    per_token = "" if active == facts["parameters"] else f", {count_of(active)} of them for each token"
    kind = "GPU" if device["is_gpu"] else "CPU"
    refusal = facts["refusal"]
    loads = refusal is None and (facts["runs"] or facts["converts"])
    converted = " (converted once, when it is first loaded)" if facts["converts"] else ""
    way_out = "use the BF16 release or an MLX one" if refusal is None else refusal
    not_run = converted if loads else f" (this version does not run it: {way_out})"
    fits = "no" if not facts["fits"] else "yes" if loads else "in memory, but is not run"
    cannot = ""
    if facts["tokenizer_error"] is not None:
        fits = "in memory" if fits == "yes" else fits
        cannot = f"; generate and chat cannot use it: {facts['tokenizer_error']}"
    rows = {
        "model": facts["model"],
        "kind": f"{facts['type']}, {facts['format']}{not_run}",
        "parameters": f"{count_of(facts['parameters'])}{per_token}",
        "on disk": f"{_size(facts['disk_bytes'])}, {facts['bits_per_weight']:.2f} bits a weight",
        "context": f"{facts['context_length']:,} tokens{_yarn(facts)}",
        "weights in memory": f"{_size(facts['weight_bytes'])} in {facts['dtype']}",
        "cache in memory": f"{_size(facts['cache_bytes'])} for {facts['cache_tokens']:,} tokens",
        "this machine": f"{device['name']} ({kind}), {_size(device['usable_memory'])} usable",
        **({} if device["is_gpu"] else {"products": device["products"]}),
        "fits": f"{fits}, {_size(facts['total_bytes'])} needed{cannot}",
    }
    notes = [("note", note) for note in facts["notes"]]
    return "".join(_row(name, one_line(value)) for name, value in (*rows.items(), *notes))


def _looked_for_text(folder: Path, name: str) -> tuple[str | None, list[str]]:
    """What is wrong with a model's tokenizer, None if nothing is; and a note if no conversation could be rendered.

    Args:
        folder: of the model.
        name: what errors call it.
    """
    from mlxqwen.engine.loading import read_fitting_tokenizer

    try:
        tokenizer = read_fitting_tokenizer(folder)
    except TokenizerError as error:
        return f"{error.problem.replace(str(folder), name)}. {error.hint}".removesuffix(". "), []
    if tokenizer.chat_template is None:
        return None, ["there is no chat template: text is continued (generate --raw), and chat needs one"]
    return None, []


def _yarn_factor(config: ModelConfig, tokens: int) -> float | None:
    """YaRN's factor that so many tokens need: 1 if none is needed, None if the largest does not hold them."""
    if tokens <= config.context_length:
        return 1.0
    by_request = config.with_yarn_by_request()
    factor = by_request.yarn_factor_for(tokens)
    return factor if tokens <= config.with_yarn(factor).context_length else None


def _yarn(facts: dict[str, Any]) -> str:
    tokens, factor = f"{facts['cache_tokens']:,}", facts["yarn_factor"]
    if factor == 1:
        return ""
    if factor is None:
        return f"; {tokens} are more than YaRN is made for"
    return f"; {tokens} need YaRN: --yarn auto, or --yarn-factor {factor:g}"


def _row(name: str, value: str) -> str:
    """One line; on a narrow terminal the rest is below, with words and paths unbroken."""
    line = f"{name:<{_NAMES}}{value}"
    if not sys.stdout.isatty():
        return line + "\n"
    columns = max(terminal_size(sys.stdout).columns, 2 * _NAMES)
    indent = " " * _NAMES
    return textwrap.fill(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) + "\n"


def _size(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"
