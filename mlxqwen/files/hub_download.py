"""A model of the Hugging Face hub → its folder in the hub's cache, looked at before its weights come."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxqwen.errors import HubError, MlxqwenError
from mlxqwen.files.adapters import adapter_alone, adapters_among
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub_errors import first_line, hub_error, hub_variables, unreachable, wrong_setting
from mlxqwen.files.hub_settings import can_be_imported
from mlxqwen.files.model_files import read_config_file, without_quantization

if TYPE_CHECKING:
    from mlxqwen.files.preview import Listing

__all__ = [
    "COMPANION_FILES",
    "UNWANTED_FILES",
    "WANTED_FILES",
    "HubModel",
    "check_model",
    "downloaded",
    "listed",
    "previewed",
    "progress_on_terminal_only",
    "quiet_warnings",
]

logger = logging.getLogger("mlxqwen")

# Beside config and weights: what the model is used with, and its licence.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENCE",
    "NOTICE",
    "NOTICE.txt",
)
# What older tools say of a quantization, and what tells an adapter or an embedding model.
SETTINGS_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "adapter_config.json",
    "modules.json",
)
WANTED_FILES = [
    "config.json",
    "model*.safetensors",
    "weights*.safetensors",
    "model.safetensors.index.json",
    *SETTINGS_FILES,
    *COMPANION_FILES,
    "additional_chat_templates/*.jinja",
    "README.md",  # names the licence
]
UNWANTED_FILES = ["model*/*", "weights*/*", "additional_chat_templates/*/*"]  # the hub's "*" matches "/" as well


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of a hub: its id, the revision asked for, the name that the user gave, and whether ModelScope has it."""

    repo_id: str
    revision: str | None
    name: str
    is_on_modelscope: bool


def downloaded(
    place: HubModel, check: Callable[[Path], object] | None = None, known: Listing | Path | None = None
) -> Path:
    """The folder of a model of the hub, downloaded if it is not there. Raises `HubError`, and what `check` raises.

    Args:
        place: the model.
        check: called with a preview before weights are downloaded.
        known: what `listed` has found, if it was asked before.
    """
    repo_id, client = place.repo_id, hub_client(place.repo_id)
    known = listed(place) if known is None else known
    if isinstance(known, Path):
        return known
    if check is not None and known is not None and known.missing_weights:
        with previewed(place, known) as preview:
            check(preview)
    with hub_errors(place):
        folder = client.snapshot_download(
            repo_id, revision=place.revision, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES
        )
    check_model(repo_id, Path(folder))
    for note in adapters_among(known.adapters) if known is not None else ():
        logger.warning(note)
    return Path(folder)


@contextmanager
def previewed(place: HubModel, listing: Listing) -> Iterator[Path]:
    """The preview of a model. Raises `HubError` if the hub refuses it, or the disk has no room for it."""
    from mlxqwen.files.preview import check_room, preview  # of no use to most loads

    client = hub_client(place.repo_id)
    check_room(listing, Path(client.constants.HF_HUB_CACHE))
    with hub_errors(place):
        # The configuration comes first and alone: a model of another kind is refused before anything else is asked.
        first = client.snapshot_download(place.repo_id, revision=place.revision, allow_patterns=["config.json"])
    check_kind(place.repo_id, Path(first))
    small = [name for name in listing.sizes if not name.endswith(".safetensors")]
    with ExitStack() as stack:
        with hub_errors(place):
            folder = client.snapshot_download(place.repo_id, revision=place.revision, allow_patterns=small)
            seen = stack.enter_context(preview(listing, Path(folder)))
        check_model(place.repo_id, seen)
        yield seen


def listed(place: HubModel) -> Listing | Path | None:
    """The hub's files of a model; the folder of an earlier download where the hub does not answer; None where it is
    not to be asked, or where its client has to say what is wrong.

    Raises `HubError` if the hub refuses the model, or does not answer and there is no earlier download.
    """
    from mlxqwen.files.preview import list_files  # of no use to most loads

    client = hub_client(place.repo_id)
    if client.constants.HF_HUB_OFFLINE:
        return None
    try:
        return list_files(place.repo_id, place.revision or "main", WANTED_FILES, UNWANTED_FILES)
    except Exception as cause:
        if "TimeoutException" not in (kind.__name__ for kind in type(cause).__mro__):
            return None  # its client looks for an earlier download, or says what is wrong
        seconds = client.constants.HF_HUB_ETAG_TIMEOUT
        silence = TimeoutError(f"no answer in {seconds} seconds (HF_HUB_ETAG_TIMEOUT sets them)")
    try:
        with quiet_warnings():
            folder = client.snapshot_download(place.repo_id, revision=place.revision, local_files_only=True)
        check_model(place.repo_id, Path(folder))
    except Exception as cause:
        raise unreachable(place.repo_id, silence) from cause
    return Path(folder)


def check_kind(repo_id: str, folder: Path) -> None:
    """Raise the error that names the model's kind, if its `config.json` is not one of Qwen3's."""
    if (folder / "config.json").is_file():
        try:
            # Whether what is said of a quantization counts, the weights' headers tell.
            values = without_quantization(read_config_file(folder).values)
            ModelConfig.from_dict(values, source=str(folder / "config.json"))
        except MlxqwenError as error:
            problem = error.problem.replace(str(folder), repo_id)
            raise type(error)(problem, hint=error.hint.replace(str(folder), repo_id)) from None


def hub_client(repo_id: str) -> Any:
    """The module `huggingface_hub`. Raises `HubError` where the environment keeps it from being imported."""
    if not can_be_imported() and (fault := wrong_setting(repo_id)):
        raise fault
    try:
        import_module("huggingface_hub.constants")  # reads the environment
        import_module("huggingface_hub.errors")
        client = import_module("huggingface_hub")
        _ = client.snapshot_download  # imported when it is asked for, which sets up the client's log
        return client
    except ValueError as cause:
        raise wrong_setting(repo_id) or HubError(
            f"{repo_id}: a setting of the hub's client is malformed: {first_line(cause)}",
            hint=f"Correct {', '.join(hub_variables(str(cause)))}, or unset it.",
        ) from cause


@contextmanager
def hub_errors(place: HubModel) -> Iterator[None]:
    """Turns what the hub's client raises into errors of ours; errors of its HTTP and thread libraries are among it."""
    try:
        with quiet_warnings(), progress_on_terminal_only():
            yield
    except MlxqwenError:
        raise
    except Exception as cause:
        raise hub_error(place.repo_id, place.revision, cause) from cause


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Keeps the client's warnings off the terminal: what matters in them comes as an error of ours."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level == logging.WARNING:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def progress_on_terminal_only() -> Iterator[None]:
    """Hides the client's progress bars where they would fill a log, unless the user's environment decides."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    decided = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ or are_progress_bars_disabled()
    if decided or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def check_model(repo_id: str, folder: Path) -> None:
    """Raise `HubError` if what was downloaded has no config or no safetensors weights.

    Raises:
        UnsupportedFormatError: it is an adapter.
    """
    if not (folder / "config.json").is_file():
        if adapter := adapter_alone(folder):
            raise adapter
        missing = "config.json"
    elif not any(folder.glob("*.safetensors")):
        missing = "safetensors weights"
    else:
        return
    raise HubError(
        f"{repo_id}: the model has no {missing}",
        hint="Choose a version of the model with safetensors weights; GGUF and PyTorch files are not read.",
    )
