"""The `mlxqwen` command and its subcommands; each is imported when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from mlxqwen import __version__
from mlxqwen.cli.interrupts import BROKEN_PIPE, leave_at_once
from mlxqwen.cli.terminal import print_notes, silence_streams

__all__ = ["mlxqwen"]

_COMMANDS = {
    "cache": "mlxqwen.cli.cache",
    "chat": "mlxqwen.cli.chat",
    "completion": "mlxqwen.cli.completion",
    "convert": "mlxqwen.cli.convert",
    "generate": "mlxqwen.cli.generate",
    "info": "mlxqwen.cli.info",
}


class LazyGroup(click.Group):
    """Subcommands by name, so that none pays for another's imports. A closed pipe ends them without a word."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        with leave_at_once():
            command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command if isinstance(command, click.Command) else None

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError:  # of --help and --version, which click would make an error
            silence_streams()
            raise click.exceptions.Exit(BROKEN_PIPE) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
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
