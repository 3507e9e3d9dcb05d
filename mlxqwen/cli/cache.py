"""`mlxqwen cache`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from mlxqwen.errors import one_line

if TYPE_CHECKING:
    from mlxqwen_convert.cached import CachedModel

__all__ = ["cache"]


@click.group()
def cache() -> None:
    """Models that were converted when they were first loaded."""


@cache.command("list")
def list_models() -> None:
    """List them, with their sizes and what they were made of."""
    from mlxqwen_convert.cached import cached_models

    _print(cached_models())


@cache.command()
@click.option("--all", "everything", is_flag=True, help="Remove every model.")
def prune(everything: bool) -> None:
    """Remove those that are unfinished or whose source is gone."""
    from mlxqwen_convert.cached import prune as prune_models

    _print(prune_models(everything=everything))


def _print(models: Iterable[CachedModel]) -> None:
    from mlxqwen_convert.report import size_of

    for model in models:
        state = "" if model.finished else ", unfinished"
        sys.stdout.write(one_line(f"{model.folder}  {size_of(model.size)}{state}  from {model.source}") + "\n")
