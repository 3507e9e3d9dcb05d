"""A model of the Hugging Face hub → its folder in the hub's cache, by the hub's client."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxqwen.errors import HubError, MlxqwenError
from mlxqwen.files.hub_errors import first_line, hub_error, hub_variables, is_timeout, unreachable, wrong_setting
from mlxqwen.files.hub_settings import can_be_imported
from mlxqwen.files.hub_source import HubModel, checked
from mlxqwen.files.transfer import Download, Given, QuietLog, waited_for
from mlxqwen.files.under_way import locks_of, remove_leftovers

if TYPE_CHECKING:
    from mlxqwen.files.preview import Listing

__all__ = [
    "COMPANION_FILES",
    "UNWANTED_FILES",
    "WANTED_FILES",
    "HuggingFace",
    "progress_on_terminal_only",
    "quiet_warnings",
]

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


_LOG = QuietLog("huggingface_hub", logging.ERROR)


class HuggingFace:
    """A model of the Hugging Face hub; see `mlxqwen.files.hub_source.Source`."""

    def __init__(self, place: HubModel) -> None:
        self._place = place

    @property
    def place(self) -> HubModel:
        """The model."""
        return self._place

    @property
    def name(self) -> str:
        """The model's id."""
        return self.place.repo_id

    @property
    def locks(self) -> Path:
        """The folder of the model's locks."""
        return locks_of(Path(hub_client(self.name).constants.HF_HUB_CACHE), self.name)

    def listed(self) -> Listing | Path | None:
        """The hub's files of the model; an earlier download where it does not answer; None where it is not asked."""
        from mlxqwen.files.preview import list_files  # of no use to most loads

        place, client = self.place, hub_client(self.name)
        if client.constants.HF_HUB_OFFLINE:
            return None
        try:
            return list_files(place.repo_id, place.revision or "main", WANTED_FILES, UNWANTED_FILES)
        except Exception as cause:
            if not is_timeout(cause):
                return None  # its client looks for an earlier download, or says what is wrong
            seconds = client.constants.HF_HUB_ETAG_TIMEOUT
            silence = TimeoutError(f"no answer in {seconds} seconds (HF_HUB_ETAG_TIMEOUT sets them)")
        try:
            with quiet_warnings():
                folder = client.snapshot_download(place.repo_id, revision=place.revision, local_files_only=True)
            return checked(self, Path(folder))
        except Exception as cause:
            raise unreachable(place.repo_id, silence) from cause

    def cached(self) -> Path | None:
        """The folder of an earlier download, whole or not, without asking the hub; None if there is none."""
        client = hub_client(self.name)
        try:
            with quiet_warnings():
                return Path(client.snapshot_download(self.name, revision=self.place.revision, local_files_only=True))
        except Exception:  # as if there were none: a download says what is wrong
            return None

    def kept(self, listing: Listing) -> Path | None:
        """The folder of the listed state, if it is whole and is what the revision means offline, too."""
        if listing.missing:
            return None
        try:
            with quiet_warnings():
                folder = Path(
                    hub_client(self.name).snapshot_download(
                        self.name,
                        revision=self.place.revision,
                        allow_patterns=WANTED_FILES,
                        ignore_patterns=UNWANTED_FILES,
                        local_files_only=True,
                    )
                )
        except Exception:  # its client is asked, and says what is wrong
            return None
        return folder if folder.name == listing.commit else None

    def fetch(self, listing: Listing | None, names: Sequence[str] | None = None) -> Path:
        """Download files, or all that are wanted → the model's folder. Raises `HubError`."""
        client, place = hub_client(self.name), self.place
        remove_leftovers(Path(client.constants.HF_HUB_CACHE) / self.locks.name / "blobs", self.locks)

        def work(given: Given) -> Path:
            with quiet_warnings():  # also of downloads that nobody waits for any more
                folder = client.snapshot_download(
                    place.repo_id,
                    revision=place.revision,
                    allow_patterns=WANTED_FILES if names is None else [*names],
                    ignore_patterns=UNWANTED_FILES,
                    tqdm_class=_bar_that_stops(given),
                )
            return Path(folder)

        with self.errors():
            return waited_for(work, None if listing is None else self._download(listing, names))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what the client raises into errors of ours; it lets those of its HTTP and thread libraries through."""
        try:
            with quiet_warnings():
                yield
        except MlxqwenError:
            raise
        except Exception as cause:
            raise hub_error(self.name, self.place.revision, cause) from cause

    def _download(self, listing: Listing, names: Sequence[str] | None) -> Download:
        """What has to come, and how much of it has come by now."""
        constants = hub_client(self.name).constants
        missing = [name for name in listing.missing if names is None or name in names]

        def arrived() -> int:
            whole = listing.place / "snapshots" / listing.commit
            return sum(listing.sizes[name] for name in missing if (whole / name).exists()) + listing.begun()

        return Download(
            self.place.name,
            sum(listing.sizes[name] for name in missing),
            arrived,
            2.0 * float(constants.HF_HUB_DOWNLOAD_TIMEOUT),
            "HF_HUB_DOWNLOAD_TIMEOUT",
            is_shown=names is None,
        )


def _bar_that_stops(given: Given) -> type[Any]:
    """A progress bar for the hub's client which shows nothing, and ends its downloads once nobody waits for them."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> Any:
            given.check()
            return super().update(n)

    return Bar


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
def quiet_warnings() -> Iterator[None]:
    """Keeps the client's warnings off the terminal: what matters in them comes as an error of ours."""
    with _LOG.quiet():
        yield


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
