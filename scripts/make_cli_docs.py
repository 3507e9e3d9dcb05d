"""Write docs/cli.md: the help of every command, as the command itself prints it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mlxqwen.cli.commands import mlxqwen

PATH = Path(__file__).parent.parent / "docs" / "cli.md"
WIDTH = 100


def document() -> str:
    """The page's text."""
    sections = "".join(map(_section, _contexts(_context(mlxqwen, "mlxqwen"))))
    return f"# The command line\n\nWritten by `scripts/make_cli_docs.py`.\n{sections}"


def _contexts(context: click.Context) -> Iterator[click.Context]:
    """A command and, if it is a group, all those below it."""
    yield context
    group = context.command
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if command is not None:
                yield from _contexts(_context(command, name, context))


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def _section(context: click.Context) -> str:
    return f"\n## {context.command_path}\n\n```text\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(document(), encoding="utf-8")
