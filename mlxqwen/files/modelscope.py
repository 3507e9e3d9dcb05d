"""A model of ModelScope → its folder, by ModelScope's own client, which is an extra."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlxqwen.errors import CheckpointError, HubError, MlxqwenError
from mlxqwen.files.atomic import write_file
from mlxqwen.files.hub_download import UNWANTED_FILES, WANTED_FILES
from mlxqwen.files.hub_settings import TRUE
from mlxqwen.files.hub_source import HubModel
from mlxqwen.files.json_file import read_json_object
from mlxqwen.files.modelscope_errors import (
    model_not_found,
    modelscope_error,
    modelscope_malformed,
    modelscope_unreachable,
)
from mlxqwen.files.preview import Listing, bytes_of, first_adapters, first_gguf
from mlxqwen.files.transfer import Download, Given, QuietLog, SilenceError, waited_for
from mlxqwen.installation import install_command

if TYPE_CHECKING:
    from modelscope_hub import HubApi

__all__ = ["ModelScope", "is_complete"]

_TIMEOUT = "MODELSCOPE_DOWNLOAD_TIMEOUT"
_ANSWERS = "MODELSCOPE_API_TIMEOUT"
_LOG = QuietLog("modelscope_hub", logging.CRITICAL)
_CHECKED = ".mlxqwen-checked.json"
_INDEX = "model.safetensors.index.json"


class ModelScope:
    """A model of ModelScope; see `mlxqwen.files.hub_source.Source`.

    The client resumes a file that was broken off, and checks the SHA-256 that the hub lists of each file, once: a file
    with the size and time that it had then is not read again.
    """

    def __init__(self, place: HubModel) -> None:
        self._place = place
        self._found: HubApi | None = None
        self._folder = Path()
        self._entries: dict[str, dict[str, Any]] = {}

    @property
    def place(self) -> HubModel:
        """The model."""
        return self._place

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.place.name

    @property
    def locks(self) -> Path:
        """The model's own folder: its client's locks lie elsewhere."""
        folder = self._folder
        return folder.parent.parent if folder.parent.name == "snapshots" else folder

    def listed(self) -> Listing | Path | None:
        """The hub's files of the model; an earlier download where it is not asked or does not answer."""
        with self.errors():
            return self._listed()

    def cached(self) -> Path | None:
        """The folder of an earlier download, whole or not, without asking the hub; None if there is none."""
        with self.errors():
            return _found(self.place, self._api)

    def kept(self, listing: Listing) -> Path | None:
        """The folder, if all of it is here and was checked."""
        return None if listing.missing else self._folder

    def fetch(self, listing: Listing | None, names: Sequence[str] | None = None) -> Path:
        """Download files, or all that are wanted → the model's folder. Raises `HubError`."""
        wanted = [name for name in self._entries if names is None or name in names]
        terminal = sys.stderr  # the client's own bars go elsewhere meanwhile
        with self.errors():
            missing = self._missing(wanted)
            if missing:
                waited_for(
                    lambda given: self._download(missing, given),
                    self._progress(missing, is_shown=names is None),
                    terminal=terminal,
                )
                states = _checked(self._folder) | {name: _state(self._folder, self._entries[name]) for name in wanted}
                with contextlib.suppress(OSError):  # then all are checked again
                    write_file(self._folder / _CHECKED, json.dumps(states).encode(), private=True)
        return self._folder

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what the client raises into errors of ours; it lets those of its HTTP and thread libraries through."""
        client = _client(self.name)
        try:
            with _quiet():
                yield
        except MlxqwenError:
            raise
        except client.NotExistError as cause:
            raise model_not_found(self.place, self._api) from cause
        except Exception as cause:
            raise modelscope_error(self.name, cause) from cause

    @property
    def _api(self) -> HubApi:
        """The client, of the site that has the model once it is listed."""
        if self._found is None:
            self._found = _client(self.name).HubApi()
        return self._found

    def _listed(self) -> Listing | Path:
        client, place, api = _client(self.name), self.place, self._api
        if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in TRUE:
            return _known(place, api, None)

        def ask(_: Given) -> list[Any]:
            self._found = client.HubApi(endpoint=api.resolve_endpoint_for_read(place.repo_id))
            return list(self._found.list_repo_files(place.repo_id, "model", revision=place.revision))

        answer = Download(self.name, 0, lambda: 0, 2.0 * _seconds(_ANSWERS, 10.0), _ANSWERS, is_shown=False)
        try:
            listed = waited_for(ask, answer)
        except (client.NetworkError, SilenceError) as cause:  # times out, is refused, or is silent
            return _known(place, api, cause)
        api = self._api
        wanted = [file for file in listed if file.type != "tree" and _is_wanted(self.name, file.path)]
        self._entries = {
            file.path: {"Path": file.path, "Size": file.size or None, "Sha256": file.sha256} for file in wanted
        }
        self._folder = Path(
            api.download_repo(place.repo_id, "model", revision=place.revision, file_list=[])
        )  # its place
        sizes = {file.path: file.size or 0 for file in wanted}
        missing = self._missing([*self._entries])
        return Listing(
            name=self.name,
            commit=place.revision or "master",
            sizes=sizes,
            missing=tuple(missing),
            place=self._folder,
            setting="MODELSCOPE_CACHE",
            begun=lambda: sum(bytes_of(self._folder, f"{escape(name)}?*") for name in missing),
            first_bytes=self._first_bytes,
            adapters=first_adapters(file.path for file in listed),
            gguf=first_gguf(file.path for file in listed),
        )

    def _missing(self, names: Iterable[str]) -> list[str]:
        """Files that are not here, or were not found to be what the hub lists."""
        checked = _checked(self._folder)
        states = {name: _state(self._folder, self._entries[name]) for name in names}
        return [name for name, state in states.items() if state is None or state != checked.get(name)]

    def _download(self, names: Iterable[str], given: Given) -> None:
        from modelscope_hub import ProgressCallback

        class Stopping(ProgressCallback):
            def update(self, size: int) -> None:
                given.check()

        with _LOG.quiet():  # also of downloads that nobody waits for any more
            self._api.download_repo(
                self.place.repo_id,
                "model",
                revision=self.place.revision,
                file_list=[self._entries[name] for name in names],
                progress_callbacks=[Stopping],
            )

    def _progress(self, names: Sequence[str], *, is_shown: bool) -> Download:
        """What has to come, and how much of it has come by now: parts of a file have its name and more."""
        sizes = {name: self._entries[name]["Size"] or 0 for name in names}
        return Download(
            self.name,
            sum(sizes.values()),
            lambda: sum(min(size, bytes_of(self._folder, f"{escape(name)}*")) for name, size in sizes.items()),
            2.0 * _seconds(_TIMEOUT, 10.0),
            _TIMEOUT,
            is_shown=is_shown,
        )

    def _first_bytes(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a file of the hub, and no more, whatever it sends."""
        pieces = bytearray()
        with self._api.legacy.download_stream(
            self.place.repo_id, "model", name, self.place.revision or "master", {"Range": f"bytes=0-{count - 1}"}
        ) as response:
            for piece in response.iter_content(1 << 16):
                pieces += piece
                if len(pieces) >= count:
                    break
        return bytes(pieces[:count])


def _seconds(variable: str, default: float) -> float:
    """A number of seconds among the settings of the client, which itself refuses what is no number.

    Raises:
        HubError: one that is not above 0, or without end.
    """
    try:
        seconds = float(os.environ.get(variable) or default)
    except ValueError:
        return default
    if not 0 < seconds < math.inf:
        raise HubError(
            f"{variable}: found {os.environ[variable][:40]!r}, expected seconds, above 0 and with an end",
            hint=f"Set {variable} to a number such as {default:g}, or unset it.",
        )
    return seconds


def _client(name: str) -> Any:
    """The module `modelscope_hub`. Raises `HubError` where it is not installed, or a setting of it is malformed."""
    try:
        import modelscope_hub as client  # brings its logger, which then writes to the real standard error
    except ImportError as cause:
        raise HubError(
            f"{name}: found no client of ModelScope, which downloads its models",
            hint=f"Install it: {install_command('modelscope')}",
        ) from cause
    except ValueError as cause:  # reads the environment
        raise modelscope_malformed(name, cause) from cause
    return client


def _checked(folder: Path) -> dict[str, Any]:
    """The states in which files were found to be what the hub lists, by path."""
    try:
        return read_json_object(folder / _CHECKED, error=HubError)
    except HubError:
        return {}


def _state(folder: Path, entry: Mapping[str, Any]) -> list[Any] | None:
    """Size and time of a file, with the hash that the hub lists of it; None if it is not there or has another size."""
    try:
        found = (folder / str(entry["Path"])).stat()
    except OSError:
        return None
    if entry["Size"] is not None and found.st_size != entry["Size"]:
        return None
    return [found.st_size, found.st_mtime_ns, entry["Sha256"]]


def _is_wanted(name: str, path: str) -> bool:
    """Whether a file is taken. Raises `HubError` for a path that leads out of the model's folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or not path.isprintable():
        raise HubError(
            f"{name}: the hub lists a file {path[:80]!r}, expected paths within the model's folder",
            hint="Nothing was downloaded. Choose another model, and tell ModelScope of this one.",
        )
    return any(fnmatchcase(path, one) for one in WANTED_FILES) and not any(
        fnmatchcase(path, one) for one in UNWANTED_FILES
    )


def _known(place: HubModel, api: HubApi, cause: Exception | None) -> Path:
    """The folder of a complete earlier download. Raises `HubError` if there is none, and why it is not downloaded."""
    folder = _found(place, api)
    if folder is None or not is_complete(folder):
        raise modelscope_unreachable(place.name, cause) from cause
    return folder


def _found(place: HubModel, api: HubApi) -> Path | None:
    """The folder of an earlier download, whole or not; None if there is none."""
    from modelscope_hub import CacheNotFound

    with contextlib.suppress(CacheNotFound):
        return Path(api.download_repo(place.repo_id, "model", revision=place.revision, local_files_only=True))
    return None


def is_complete(folder: Path) -> bool:
    """Whether no file was broken off, and all shards of the index are there."""
    if any(folder.rglob("*.incomplete")) or not (folder / "config.json").is_file():
        return False
    if not (folder / _INDEX).is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = read_json_object(folder / _INDEX, error=CheckpointError).get("weight_map")
    except CheckpointError:
        return True  # the loader says what is wrong with it
    return not isinstance(shards, dict) or all((folder / str(one)).is_file() for one in set(map(str, shards.values())))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the client's log and its progress bars, one a file, off the terminal and out of files and pipes."""
    with _LOG.quiet(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
