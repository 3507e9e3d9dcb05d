"""`mlxqwen completion`, and the completion of arguments that click does not know."""

from __future__ import annotations

import sys

import click
from click.shell_completion import CompletionItem, get_completion_class

from mlxqwen.console import Output

__all__ = ["complete_folder", "completion"]

_SHELLS = {
    "bash": 'eval "$(mlxqwen completion bash)"     in ~/.bashrc; bash 4.4 or newer',
    "zsh": 'eval "$(mlxqwen completion zsh)"      in ~/.zshrc, behind compinit',
    "fish": "mlxqwen completion fish | source      in ~/.config/fish/config.fish",
}


def complete_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete a model: the shell itself lists the folders."""
    return [CompletionItem(incomplete, type="dir")]


@click.command(
    help="Print the script that lets SHELL complete commands, options and folders.\n\n\b\n"
    + "\n".join(_SHELLS.values())
)
@click.argument("shell", type=click.Choice(list(_SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script; click makes it, and answers it through an environment variable."""
    scripts = get_completion_class(shell)
    if scripts is None:
        raise click.UsageError(f"click knows no completion for {shell}.")
    root = ctx.find_root()
    Output(sys.stdout).write(scripts(root.command, {}, "mlxqwen", "_MLXQWEN_COMPLETE").source())
