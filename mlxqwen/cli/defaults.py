"""Defaults of the user's own: `config.toml` and `MLXQWEN_MODEL`, for options that the command line leaves out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mlxqwen.errors import HubError, MlxqwenError, OptionError

__all__ = ["config_path", "defaults_named", "give_way", "read_defaults", "told_defaults"]

_MOST_BYTES = 2**16
_MODEL_VARIABLE = "MLXQWEN_MODEL"
_MOST_SHOWN = 8  # of the keys that there are
# What is asked, what is trusted and where results go is said each time.
_NOT_SETTABLE = {
    *(
        "prompt",
        "prompt_option",
        "prompt_file",
        "messages",
        "message",
        "model_argument",
        "tools",
        "json_schema",
        "batch",
    ),
    *("output", "raw", "trust_special_tokens", "revision", "source", "upload_repo", "api_key", "shell", "help"),
}
# Whose text may be a number alone.
_NUMBERS_IN_TEXT = {"context", "keep_alive", "prefix_cache"}
# Options that exclude one another: what the command line says is not contradicted by a default.
_EXCLUDED_BY: Mapping[str, frozenset[str]] = {
    "raw": frozenset({"system", "thinking", "drop_oldest", "early_stop_text"}),
    "messages": frozenset({"system"}),
    "batch": frozenset({"as_json"}),
    "thinking": frozenset({"thinking_budget", "early_stop_text"}),
    "thinking_budget": frozenset({"thinking"}),
    "draft": frozenset({"speculative"}),
    "speculative": frozenset({"draft"}),
    "yarn": frozenset({"yarn_factor", "rope_scaling"}),
    "yarn_factor": frozenset({"yarn", "rope_scaling"}),
    "rope_scaling": frozenset({"yarn", "yarn_factor"}),
    "quiet": frozenset({"verbose"}),
    "verbose": frozenset({"quiet"}),
}


def config_path() -> Path:
    """`mlxqwen/config.toml` in the folder for a user's settings: `$XDG_CONFIG_HOME`, or `~/.config`."""
    chosen = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(chosen) if os.path.isabs(chosen) else Path(os.path.expanduser("~")) / ".config"
    return folder / "mlxqwen" / "config.toml"


def read_defaults(name: str, commands: Collection[str], find: Callable[[str], click.Command]) -> dict[str, Any]:
    """The defaults for a command, by the names of its parameters.

    Keys at the top of the file are for every command with such an option, those in a table of a command's name for
    that one. `MLXQWEN_MODEL` stands above the file.

    Args:
        name: of the command that runs.
        commands: the names of all.
        find: gives the command of a name.

    Raises:
        OptionError: the file cannot be read, is no TOML, or names what is no option.
    """
    path, command, chosen = config_path(), find(name), {}
    values = _read(path)
    everywhere = [command, find("generate"), find("chat")] if values else [command]  # which are imported
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in commands:
                raise _unknown_table(path, key, commands)
        elif not any(_parameter(one, key) for one in everywhere):
            raise _unknown(path, key, everywhere[1:], {one: find(one) for one in commands})
        else:
            chosen[key] = value
    for key, value in values.get(name, {}).items():
        if _parameter(command, key) is None:
            raise _unknown(path, key, [command], {one: find(one) for one in commands}, table=f" in [{name}]")
        chosen[key] = value
    defaults = {}
    for key, value in chosen.items():
        if (parameter := _parameter(command, key)) is not None and parameter.name is not None:
            _check_kind(path, key, value, parameter)
            defaults[parameter.name] = [value] if parameter.multiple and not isinstance(value, list) else value
    if os.environ.get(_MODEL_VARIABLE) and _parameter(command, "model"):
        defaults["model"] = os.environ[_MODEL_VARIABLE]
    return defaults


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror or error}", hint="Mend or remove it.") from None
    import tomllib

    try:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        return tomllib.loads(data.decode("utf-8-sig"))  # some systems begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OptionError(
            f"{path}: not TOML: found byte {data[error.start]:#04x} in line {line}, expected UTF-8 text",
            hint="Save it as UTF-8.",
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise OptionError(f"{path}: not TOML: {reason}", hint='A line is such as model = "qwen3:4b".') from None


def _unknown_table(path: Path, found: str, commands: Collection[str]) -> OptionError:
    from mlxqwen.cli.nearest import nearest  # hardly any start needs it

    near = nearest(found, commands)
    hint = f"Did you mean [{near[0]}]?" if near else f"A table has the name of a command: {_some(commands)}."
    return OptionError(f"{path}: found [{found}], which is no command", hint=hint)


def _unknown(
    path: Path, found: str, expected: Sequence[click.Command], commands: Mapping[str, click.Command], *, table: str = ""
) -> OptionError:
    """The error for a key that is none where it stands.

    Args:
        path: of the file.
        found: the key.
        expected: commands whose options are keys there.
        commands: all of them.
        table: where it stands, in words.
    """
    problem = f"{path}: found {found}{table}, which is no setting"
    wanted = found.replace("_", "-")
    known = {name: key for command in expected for name, key in _settable(command).items()}
    owners = [name for name, command in commands.items() if _parameter(command, wanted) is not None]
    if owners and wanted not in known:
        tables = " or ".join(f"[{name}]" for name in owners)
        return OptionError(f"{problem} there", hint=f"It is a setting of {_some(owners)}: put it below {tables}.")
    if param := next((one for command in commands.values() for one in command.params if _key(one) == wanted), None):
        way = f", or by {param.envvar}" if param.envvar else ""
        return OptionError(f"{problem}: it is given each time{way}", hint="Remove it.")
    from mlxqwen.cli.nearest import nearest

    if near := nearest(wanted, known):
        return OptionError(problem, hint=f"Did you mean {known[near[0]]}?")
    listed = _some(dict.fromkeys(known.values()))
    return OptionError(f"{path}: found {found}{table}, expected one of {listed}", hint="Correct or remove it.")


def _some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _MOST_SHOWN
    return f"{', '.join(list(names)[:_MOST_SHOWN])}{f' and {more} more' if more > 0 else ''}"


def _check_kind(path: Path, key: str, value: object, parameter: click.Parameter) -> None:
    """Raise `OptionError` for what no option could be, such as a date, and for another kind than that of its option.

    What is text is left to the option, as on the command line.
    """
    values = value if isinstance(value, list) and parameter.multiple else [value]
    hint = "Correct or remove it."
    if not all(isinstance(one, str | int | float) for one in values):
        expected = "text, a number or true or false"
        raise OptionError(
            f"{path}: {key}: found {type(value).__name__}, expected {expected}{', or a list' * parameter.multiple}",
            hint=hint,
        )
    kinds, expected = _kinds(parameter)
    for one in values:
        if type(one) not in (*kinds, str):
            found = str(one).lower() if isinstance(one, bool) else one
            raise OptionError(f"{path}: {key}: found {found}, expected {expected}", hint=hint)


def _kinds(parameter: click.Parameter) -> tuple[tuple[type, ...], str]:
    """The types beside text that a parameter takes, and what to call what it expects."""
    match parameter.type:
        case click.types.BoolParamType():
            return (bool,), "true or false"
        case click.types.IntParamType():
            return (int,), "a whole number"
        case click.types.FloatParamType():
            return (int, float), "a number"
        case click.Choice(choices=choices) if all(map(str.isdigit, choices)):
            return (int,), f"one of {', '.join(choices)}"
        case click.Choice(choices=choices):
            return (), f"one of {', '.join(choices)}, as text"
    return ((int,), "a number or text") if parameter.name in _NUMBERS_IN_TEXT else ((), "text")


def _settable(command: click.Command) -> dict[str, str]:
    """Keys as they are suggested, and what they are called, under that name and those of other tools."""
    names = {}
    for param in command.params:
        if param.name is not None and param.name not in _NOT_SETTABLE and not _is_hidden(param):
            name = _key(param)
            names[name] = name
            names.update((flag.removeprefix("--"), name) for flag in getattr(param, "also", ()))
    return names


def _is_hidden(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and param.hidden


def _key(param: click.Parameter) -> str:
    """What a parameter is called in the file."""
    return {"as_json": "json"}.get(param.name or "", (param.name or "").replace("_", "-"))


def _parameter(command: click.Command, key: str) -> click.Parameter | None:
    """The parameter that a key sets; words are joined by hyphens or underscores."""
    wanted = key.replace("_", "-")
    if _settable(command).get(wanted) != wanted:
        return None
    return next(param for param in command.params if _key(param) == wanted)


@contextmanager
def defaults_named(ctx: click.Context) -> Iterator[None]:
    """Let errors about a default name where it is from: the file and key, or the variable.

    Args:
        ctx: of the command that runs.
    """
    try:
        yield
    except click.UsageError as error:
        if isinstance(error, click.BadParameter) and error.param is not None:
            source = _source(ctx, error.param)
            if source is not None:
                raise OptionError(f"{source}: {error.message}", hint="Correct or remove it.") from None
        # A rule about several options, of which the user has typed some.
        words = error.message.replace(",", " ").replace(":", " ").split()
        told = []
        for param in ctx.command.params:
            source = _source(ctx, param)
            flags = [flag for flag in (*param.opts, *param.secondary_opts) if flag in words]
            if source is not None and flags:
                told.append(f" {flags[0]} is set by {source}.")
        if not told:
            raise
        raise click.UsageError(error.format_message() + "".join(told), error.ctx or ctx) from None
    except MlxqwenError as error:
        if (source := _source_of_problem(ctx, error)) is not None:
            flag, colon, rest = error.problem.partition(": ")
            error.problem = f"{source}: {rest if colon and flag.startswith('-') else error.problem}"
        raise


def _source_of_problem(ctx: click.Context, error: MlxqwenError) -> str | None:
    subject = error.problem.partition(": ")[0].partition("/--")[0]
    for param in ctx.command.params:
        if subject in (*param.opts, *param.secondary_opts) and isinstance(param, click.Option):
            return _source(ctx, param)
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        is_subject = param.name == "model" and value and (isinstance(error, HubError) or subject == value)
        if param.name == "models":  # each is NAME=MODEL, or MODEL
            is_subject = subject.strip("'") in {word for one in value or () for word in (one, *one.partition("="))}
        if is_subject and (source := _source(ctx, param)) is not None:
            return source
    return None


def _source(ctx: click.Context, param: click.Parameter) -> str | None:
    """Where the value of a parameter is from, if it is neither typed nor built in."""
    source = ctx.get_parameter_source(param.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return str(param.envvar)
    if source is not ParameterSource.DEFAULT_MAP:
        return None
    if param.name == "model" and os.environ.get(_MODEL_VARIABLE):
        return _MODEL_VARIABLE
    return f"{config_path()}: {_key(param)}"


def give_way(ctx: click.Context) -> None:
    """Leave out defaults that contradict what was given on the command line."""
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    for param in ctx.command.params:
        name = param.name or ""
        is_default = ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP
        if is_default and any(name in _EXCLUDED_BY.get(other, ()) for other in given):
            ctx.params[name] = () if param.multiple else None


def told_defaults(ctx: click.Context) -> list[str]:
    """For each value that came from the file or the environment a line such as `--temperature 0.5 by …/config.toml`."""
    lines = []
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP or ctx.params.get(name) is None:
            continue
        of_environment = name == "model" and bool(os.environ.get(_MODEL_VARIABLE))
        flag = max(param.opts, key=len) if isinstance(param, click.Option) else "MODEL"
        source = _MODEL_VARIABLE if of_environment else config_path()
        lines.append(f"{flag} {ctx.params[name]} by {source}")
    return lines
