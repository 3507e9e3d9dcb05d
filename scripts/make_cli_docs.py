"""Write docs/cli.md: the help of every command, as the command itself prints it."""

from __future__ import annotations

from pathlib import Path

import click

from mlxqwen.cli.commands import mlxqwen

PATH = Path(__file__).parent.parent / "docs" / "cli.md"
WIDTH = 100


def document() -> str:
    """The page's text."""
    top = _context(mlxqwen, "mlxqwen")
    commands = {name: mlxqwen.get_command(top, name) for name in mlxqwen.list_commands(top)}
    contexts = [top, *(_context(command, name, top) for name, command in commands.items() if command is not None)]
    return "# The command line\n\nWritten by `scripts/make_cli_docs.py`.\n" + "".join(map(_section, contexts))


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def _section(context: click.Context) -> str:
    return f"\n## {context.command_path}\n\n```text\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(document(), encoding="utf-8")
