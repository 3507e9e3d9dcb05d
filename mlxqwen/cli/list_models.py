"""`mlxqwen list`: the models that are downloaded, and the aliases of those that can be."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.fit import measured
from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.spellings import SettableCommand
from mlxqwen.cli.table import Column, columns_of, table
from mlxqwen.console import Output, counted
from mlxqwen.errors import MlxqwenError, one_line

if TYPE_CHECKING:
    from mlxqwen.files.downloads import Download
    from mlxqwen.model.footprint import Footprint
    from mlxqwen_convert.cache_list import CachedModel

__all__ = ["list_models"]

_CONTEXT = 8_192
_DOWNLOADS = (
    Column("model", least=20),
    Column("alias", left_out=2),
    Column("size", right=True),
    Column("fits"),
    Column("converted", right=True, left_out=3),
    Column("state", left_out=1),
    Column("last used", left_out=4),
)
_ALIASES = (
    Column("alias"),
    Column("model", least=20, left_out=2),
    Column("size", right=True),
    Column("in memory", right=True, left_out=1),
    Column("fits"),
    Column("downloaded", left_out=3),
)


@click.command("list", cls=SettableCommand)
@click.option("--aliases", "lists_aliases", is_flag=True, help="List every alias and what its model would take.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=_CONTEXT,
    show_default=True,
    help="Tokens of cache that a model fits with, as far as its context goes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_models(lists_aliases: bool, context: int, as_json: bool) -> None:
    """List the models of Qwen3's that are downloaded: size, whether they fit this machine, converted copies.

    They lie in the caches of Hugging Face's hub and of ModelScope, which other programs share.
    """
    with leave_at_once():
        from mlxqwen.device import current_device
        from mlxqwen.files.downloads import downloads

    found, faults = downloads()
    known = [one for one in found if one.is_of_qwen3]
    if lists_aliases:
        rows = _aliases(known, context)
        text = table(_ALIASES, [_alias_cells(row) for row in rows], columns_of(sys.stdout))
        name = "aliases"
    else:
        rows = _facts(known, context)
        text = _downloads_text(rows, len(found) - len(known), faults)
        name = "models"
    if as_json:
        listing = {name: rows, "context": context, "usable_memory": current_device().usable_memory}
        text = json.dumps(listing if lists_aliases else {**listing, "damaged": faults}) + "\n"
    Output(sys.stdout).write(text)


def _facts(models: Sequence[Download], context: int) -> list[dict[str, Any]]:
    from mlxqwen_convert.cache_list import cached_models

    conversions = cached_models()
    return [_facts_of(model, conversions, context) for model in models]


def _facts_of(model: Download, conversions: Sequence[CachedModel], context: int) -> dict[str, Any]:
    stored: Footprint | None = None
    loaded: Footprint | None = None
    if model.is_incomplete:
        state = "incomplete"
    elif not any(model.folder.glob("*.safetensors")):
        state = "no weights"
    else:
        try:
            stored, loaded = measured(model.folder)
            state = "ready" if loaded is not None and stored.refusal is None else "not run"
            if state == "ready" and not (model.folder / "tokenizer.json").is_file():
                state = "no tokenizer"
        except MlxqwenError:
            state = "damaged"
    sized = loaded or stored
    source = str(model.folder.resolve())
    return {
        "id": model.name,
        "aliases": _aliases_of(model.repo_id),
        "revision": model.revision,
        "refs": list(model.refs),
        "path": str(model.folder),
        "bytes": model.nbytes,
        "last_used": datetime.fromtimestamp(model.last_used, UTC).isoformat(timespec="seconds"),
        "state": state,
        "downloading": state == "incomplete" and model.is_under_way,
        "format": None if stored is None else stored.format,
        "parameters": None if stored is None else stored.parameters,
        **_needs(sized, context),
        "converted": [
            {"path": str(one.model), "bytes": one.nbytes, "state": one.state}
            for one in conversions
            if one.source_folder == source
        ],
    }


def _needs(footprint: Footprint | None, context: int) -> dict[str, Any]:
    """What a model takes in memory with a cache of so many tokens, and whether this machine holds that."""
    from mlxqwen.device import current_device
    from mlxqwen.model.footprint import size_up

    if footprint is None:
        return {"memory_bytes": None, "fits": None}
    tokens = min(context, footprint.config.context_length)
    needed = size_up(footprint, current_device(), tokens=tokens)
    return {"memory_bytes": needed.total_bytes, "fits": needed.fits}


def _aliases_of(repo_id: str) -> list[str]:
    from mlxqwen.files.aliases import ALIASES

    return [alias for alias, other in ALIASES.items() if other == repo_id]


def _aliases(known: Sequence[Download], context: int) -> list[dict[str, Any]]:
    from mlxqwen.files.aliases import ALIASES
    from mlxqwen.model.releases import footprints_of_release

    here = {one.repo_id for one in known if any(one.folder.glob("*.safetensors")) and not one.is_incomplete}
    rows = []
    for alias, repo_id in ALIASES.items():
        sizes = footprints_of_release(repo_id)
        stored, loaded = (None, None) if sizes is None else sizes
        rows.append(
            {
                "alias": alias,
                "id": repo_id,
                "bytes": None if stored is None else stored.disk_bytes,
                **_needs(loaded, context),
                "downloaded": repo_id in here,
            }
        )
    return rows


def _alias_cells(row: dict[str, Any]) -> list[str]:
    sizes = [_size(row[name]) for name in ("bytes", "memory_bytes")]
    return [row["alias"], row["id"], *sizes, _yes(row["fits"]), "yes" if row["downloaded"] else ""]


def _downloads_text(rows: Sequence[dict[str, Any]], others: int, faults: Sequence[str]) -> str:
    cells = []
    for row in rows:
        name = row["id"] if "main" in row["refs"] or row["revision"] == "master" else f"{row['id']}@{_revision(row)}"
        alias = min(row["aliases"], key=len, default="")
        converted = sum(one["bytes"] for one in row["converted"])
        words = (name, alias, _size(row["bytes"]), _yes(row["fits"]), _size(converted) if converted else "")
        state = f"{row['state']}, downloading" if row["downloading"] else row["state"]
        cells.append([one_line(word) for word in (*words, state, row["last_used"][:10])])
    text = table(_DOWNLOADS, cells, columns_of(sys.stdout)) if cells else "no model is downloaded; see mlxqwen pull\n"
    if others:
        text += f"and {counted(others, 'model')} of other kinds in the same caches\n"
    return text + "".join(f"not read: {fault}\n" for fault in faults)


def _revision(row: dict[str, Any]) -> str:
    return str(row["refs"][0] if row["refs"] else row["revision"][:7])


def _yes(fits: bool | None) -> str:
    return "-" if fits is None else "yes" if fits else "no"


def _size(nbytes: int | None) -> str:
    from mlxqwen_convert.sizes import size_of

    return "-" if nbytes is None else size_of(nbytes)
