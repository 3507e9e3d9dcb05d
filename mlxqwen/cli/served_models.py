"""The models that `mlxqwen serve` serves: names and places as they are typed → what the server loads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxqwen.cli.generate_options import options_named
from mlxqwen.cli.model_loading import check_model_files, load_engine, located_model, read_model_config
from mlxqwen.errors import MlxqwenError, OptionError
from mlxqwen.files.aliases import naming_alias
from mlxqwen.files.hub import DEMO_FOLDER, MODELSCOPE_PREFIX, cached_folder, located

if TYPE_CHECKING:
    from mlxqwen.engine.engine import Engine
    from mlxqwen.engine.loading import MakeRoom
    from mlxqwen.server.leases import ModelSource
    from mlxqwen.server.settings import ServerSettings

__all__ = ["sources_of"]

# Holds 4,096 tokens, eight times what the demo model was trained on; each request takes the least factor that it needs.
_SCALING_OF_DEMO = '{"rope_type": "yarn", "factor": 8.0}'
_OF_ONE_MODEL = {
    "served_model_name": "--served-model-name",
    "revision": "--revision",
    "draft": "--draft",
}
_LONGEST_NAME = 256


def sources_of(
    first: str | None, others: Sequence[str], options: Mapping[str, Any], settings: ServerSettings
) -> list[ModelSource]:
    """What is served, the default model first; the demo model if nothing is named.

    Args:
        first: MODEL.
        others: the values of --model, each NAME=MODEL or MODEL.
        options: of the command, for all of them.
        settings: the server's.

    Raises:
        MlxqwenError: a name or a folder is wrong; of several models, the error says which.
        click.UsageError: options that go with one model, or a name that is given twice.
    """
    typed: list[tuple[str | None, str | None]] = [(None, first)] if first is not None or not others else []
    typed += [_split(one) for one in others]
    if len(typed) > 1:
        for option, flag in _OF_ONE_MODEL.items():
            if options[option] is not None:
                raise click.UsageError(f"{flag} is about one model, and {len(typed)} are to be served: leave it out.")
    sources = []
    for name, model in typed:
        with _naming(name or model, several=len(typed) > 1):
            sources.append(_source(name, model, options, settings, is_alone=len(typed) == 1))
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise click.UsageError(f"--model: found the name {twice!r} twice: give one of them another, NAME=MODEL.")
    return sources


def _split(typed: str) -> tuple[str | None, str]:
    """The name before the sign of equality, unless that belongs to a path, and the model."""
    name, equals, model = typed.partition("=")
    if not equals or os.path.isdir(typed) or "/" in name or os.sep in name:
        return None, typed
    if not name or not model:
        raise click.UsageError(f"--model: found {typed!r}, expected MODEL or NAME=MODEL.")
    return name, model


@contextmanager
def _naming(typed: str | None, *, several: bool) -> Iterator[None]:
    """Let errors say which of several models they are about."""
    try:
        yield
    except MlxqwenError as error:
        if not several or typed is None or error.problem.startswith(f"{typed}: "):
            raise
        raise type(error)(f"{typed}: {error.problem}", hint=error.hint) from error.__cause__


def _source(
    name: str | None, model: str | None, options: Mapping[str, Any], settings: ServerSettings, *, is_alone: bool
) -> ModelSource:
    from mlxqwen.engine.loading import read_fitting_tokenizer
    from mlxqwen.server.leases import ModelSource

    place = located(model, options["revision"])
    is_demo = isinstance(place, Path) and place.resolve() == DEMO_FOLDER.resolve()
    chosen = {**options, "model": model}
    if scales := is_demo and options["rope_scaling"] is None and options["yarn_factor"] is None:
        chosen |= {"yarn": "auto", "rope_scaling": _SCALING_OF_DEMO}

    fetched: list[Path] = []

    def fetch() -> None:
        fetched[:] = [located_model(chosen)]

    def load(make_room: MakeRoom) -> Engine:
        # Beside the lines of requests, which other threads log, progress would not be read.
        is_first = threading.current_thread() is threading.main_thread()
        folder = fetched[0] if fetched else None
        engine = load_engine(chosen, folder=folder, make_room=make_room, shows_progress=is_first)
        fetched.clear()  # a load that is put off comes again
        with options_named():
            settings.context(engine.model.config)
            settings.check_holds_prompts(engine.tokenizer)
        return engine

    context = None
    folder, is_whole = (place, True) if isinstance(place, Path) else (None, False)
    if not isinstance(place, Path) and not is_alone:
        folder, is_whole = cached_folder(place)
    if folder is not None:
        with naming_alias(model):
            with options_named():
                context = settings.context(read_model_config(folder, chosen))
            if is_whole and not is_alone:  # what is alone is loaded before the server listens
                check_model_files(folder, chosen)
                if settings.max_model_len is not None:
                    with options_named():
                        settings.check_holds_prompts(read_fitting_tokenizer(folder))
    return ModelSource(
        name=_checked(name or options["served_model_name"], model),
        load=load,
        location=str(place if isinstance(place, Path) else place.repo_id),
        repo_id=None if isinstance(place, Path) else place.repo_id,
        context=context,
        limit_scales=not scales,
        fetch=None if isinstance(place, Path) else fetch,
    )


def _checked(given: str | None, model: str | None) -> str:
    """What clients call a model: the name given for it, its id or alias, or the last part of a folder's path."""
    if given is not None:
        if not given or not given.isprintable() or len(given) > _LONGEST_NAME:
            raise OptionError(
                f"name of a model: found {given[:80]!r}, expected 1 to {_LONGEST_NAME} printable characters"
            )
        return given
    if model is None:
        return "demo"
    path = Path(model).expanduser()
    return path.resolve().name or "model" if path.is_dir() else model.removeprefix(MODELSCOPE_PREFIX)
