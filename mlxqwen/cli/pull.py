"""`mlxqwen pull`: a model of a hub, downloaded before it is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.fit import measured
from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.spellings import ModelCommand
from mlxqwen.cli.text_input import check_unicode
from mlxqwen.console import Output
from mlxqwen.errors import OptionError, one_line

__all__ = ["pull"]


@click.command(cls=ModelCommand)
@click.argument("model", required=False, shell_complete=complete_folder)
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--force", is_flag=True, help="Download even what does not fit this machine's memory.")
def pull(model: str | None, revision: str | None, force: bool) -> None:
    """Download MODEL into the hub's cache, so that it is there when it is needed.

    MODEL is a hub id, an alias such as qwen3:4b (mlxqwen list --aliases), or modelscope:ID. What cannot be run is
    refused before its weights come. A download that was broken off goes on with the files that are not there.
    """
    if model is None:
        raise click.UsageError("Give a MODEL, such as qwen3:4b.")
    check_unicode(model=model, revision=revision)
    with leave_at_once():
        from mlxqwen.device import current_device
        from mlxqwen.engine.loading import locate_model
        from mlxqwen.files.aliases import naming_alias
        from mlxqwen.files.hub import located
        from mlxqwen.model.footprint import size_up
        from mlxqwen_convert.sizes import size_of

    place = located(model, revision, hub_alone=True)
    if isinstance(place, Path):
        raise OptionError(
            f"{model}: a folder of this machine, expected a model of a hub", hint="It is used as it is, by its path."
        )
    folder = locate_model(model, revision=revision, force=force)
    with naming_alias(model):
        stored, loaded = measured(folder)
    needed = size_up(loaded or stored, current_device(), tokens=1)
    how = "" if stored.runs else "; it is converted once, when it is first loaded"
    fits = "fits this machine" if needed.fits else "does not fit this machine"
    line = f"{place.name} ({size_of(stored.disk_bytes)}, {fits}) is in {folder}{how}"
    Output(sys.stdout).write(one_line(line) + "\n")
