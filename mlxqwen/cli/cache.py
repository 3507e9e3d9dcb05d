"""`mlxqwen cache`: models that were converted when they were loaded."""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.table import Column, columns_of, table
from mlxqwen.console import Output
from mlxqwen.errors import one_line

if TYPE_CHECKING:
    from mlxqwen_convert.cache_list import CachedModel, Removal

__all__ = ["cache"]

_UNKNOWN = "unknown"  # of a model whose conversion begins at this moment, or whose record is damaged
_COLUMNS = (
    Column("source", least=20),
    Column("from", left_out=3),
    Column("to", left_out=4),
    Column("size", right=True, left_out=1),
    Column("last used", left_out=2),
    Column("state"),
)


@click.group()
def cache() -> None:
    """Models that were converted when they were first loaded.

    They are kept in $MLXQWEN_CACHE, by default in the folder "mlxqwen" of the user's caches: $XDG_CACHE_HOME, else
    ~/Library/Caches on a Mac and ~/.cache elsewhere.
    """


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_models(as_json: bool) -> None:
    """List them: source, formats, size, last use, state."""
    with leave_at_once():
        from mlxqwen_convert.cache_list import cache_folder, cached_models

    models = cached_models()
    if as_json:
        listing = {"cache": str(cache_folder()), "models": [_facts(model) for model in models]}
        Output(sys.stdout).write(json.dumps(listing) + "\n")
        return
    Output(sys.stdout).write(_table(models) if models else f"{one_line(str(cache_folder()))} is empty\n")


@cache.command()
@click.option("--all", "everything", is_flag=True, help="Remove everything.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Remove those as well that were not used for so many days.",
)
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prune(everything: bool, older_than: float | None, dry_run: bool, as_json: bool) -> None:
    """Remove what is of no use any more.

    That is what was never finished, and what has lost its source, or was made of another state of it or by another
    version of mlxqwen. What is being converted or loaded is left alone.
    """
    if older_than is not None and not math.isfinite(older_than):
        raise click.UsageError(f"--older-than: found {older_than}, expected a number of days.")
    if everything and older_than is not None:
        raise click.UsageError("--all leaves nothing to --older-than: give one of them.")
    with leave_at_once():
        from mlxqwen_convert.cache_list import prune as prune_models

    models = prune_models(everything=everything, unused_days=older_than, dry_run=dry_run)
    report = _json if as_json else _account
    Output(sys.stdout).write(report(models, dry_run))


def _table(models: list[CachedModel]) -> str:
    from mlxqwen_convert.sizes import size_of

    rows = []
    for model in models:
        words = ["-" if word == _UNKNOWN else word for word in (model.source, model.format, model.target)]
        cells = (*words, size_of(model.nbytes), _day_and_time(model.last_used), model.state)
        rows.append([one_line(cell) for cell in cells])
    total = size_of(sum(model.nbytes for model in models))
    folder = one_line(str(models[0].folder.parent))
    return f"{table(_COLUMNS, rows, columns_of(sys.stdout))}{total} in {folder}\n"


def _day_and_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else "-"


def _account(removals: list[Removal], dry_run: bool) -> str:
    from mlxqwen_convert.sizes import size_of

    text = ""
    for removal in removals:
        verb = "in use, left" if removal.in_use else "would remove" if dry_run else "removed"
        model = removal.model
        reason = "" if removal.in_use or removal.reason == "all" else f": {removal.reason}"
        text += (
            one_line(f"{verb} the conversion of {model.source} ({model.target}, {size_of(model.nbytes)}){reason}")
            + "\n"
        )
    if not text:
        return "nothing to remove\n"
    return text + f"{size_of(_freed(removals))} {'would be freed' if dry_run else 'freed'}\n"


def _json(removals: list[Removal], dry_run: bool) -> str:
    report = {
        "dry_run": dry_run,
        "removed": [{**_facts(removal.model), "reason": removal.reason} for removal in removals if not removal.in_use],
        "in_use": [_facts(removal.model) for removal in removals if removal.in_use],
        "freed_bytes": _freed(removals),
    }
    return json.dumps(report) + "\n"


def _freed(removals: list[Removal]) -> int:
    return sum(removal.model.nbytes for removal in removals if not removal.in_use)


def _in_utc(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None


def _facts(model: CachedModel) -> dict[str, object]:
    return {
        "source": model.source,
        "source_folder": model.source_folder,
        "source_exists": model.source_exists,
        "format": model.format,
        "target": model.target,
        "model": str(model.model),
        "bytes": model.nbytes,
        "last_used": _in_utc(model.last_used),
        "state": model.state,
    }
