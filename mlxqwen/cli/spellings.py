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
]

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
        self.group = group
        self._also_on, self._also_off = list(also), list(also_off)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser know all names."""
        on, off = self.opts, self.secondary_opts
        self.opts, self.secondary_opts = on + self._also_on, off + self._also_off
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
    """A command with its options in groups, whose suggestions are the names that its help shows."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an option that does not exist is told with those that are spelled alike."""
        try:
            rest = super().parse_args(ctx, args)
            give_way(ctx)
            return rest
        except click.NoSuchOption as error:
            known = {name: _shown(option) for option in self.params for name in _names(option)}
            meant = sorted({known.get(name, name) for name in error.possibilities or ()})
            raise click.NoSuchOption(error.option_name, possibilities=meant, ctx=ctx) from None

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


def _names(option: click.Parameter) -> list[str]:
    also = option.also if isinstance(option, SpelledOption) else ()
    return [*option.opts, *option.secondary_opts, *also]


def _shown(option: click.Parameter) -> str:
    """The name of an option that stands in the help: its long one."""
    return max(option.opts, key=len)
