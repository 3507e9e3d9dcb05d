"""The `mlxqwen` command and its subcommands; each is imported when it is called."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from mlxqwen import __version__
from mlxqwen.cli.interrupts import BROKEN_PIPE, leave_at_once
from mlxqwen.cli.streams import silence_streams
from mlxqwen.cli.terminal import print_notes

__all__ = ["mlxqwen"]

_COMMANDS = {
    "bench": "mlxqwen.cli.bench",
    "cache": "mlxqwen.cli.cache",
    "chat": "mlxqwen.cli.chat",
    "completion": "mlxqwen.cli.completion",
    "convert": "mlxqwen.cli.convert",
    "generate": "mlxqwen.cli.generate",
    "info": "mlxqwen.cli.info",
    "serve": "mlxqwen.cli.serve",
}


class LazyGroup(click.Group):
    """Imports each subcommand when it is called. A closed pipe ends a subcommand without a message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all subcommands, in the order of the help."""
        return sorted(_COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """First sentences, wrapped instead of cut short."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, found.get_short_help_str(200)) for name, found in commands if found is not None])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of this name, imported now; None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        with leave_at_once():
            command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; for a wrong name, suggest a similar one, as click does when it knows all names."""
        meant = [] if args[0] in _COMMANDS else get_close_matches(args[0], _COMMANDS, n=1)
        if meant and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {meant[0]!r}?", ctx)
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the arguments; a closed pipe ends `--help` and `--version` without a message."""
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError:  # of --help and --version, which click would make an error
            silence_streams()
            raise click.exceptions.Exit(BROKEN_PIPE) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; a usage error names it, and a closed pipe ends it without a message."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            # click's parser does not say whose option lacks its value.
            if error.ctx is None and (command := self.get_command(ctx, ctx.invoked_subcommand or "")) is not None:
                error.ctx = click.Context(command, parent=ctx, info_name=ctx.invoked_subcommand)
            raise
        except BrokenPipeError:
            silence_streams()
            return BROKEN_PIPE


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="mlxqwen")
def mlxqwen() -> None:
    """Run Qwen3 language models on Apple's MLX.

    Without --model the small demo model inside the package answers.
    """
    print_notes()
