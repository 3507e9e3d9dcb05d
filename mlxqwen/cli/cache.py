"""`mlxqwen cache`, and what other commands show of a conversion at load time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.table import Column, columns_of, table
from mlxqwen.cli.terminal import ConversionProgress
from mlxqwen.console import Output
from mlxqwen.errors import one_line

if TYPE_CHECKING:
    from mlxqwen_convert.cached import CachedModel, Removal

__all__ = ["cache", "conversion_progress"]

_UNKNOWN = "unknown"  # of a model whose conversion begins at this moment, or whose record is damaged
_COLUMNS = (
    Column("source", least=20),
    Column("from", left_out=3),
    Column("to", left_out=4),
    Column("size", right=True, left_out=1),
    Column("last used", left_out=2),
    Column("state"),
)


@contextmanager
def conversion_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, wiped at the end; an interrupted conversion says that it will go on."""
    bar, unfinished = ConversionProgress(sys.stderr), False

    def show(stage: str, done: int, total: int) -> None:
        nonlocal unfinished
        unfinished = stage != "verifying" or done < total
        bar(stage, done, total)

    try:
        yield show
    except KeyboardInterrupt:
        bar.close()
        if unfinished:
            sys.stderr.write("interrupted; the same command goes on from here\n")
        raise
    finally:
        bar.close()


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
        from mlxqwen_convert.cached import cache_folder, cached_models

    models = cached_models()
    if as_json:
        listing = {"cache": str(cache_folder()), "models": [_facts(model) for model in models]}
        Output(sys.stdout).write(json.dumps(listing) + "\n")
    else:
        Output(sys.stdout).write(_table(models) if models else f"{one_line(str(cache_folder()))} is empty\n")


@cache.command()
@click.option("--all", "everything", is_flag=True, help="Remove every model.")
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

    That is what was never finished, and models whose source is gone or has changed or that another version of mlxqwen
    has made. Conversions that are going on are left alone.
    """
    if everything and older_than is not None:
        raise click.UsageError("--all leaves nothing to --older-than: give one of them.")
    with leave_at_once():
        from mlxqwen_convert.cached import prune as prune_models

    removals = prune_models(everything=everything, unused_days=older_than, dry_run=dry_run)
    Output(sys.stdout).write(_json(removals, dry_run) if as_json else _account(removals, dry_run))


def _table(models: list[CachedModel]) -> str:
    from mlxqwen_convert.sizes import size_of

    rows = []
    for model in models:
        words = ["-" if word == _UNKNOWN else word for word in (model.source, model.format, model.target)]
        used = datetime.fromtimestamp(model.last_used).strftime("%Y-%m-%d %H:%M") if model.last_used else "-"
        rows.append([one_line(cell) for cell in (*words, size_of(model.nbytes), used, model.state)])
    total = size_of(sum(model.nbytes for model in models))
    folder = one_line(str(models[0].folder.parent))
    return f"{table(_COLUMNS, rows, columns_of(sys.stdout))}{total} in {folder}\n"


def _account(removals: list[Removal], dry_run: bool) -> str:
    from mlxqwen_convert.sizes import size_of

    text = ""
    for removal in removals:
        verb = "in use, left" if removal.in_use else "would remove" if dry_run else "removed"
        model = removal.model
        reason = "" if removal.in_use or removal.reason == "all" else f": {removal.reason}"
        text += one_line(f"{verb} {model.source} ({model.target}, {size_of(model.nbytes)}){reason}") + "\n"
    freed = _freed(removals)
    if not removals:
        return "nothing to remove\n"
    return text + f"{size_of(freed)} {'would be freed' if dry_run else 'freed'}\n"


def _json(removals: list[Removal], dry_run: bool) -> str:
    facts = [{**_facts(removal.model), "reason": removal.reason} for removal in removals if not removal.in_use]
    left = [_facts(removal.model) for removal in removals if removal.in_use]
    return json.dumps({"dry_run": dry_run, "removed": facts, "in_use": left, "freed_bytes": _freed(removals)}) + "\n"


def _freed(removals: list[Removal]) -> int:
    return sum(removal.model.nbytes for removal in removals if not removal.in_use)


def _facts(model: CachedModel) -> dict[str, object]:
    return {
        "source": model.source,
        "source_folder": model.source_folder,
        "source_exists": model.source_exists,
        "format": model.format,
        "target": model.target,
        "model": str(model.model),
        "bytes": model.nbytes,
        "last_used": datetime.fromtimestamp(model.last_used, UTC).isoformat(timespec="seconds")
        if model.last_used
        else None,
        "state": model.state,
    }
