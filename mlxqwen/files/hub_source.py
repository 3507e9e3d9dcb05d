"""A model of a hub → its folder: listed, looked at by its headers, then downloaded, whichever hub has it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlxqwen.errors import HubError, MlxqwenError
from mlxqwen.files.adapters import adapter_alone, adapters_among
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub import gguf_error
from mlxqwen.files.model_files import read_config_file, without_quantization

if TYPE_CHECKING:
    from mlxqwen.files.preview import Listing

__all__ = ["HubModel", "Source", "checked", "downloaded", "seen"]


logger = logging.getLogger("mlxqwen")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of a hub: its id, the revision asked for, the name that the user gave, and whether ModelScope has it."""

    repo_id: str
    revision: str | None
    name: str
    is_on_modelscope: bool


class Source(Protocol):
    """A model of one hub, asked through that hub's client."""

    @property
    def place(self) -> HubModel:
        """The model."""

    @property
    def name(self) -> str:
        """The model, as errors call it."""

    def listed(self) -> Listing | Path | None:
        """The model's files; the folder of an earlier download where the hub does not answer or is not to be asked.

        None where its client has to say what is wrong. Raises `HubError` if the hub refuses the model, or does not
        answer and there is no earlier download.
        """

    def cached(self) -> Path | None:
        """The folder of an earlier download, whole or not, without asking the hub; None if there is none.

        Raises `HubError` where the hub's client cannot be used.
        """

    def kept(self, listing: Listing) -> Path | None:
        """The folder of the model if all of it is here already: the hub is not asked again."""

    def fetch(self, listing: Listing | None, names: Sequence[str] | None = None) -> Path:
        """Download files, or all that are wanted → the model's folder. Raises `HubError`."""

    @property
    def locks(self) -> Path:
        """The folder of the model's locks, once it is listed; see `mlxqwen.files.under_way`."""

    def errors(self) -> AbstractContextManager[None]:
        """Turns what the hub's client raises into `HubError`."""


def downloaded(source: Source, check: Callable[[Path], object] | None = None) -> Path:
    """The folder of a model, downloaded if it is not there. Raises `HubError`, and what `check` raises.

    Args:
        source: the model.
        check: called with a preview before weights are downloaded.
    """
    from mlxqwen.files.transfer import looking_up  # of no use to most loads

    with looking_up(source.name):
        known = _listed(source)
        if isinstance(known, Path):
            return known
        folder = None if known is None else source.kept(known)
        if folder is None:
            known, folder = _fetched(source, known, check)
        checked(source, folder)
    for note in adapters_among(known.adapters) if known is not None else ():
        logger.warning(note)
    return folder


def _fetched(
    source: Source, known: Listing | None, check: Callable[[Path], object] | None
) -> tuple[Listing | None, Path]:
    """Download a model that is not all here, or wait for a thread that does → what the hub has, and the folder."""
    from mlxqwen.files.transfer import has_abandoned
    from mlxqwen.files.under_way import alone_in_process, is_under_way, marked

    def note(who: str) -> None:
        logger.warning("%s: %s is downloading it; what it has begun is waited for", source.name, who)

    with alone_in_process(source.locks, lambda: note("another thread of this process")) as has_waited:
        if has_waited:
            again = _listed(source)
            if isinstance(again, Path):
                return None, again
            known = again
            folder = None if known is None else source.kept(known)
            if folder is not None:
                return known, folder
        if is_under_way(source.locks):
            note("a thread that was left, or another process," if has_abandoned() else "another process")
        with marked(source.locks):
            if check is not None and known is not None and known.missing_weights:
                with _previewed(source, known) as preview:
                    check(preview)
            return known, source.fetch(known)


@contextmanager
def seen(source: Source) -> Iterator[Path]:
    """The folder of a model for those who read no weights: these are not downloaded. Raises `HubError`."""
    from mlxqwen.files.transfer import looking_up

    with ExitStack() as stack:
        with looking_up(source.name):
            known = _listed(source)
            if isinstance(known, Path):
                folder = known
            elif known is not None and known.missing_weights:
                folder = stack.enter_context(_previewed(source, known))
            else:
                kept = None if known is None else source.kept(known)
                folder = checked(source, source.fetch(known) if kept is None else kept)
        yield folder


def _listed(source: Source) -> Listing | Path | None:
    """What the hub has. Raises `HubError` where it is GGUF files alone."""
    known = source.listed()
    if known is not None and not isinstance(known, Path) and known.gguf and "config.json" not in known.sizes:
        raise gguf_error(source.name, known.gguf)
    return known


@contextmanager
def _previewed(source: Source, listing: Listing) -> Iterator[Path]:
    """The preview of a model. Raises `HubError` if the hub refuses it, or the disk has no room for it."""
    from mlxqwen.files.preview import check_room, preview

    check_room(listing)
    # The configuration comes first and alone: a model of another kind is refused before anything else is asked.
    if "config.json" in listing.sizes:
        _check_kind(source.name, source.fetch(listing, ["config.json"]))
    with ExitStack() as stack:
        folder = source.fetch(listing, [name for name in listing.sizes if not name.endswith(".safetensors")])
        with source.errors():
            previewed = stack.enter_context(preview(listing, folder))
        yield checked(source, previewed)


def _check_kind(name: str, folder: Path) -> None:
    """Raise the error that names the model's kind, if its `config.json` is not one of Qwen3's."""
    if (folder / "config.json").is_file():
        try:
            # Whether what is said of a quantization counts, the weights' headers tell.
            values = without_quantization(read_config_file(folder).values)
            ModelConfig.from_dict(values, source=str(folder / "config.json"))
        except MlxqwenError as error:
            problem = error.problem.replace(str(folder), name)
            raise type(error)(problem, hint=error.hint.replace(str(folder), name)) from None


def checked(source: Source, folder: Path) -> Path:
    """The folder. Raises `HubError` if what was downloaded has no config or no safetensors weights.

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
        return folder
    raise HubError(
        f"{source.name}: the model has no {missing}",
        hint="Choose a version of the model with safetensors weights; GGUF and PyTorch files are not read.",
    )
