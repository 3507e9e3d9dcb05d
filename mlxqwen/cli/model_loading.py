"""From a command's options to a model that is loaded, with its progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxqwen.cli.conversion_progress import conversion_progress
from mlxqwen.cli.generate_options import cache_options, parse_rope_scaling
from mlxqwen.cli.interrupts import leave_at_once
from mlxqwen.cli.terminal import LoadingLine

if TYPE_CHECKING:
    from mlxqwen.engine.engine import Engine
    from mlxqwen.engine.loading import MakeRoom, OnConvert
    from mlxqwen.files.config import ModelConfig
    from mlxqwen.model.loading import LoadOptions
    from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = ["check_model_files", "load_engine", "load_model_alone", "located_model", "read_model_config"]


def _load_options(options: Mapping[str, Any]) -> LoadOptions:
    return {
        "dtype": options["dtype"],
        "rope_scaling": parse_rope_scaling(options["rope_scaling"]),
        "yarn_factor": options["yarn_factor"],
        "yarn": options.get("yarn"),
        "force": options["force"],
        "ignore_adapter": options["ignore_adapter"],
    }


def located_model(options: Mapping[str, Any], *, needs_tokenizer: bool = True) -> Path:
    """The folder of the model, downloaded if need be, once all is checked that can be checked before."""
    with leave_at_once():
        from mlxqwen.engine.loading import locate_model

    model, revision = options["model"], options["revision"]
    return locate_model(model, revision=revision, needs_tokenizer=needs_tokenizer, **_load_options(options))


def check_model_files(folder: Path, options: Mapping[str, Any]) -> None:
    """Check all of a model's folder that can be checked without its weights. Raises `MlxqwenError`."""
    from mlxqwen.engine.loading import check_files

    check_files(folder, **_load_options(options))


def read_model_config(folder: Path, options: Mapping[str, Any]) -> ModelConfig:
    """The config of a model's folder under the RoPE scaling that is asked for. Raises `MlxqwenError`."""
    from mlxqwen.model.loading import read_config

    return read_config(
        folder,
        rope_scaling=parse_rope_scaling(options["rope_scaling"]),
        yarn_factor=options["yarn_factor"],
        yarn=options.get("yarn"),
    )


def load_engine(
    options: Mapping[str, Any],
    *,
    folder: Path | None = None,
    make_room: MakeRoom | None = None,
    shows_progress: bool = True,
) -> Engine:
    """Load the model with its tokenizer.

    Args:
        options: of the command.
        folder: where the model's files are, if that is known.
        make_room: see `Engine.load`.
        shows_progress: whether that of a conversion is shown, and that of a load that takes long.
    """
    with leave_at_once():
        from mlxqwen.engine.engine import Engine

    model = options["model"]
    folder = folder or located_model(options)  # a download has lines of its own
    with _loading(model, folder, shows_progress=shows_progress) as on_convert:
        engine = Engine.load(
            None if model is None else folder,
            **_load_options(options),
            on_convert=on_convert,
            draft=options.get("draft"),
            speculative=options.get("speculative"),
            prefix_cache=options.get("prefix_cache"),
            prompt_cache=options.get("prompt_cache"),
            max_running=options.get("max_running"),
            make_room=make_room,
            **({} if options.get("draft_tokens") is None else {"draft_tokens": options["draft_tokens"]}),
        )
    if options.get("draft") is not None:
        _size_draft_cache(engine, options)
    return engine


def load_model_alone(
    options: Mapping[str, Any], folder: Path, on_progress: Callable[[], None] | None = None
) -> Qwen3ForCausalLM:
    """Load the model without its tokenizer.

    Args:
        options: of the command.
        folder: where the model's files are.
        on_progress: called each time a conversion goes on.
    """
    with leave_at_once():
        from mlxqwen.engine.loading import load_model_alone as load

    with _loading(options["model"], folder) as show:

        def on_convert(stage: str, done: int, total: int) -> None:
            show(stage, done, total)
            if on_progress is not None:
                on_progress()

        return load(folder, **_load_options(options), on_convert=on_convert)


@contextmanager
def _loading(model: str | None, folder: Path, *, shows_progress: bool = True) -> Iterator[OnConvert]:
    """The progress of a load that takes long, and of a conversion, which is told what is yielded."""
    from mlxqwen.files.aliases import naming_alias
    from mlxqwen.files.model_names import model_name

    with naming_alias(model), ExitStack() as shown:
        show = shown.enter_context(conversion_progress()) if shows_progress else None
        loading = LoadingLine(sys.stderr, model_name(folder))
        if shows_progress:
            shown.enter_context(loading)

        def on_convert(stage: str, done: int, total: int) -> None:
            if show is not None:
                loading.end()
                show(stage, done, total)

        yield on_convert


def _size_draft_cache(engine: Engine, options: Mapping[str, Any]) -> None:
    """Give the draft model a cache of the kind that the options ask for."""
    from mlxqwen.engine.speculation.draft_model import DraftModel

    if isinstance(engine.speculative, DraftModel):
        cache = cache_options(options)
        engine.speculative = DraftModel(
            engine.speculative.model,
            max_kv_size=cache["max_kv_size"],
            kv_bits=cache["kv_bits"],
            prefill_chunk=options["prefill_chunk"],
        )
