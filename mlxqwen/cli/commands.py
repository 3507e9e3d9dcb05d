"""The `mlxqwen` command and its subcommands; each is imported when it is called."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import click

from mlxqwen import __version__
from mlxqwen.cli.defaults import read_defaults
from mlxqwen.cli.interrupts import BROKEN_PIPE, leave_at_once
from mlxqwen.cli.streams import silence_streams
from mlxqwen.cli.terminal import print_notes

__all__ = ["mlxqwen"]

# The first sentence of each command's help, so that the list of all imports none of them.
_COMMANDS = {
    "bench": "Measure how fast MODEL reads prompts and writes answers, by the length of the prompt.",
    "cache": "Models that were converted when they were first loaded.",
    "chat": "Talk with MODEL, beginning with MESSAGE; /help lists what can be typed besides messages.",
    "completion": "Print the script that lets SHELL complete commands, options and folders.",
    "convert": "Turn SOURCE (a folder, hub id or alias) into OUTPUT, a folder that MLX's loaders read.",
    "generate": "Answer PROMPT, a conversation, or a file of prompts.",
    "info": "Tell what MODEL takes, and whether it fits this machine.",
    "list": "List the models of Qwen3's that are downloaded: size, whether they fit this machine, converted copies.",
    "pull": "Download MODEL into the hub's cache, so that it is there when it is needed.",
    "rm": "Remove downloaded models, and what was converted from them when they were loaded.",
    "serve": "Answer over HTTP, as OpenAI's API does: /v1/chat/completions and others.",
}


def _imported(name: str) -> click.Command:
    with leave_at_once():
        module = "list_models" if name == "list" else name
        command: click.Command = getattr(import_module(f"mlxqwen.cli.{module}"), module)
    return command


class LazyGroup(click.Group):
    """Imports each subcommand when it is called. A closed pipe ends a subcommand without a message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all subcommands, in the order of the help."""
        return sorted(_COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """First sentences, wrapped instead of cut short."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name]) for name in self.list_commands(ctx)])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of this name, imported now; None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        return _imported(cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an option of a command's that stands before it is told where it belongs."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from mlxqwen.cli.nearest import nearest

            option = error.option_name
            if nearest(option, ("--help", "--version")):
                raise
            raise click.UsageError(
                f"No such option {option!r} before a command: a command's options stand behind it, as in "
                f"mlxqwen generate {option} ….",
                ctx,
            ) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; for a wrong name, suggest a similar one, as click does when it knows all names."""
        if args[0] not in _COMMANDS and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {args[0]!r}. {_way(args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the arguments; `help COMMAND` is `COMMAND --help`, and a closed pipe ends either without a message."""
        name, words, *others = args
        if words[:1] == ["help"]:
            words = [*words[1:2], "--help"]
        try:
            return super().make_context(name, words, *others, **extra)
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


# What other tools call it.
_ELSEWHERE = {
    "run": "chat",
    "ask": "generate",
    "prompt": "generate",
    "quantize": "convert",
    "show": "info",
    "ls": "list",
    "download": "pull",
    "remove": "rm",
    "delete": "rm",
    "create": "convert",
    "push": "convert",
}
# What other tools have a command for, and is done otherwise here.
_OTHERWISE = {
    "ps": "A server tells at /v1/models which models are loaded.",
    "stop": "Ctrl-C ends a server; with --keep-alive it unloads models that nobody uses.",
}


def _way(word: str) -> str:
    """Where to go from a word that is no command: a similar one, or what a model or a text is given to."""
    from shlex import quote

    from mlxqwen.cli.nearest import nearest

    meant = nearest(word, _COMMANDS)
    if word in _OTHERWISE:
        return _OTHERWISE[word]
    if word in _ELSEWHERE or meant:
        return f"Did you mean {_ELSEWHERE.get(word) or meant[0]!r}?"
    if any(map(str.isspace, word)):
        return f"To ask a model: mlxqwen generate {quote(word)}."
    if word.startswith("-") or not (os.path.isdir(word) or ":" in word or "/" in word):
        return "To ask a model: mlxqwen generate TEXT; to talk with it: mlxqwen chat MODEL."
    return f"To talk with a model: mlxqwen chat {quote(word)}; to ask it: mlxqwen generate --model {quote(word)} TEXT."


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, "-V", "--version", prog_name="mlxqwen")
@click.pass_context
def mlxqwen(ctx: click.Context, /) -> None:
    """Run Qwen3 language models on Apple's MLX.

    Without --model the small demo model inside the package answers.
    ~/.config/mlxqwen/config.toml sets defaults, such as model = "qwen3:4b"; MLXQWEN_MODEL sets the model.
    """
    print_notes()
    name = ctx.invoked_subcommand
    if name in _COMMANDS:
        ctx.default_map = {name: read_defaults(name, _COMMANDS, _imported)}
