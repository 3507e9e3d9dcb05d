"""Defaults of the user's own: `config.toml` and `MLXQWEN_MODEL`, for options that the command line leaves out."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mlxqwen.errors import OptionError

__all__ = ["config_path", "give_way", "read_defaults", "told_defaults"]

_MOST_BYTES = 2**16
_MODEL_VARIABLE = "MLXQWEN_MODEL"
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
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in commands:
                raise _unknown(path, f"[{key}]", sorted(commands))
        elif not any(_parameter(one, key) for one in (command, find("generate"), find("chat"))):
            raise _unknown(path, key, sorted(_settable(find("generate"))))
        else:
            chosen[key] = value
    for key, value in values.get(name, {}).items():
        if _parameter(command, key) is None:
            raise _unknown(path, f"{key} in [{name}]", sorted(_settable(command)))
        chosen[key] = value
    defaults = {}
    for key, value in chosen.items():
        if (parameter := _parameter(command, key)) is not None and parameter.name is not None:
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
    try:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: not TOML: {error}", hint='A line is such as model = "qwen3:4b".') from None


def _unknown(path: Path, found: str, expected: list[str]) -> OptionError:
    return OptionError(f"{path}: found {found}, expected one of {', '.join(expected)}", hint="Correct or remove it.")


def _settable(command: click.Command) -> set[str]:
    names = {param.name for param in command.params if param.name not in _NOT_SETTABLE and not _is_hidden(param)}
    return {name.replace("_", "-") for name in names if name is not None}


def _is_hidden(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and param.hidden


def _parameter(command: click.Command, key: str) -> click.Parameter | None:
    """The parameter that a key sets; words are joined by hyphens or underscores."""
    name = {"json": "as_json"}.get(key, key.replace("-", "_"))
    if name.replace("_", "-") not in _settable(command):
        return None
    return next(param for param in command.params if param.name == name)


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
