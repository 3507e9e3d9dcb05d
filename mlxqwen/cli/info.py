"""`mlxqwen info`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click

from mlxqwen.errors import OptionError

__all__ = ["info"]


@click.command()
@click.argument("model", required=False)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--context", type=int, help="Tokens to size the cache for; the model's whole context by default.")
@click.option("--kv-bits", type=click.Choice(["8", "4"]), help="Size a quantized cache.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute dtype to size for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(
    model: str | None,
    revision: str | None,
    context: int | None,
    kv_bits: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Tell what MODEL (a folder or hub id; the demo by default) takes, and whether it fits this machine.

    Nothing but config and headers is read.
    """
    from mlxqwen.device import current_device
    from mlxqwen.footprint import cache_bytes, measure
    from mlxqwen.hub import resolve_model
    from mlxqwen.loading import parse_dtype

    if context is not None and context < 1:
        raise OptionError(f"--context: found {context}, expected at least 1")
    folder, device = resolve_model(model, revision=revision), current_device()
    stored = measure(folder)
    compute = parse_dtype(dtype) or device.compute_dtype(stored.dtype)
    tokens = stored.config.context_length if context is None else context
    weights = stored.weight_bytes(compute)
    cache = cache_bytes(stored.config, tokens, compute.size, None if kv_bits is None else int(kv_bits))
    facts: dict[str, Any] = {
        "model": str(folder),
        "type": stored.config.model_type,
        "format": stored.format,
        "parameters": stored.parameters,
        "active_parameters": stored.active_parameters,
        "bits_per_weight": round(stored.bits_per_weight, 3),
        "disk_bytes": stored.disk_bytes,
        "context_length": stored.config.context_length,
        "dtype": str(compute).rpartition(".")[2],
        "weight_bytes": weights,
        "cache_tokens": tokens,
        "cache_bytes": cache,
        "device": asdict(device),
        "fits": weights + cache <= device.usable_memory,
    }
    sys.stdout.write(json.dumps(facts) + "\n" if as_json else _table(facts))


def _table(facts: dict[str, Any]) -> str:
    device, needed = facts["device"], facts["weight_bytes"] + facts["cache_bytes"]
    active = facts["active_parameters"]
    per_token = "" if active == facts["parameters"] else f", {_count(active)} of them for each token"
    kind = "GPU" if device["is_gpu"] else "CPU"
    rows = {
        "model": facts["model"],
        "kind": f"{facts['type']}, {facts['format']}",
        "parameters": f"{_count(facts['parameters'])}{per_token}",
        "on disk": f"{_size(facts['disk_bytes'])}, {facts['bits_per_weight']:.2f} bits a weight",
        "context": f"{facts['context_length']:,} tokens",
        "weights in memory": f"{_size(facts['weight_bytes'])} in {facts['dtype']}",
        "cache in memory": f"{_size(facts['cache_bytes'])} for {facts['cache_tokens']:,} tokens",
        "this machine": f"{device['name']} ({kind}), {_size(device['usable_memory'])} usable",
        "fits": f"{'yes' if facts['fits'] else 'no'}, {_size(needed)} needed",
    }
    return "".join(f"{name:<18} {value}\n" for name, value in rows.items())


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"
