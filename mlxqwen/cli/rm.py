"""`mlxqwen rm`: downloaded models are removed, with what was converted from them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.spellings import SettableCommand
from mlxqwen.cli.terminal import print_error
from mlxqwen.cli.text_input import check_unicode
from mlxqwen.console import Output, counted
from mlxqwen.errors import one_line

if TYPE_CHECKING:
    from mlxqwen.files.downloads import Removal

__all__ = ["rm"]


@click.command(cls=SettableCommand)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--revision", help="Remove this commit, branch or tag alone.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
def rm(models: tuple[str, ...], revision: str | None, yes: bool, dry_run: bool) -> None:
    """Remove downloaded models, and what was converted from them when they were loaded.

    MODEL is a hub id, an alias, or modelscope:ID. Files that another revision shares stay. Nothing outside the caches
    of the hubs and of mlxqwen is touched; other programs may use the same downloads.
    """
    check_unicode(revision=revision, model="".join(models))
    if revision is not None and len(models) > 1:
        raise click.UsageError("--revision is about one model: remove them one by one.")
    with leave_at_once():
        from mlxqwen.files.aliases import naming_alias
        from mlxqwen.files.downloads import removal_of

    found = []
    for name in models:
        with naming_alias(name):
            found.append(removal_of(name, revision))
    removals = {(one.name, frozenset(one.paths)): one for one in found}.values()  # a model may be named twice
    output = Output(sys.stdout)
    if dry_run:
        for removal in removals:
            output.write(f"would remove {_told(removal)} freed\n")
        return
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("Nobody can be asked here: give --yes, or look first with --dry-run.")
    for removal in removals:
        if yes or _agrees(f"Remove {_told(removal)} freed?"):
            told = _told(removal)  # sizes are looked at before they are gone
            _remove(removal)
            output.write(f"removed {told} freed\n")


def _agrees(question: str) -> bool:
    answers = {"": False, "n": False, "no": False, "y": True, "yes": True}
    while True:
        try:
            answer = click.prompt(f"{question} [y/N]", default="", show_default=False, err=True).strip()
        except click.Abort:  # which leaves the line open that was asked on; Ctrl-C itself ends it
            raise KeyboardInterrupt from None
        if answer.lower() in answers:
            return answers[answer.lower()]
        print_error(f"found {answer[:40]!r}, expected y or n")


def _remove(removal: Removal) -> None:
    from mlxqwen_convert.cache_list import remove_made_of

    folders = [one.folder.resolve() for one in removal.removed]
    removal.run()
    for one in remove_made_of(folders):
        if one.in_use:
            sys.stderr.write(f"note: {one_line(one.model.source)}: its conversion is in use, and left\n")


def _told(removal: Removal) -> str:
    """For example `Qwen/Qwen3-4B-FP8 (2 revisions; 1 conversion, 4.27 GB): 9.43 GB`."""
    from mlxqwen_convert.cache_list import remove_made_of
    from mlxqwen_convert.sizes import size_of

    made = remove_made_of([one.folder.resolve() for one in removal.removed], dry_run=True)
    free = [one.model.nbytes for one in made if not one.in_use]
    parts = []
    if removal.kept:
        parts.append(", ".join(one.revision[:7] for one in removal.removed))
        parts.append(f"{counted(len(removal.kept), 'other revision')} {'stays' if len(removal.kept) == 1 else 'stay'}")
    elif len(removal.removed) > 1:
        parts.append(counted(len(removal.removed), "revision"))
    if free:
        parts.append(f"{counted(len(free), 'conversion')}, {size_of(sum(free))}")
    details = f" ({'; '.join(parts)})" if parts else ""
    return f"{one_line(removal.name)}{details}: {size_of(removal.nbytes + sum(free))}"
