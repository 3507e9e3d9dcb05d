"""Options under the names that other tools give them, in groups of a command's help."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from mlxqwen.cli.defaults import defaults_named, give_way

__all__ = [
    "DtypeChoice",
    "ExistingFile",
    "ModelCommand",
    "SettableCommand",
    "SpelledCommand",
    "SpelledOption",
    "spelled_option",
    "usage_message",
]

_MOST_SUGGESTED = 3
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


class SpelledOption(click.Option):
    """An option that is also taken under other names, which the help does not show.

    Args:
        also: further names; of a switch, those of its on side.
        also_off: further names of the off side of a switch.
        group: the heading of the help that it stands under.
    """

    def __init__(
        self,
        *arguments: Any,
        also: Sequence[str] = (),
        also_off: Sequence[str] = (),
        group: str = "Options",
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.also = (*also, *also_off)
        self.also_on, self.also_off = list(also), list(also_off)
        self.group = group

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser know all names."""
        on, off = self.opts, self.secondary_opts
        self.opts, self.secondary_opts = on + self.also_on, off + self.also_off
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts, self.secondary_opts = on, off


class DtypeChoice(click.Choice[str]):
    """The dtypes to compute in; `auto`, `half` and `float` are taken, too, as vLLM writes them."""

    def __init__(self) -> None:
        super().__init__(["bfloat16", "float16", "float32"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The dtype; None for `auto`, which is what no option means."""
        if value == "auto":
            return None
        return super().convert({"half": "float16", "float": "float32"}.get(value, value), param, ctx)


class ExistingFile(click.Path):
    """A file that is there; JSON in the place of its name is told as that."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The file's name, as it is."""
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and not os.path.lexists(value):
            self.fail("found JSON, expected the name of a file that holds it", param, ctx)
        return super().convert(value, param, ctx)


def spelled_option(group: str, *names: str, **options: Any) -> Callable[[_Decorated], _Decorated]:
    """`click.option` for a `SpelledOption` of a group."""
    return click.option(*names, cls=SpelledOption, group=group, **options)


class SettableCommand(click.Command):
    """A command whose options have defaults of the user's own, which its errors name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; a default that is no value of its option is told with where it is from."""
        with defaults_named(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; what is wrong with a default is told with where it is from."""
        with defaults_named(ctx):
            return super().invoke(ctx)


class ModelCommand(SettableCommand):
    """A command with the argument `model`, which may also be given as --model or -m; the help does not show these."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(click.Option(["-m", "--model", "model_option"], metavar="MODEL", hidden=True))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; --model stands for the argument."""
        rest = super().parse_args(ctx, args)
        given = ctx.params.pop("model_option", None)
        if given is not None:
            if ctx.get_parameter_source("model") is ParameterSource.COMMANDLINE:
                raise click.UsageError("Give MODEL or --model, not both.", ctx)
            ctx.params["model"] = given
            ctx.set_parameter_source("model", ParameterSource.COMMANDLINE)
        return rest


class SpelledCommand(SettableCommand):
    """A command with its options in groups."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; defaults that contradict what was typed are left out."""
        rest = super().parse_args(ctx, args)
        give_way(ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section of the help for each group, in the order of their first options; the last has what is left."""
        groups: dict[str, list[tuple[str, str]]] = {}
        others: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                group = groups.setdefault(param.group, []) if isinstance(param, SpelledOption) else others
                group.append(record)
        if len(groups) == 1:
            others, groups = [*next(iter(groups.values())), *others], {}
        for name, records in [*groups.items(), ("Other" if groups else "Options", others)]:
            with formatter.section(name):
                formatter.write_dl(records)


def usage_message(error: click.UsageError) -> str:
    """What a usage error says; of an option that does not exist, with those that may have been meant."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        # click puts each choice on a line of its own.
        return error.format_message().replace("\n\t", " ")
    from mlxqwen.cli.nearest import nearest  # hardly any start needs it

    known: dict[str, str] = {}
    for param in error.ctx.command.get_params(error.ctx):
        if isinstance(param, click.Option):
            known |= _names(param)
    shown = list(dict.fromkeys(known[name] for name in nearest(error.option_name, known)))[:_MOST_SUGGESTED]
    message = f"No such option {error.option_name!r}."
    return f"{message} Did you mean {' or '.join(map(repr, shown))}?" if shown else message


def _names(option: click.Option) -> dict[str, str]:
    """The long names of an option → those that its help shows."""
    names = {name: name for name in (*option.opts, *option.secondary_opts)}
    if isinstance(option, SpelledOption):
        names |= {name: max(option.opts, key=len) for name in option.also_on}
        names |= {name: max(option.secondary_opts, key=len) for name in option.also_off}
    return {name: shown for name, shown in names.items() if name.startswith("--")}
