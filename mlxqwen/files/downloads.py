"""The models of Qwen3's that the caches of Hugging Face's hub and of ModelScope hold, and their removal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxqwen.errors import ConfigError, HubError, one_line
from mlxqwen.files.hub import MODELSCOPE_PREFIX, expanded, located
from mlxqwen.files.hub_download import hub_client, quiet_warnings
from mlxqwen.files.hub_source import HubModel
from mlxqwen.files.json_file import read_json_object
from mlxqwen.files.modelscope import is_complete
from mlxqwen.files.under_way import is_under_way, locks_of, none_under_way

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

__all__ = ["Download", "Removal", "downloads", "removal_of"]

_SHORTEST_HASH = 4  # letters that may stand for a commit


@dataclass(frozen=True, slots=True)
class Download:
    """One state of a model in a cache.

    Args:
        repo_id: organisation/model.
        is_of_modelscope: whether ModelScope's client keeps it, else the Hugging Face hub's.
        revision: the commit, or with ModelScope the branch or tag.
        refs: branches and tags that mean this commit.
        folder: its files.
        locks: the folder of the model's locks; see `mlxqwen.files.under_way`.
        nbytes: what they take on the disk.
        last_used: in seconds since 1970; 0 where it is not known.
        model_type: of its `config.json`; None if it has none.
    """

    repo_id: str
    is_of_modelscope: bool
    revision: str
    refs: tuple[str, ...]
    folder: Path
    locks: Path
    nbytes: int
    last_used: float
    model_type: str | None

    @property
    def name(self) -> str:
        """What it is called wherever a model is named."""
        return f"{MODELSCOPE_PREFIX * self.is_of_modelscope}{self.repo_id}"

    @property
    def is_under_way(self) -> bool:
        """Whether a process downloads a state of the model now."""
        return is_under_way(self.locks)

    @property
    def is_incomplete(self) -> bool:
        """Whether some of its files are missing, as far as can be told without the hub."""
        if any(self.folder.glob("*.safetensors")):
            return not is_complete(self.folder)
        has_parts = any((self.folder.parent.parent / "blobs").glob("*.incomplete"))
        return self.is_under_way or has_parts or any(self.folder.glob("*.incomplete"))

    @property
    def is_of_qwen3(self) -> bool:
        """Whether its config says that it is one of Qwen3's."""
        return self.model_type in ("qwen3", "qwen3_moe")

    def is_meant_by(self, revision: str) -> bool:
        """Whether `revision` is its commit, the beginning of that, or one of its refs."""
        begins = len(revision) >= _SHORTEST_HASH and self.revision.startswith(revision)
        return revision == self.revision or begins or revision in self.refs


@dataclass(frozen=True, slots=True)
class Removal:
    """What is to be removed of a model, and nothing is yet.

    Args:
        name: the model's.
        removed: its states that go.
        kept: those that stay.
        locks: the folder of the model's locks.
        nbytes: what is freed; what another state shares stays, and does not count.
        paths: the files and folders, all of them in the model's own folder.
        remove: removes them as far as it can.
    """

    name: str
    removed: tuple[Download, ...]
    kept: tuple[Download, ...]
    locks: Path
    nbytes: int
    paths: tuple[Path, ...]
    remove: Callable[[], None]

    def run(self) -> None:
        """Remove it. Raises `HubError` while another process downloads it, and for what cannot be removed."""
        with none_under_way(self.locks, self.name):
            self.remove()
        left = next((path for path in self.paths if os.path.lexists(path)), None)
        if left is not None:
            raise HubError(
                f"{self.name}: {left}: cannot be removed",
                hint="Check who may write there, then run the same command again.",
            )


def downloads() -> tuple[list[Download], list[str]]:
    """All models in the caches, whatever their kind → those, and a line for each folder that cannot be read.

    Raises `HubError` where the settings of the hub's client are malformed.
    """
    info = _hub_cache()
    found = [] if info is None else [one for repo in info.repos for one in _of_hub(repo)]
    faults = [] if info is None else [one_line(str(warning)) for warning in info.warnings]
    try:
        found += [one for repo in _modelscope_repos() for one in _of_modelscope(repo)]
    except (OSError, ValueError) as error:  # its client reads the environment
        faults.append(one_line(f"the cache of ModelScope: {error}"))
    return sorted(found, key=lambda one: (one.repo_id.lower(), one.is_of_modelscope, -one.last_used)), faults


def removal_of(name: str, revision: str | None = None) -> Removal:
    """Find what removing a model, or one of its revisions, takes away.

    Args:
        name: a hub id, an alias, the address of a model's page, or `modelscope:ID`.
        revision: a commit, the beginning of one, a branch or a tag; by default all that is there.

    Raises:
        HubError: it is not in the cache, is no plain folder there, or is being downloaded by another process.
    """
    removal = _found(name, revision)
    with none_under_way(removal.locks, removal.name):
        return removal


def _found(name: str, revision: str | None) -> Removal:
    if name.startswith(("/", ".", "~")) and os.path.lexists(expanded(name)):  # whatever it is
        raise _own_folder(name)
    place = located(name, None, hub_alone=True)
    if isinstance(place, Path):
        raise _own_folder(name)
    known = [
        one for one in downloads()[0] if one.repo_id == place.repo_id and one.is_of_modelscope == place.is_on_modelscope
    ]
    revision = revision or place.revision
    if not known and revision is None and not place.is_on_modelscope and (damaged := _damaged(place)) is not None:
        return damaged
    removed = tuple(one for one in known if revision is None or one.is_meant_by(revision))
    if not removed:
        which = "" if revision is None or not known else f" of revision {revision!r}"
        there = ", ".join(one.revision[:12] for one in known)
        raise HubError(
            f"{place.name}: found nothing{which} in the cache{f', only {there}' if there else ''}",
            hint="mlxqwen list tells what is there.",
        )
    kept = tuple(one for one in known if one not in removed)
    if place.is_on_modelscope:
        return _modelscope_removal(place.name, removed, kept)
    return _hub_removal(place.name, removed, kept)


def _own_folder(name: str) -> HubError:
    return HubError(
        f"{name}: a path of this machine, expected a model that was downloaded from a hub",
        hint="Files and folders of your own are yours to remove.",
    )


def _damaged(place: HubModel) -> Removal | None:
    """The removal of a folder of the hub's cache that its client cannot read; None if there is none."""
    root = Path(hub_client(place.repo_id).constants.HF_HUB_CACHE)
    folder = root / f"models--{place.repo_id.replace('/', '--')}"
    if not folder.is_dir():
        return None
    _check_within(place.name, [folder], folder)
    locks = locks_of(root, place.repo_id)
    return Removal(
        place.name, (), (), locks, _disk_bytes(folder), (folder,), lambda: shutil.rmtree(folder, ignore_errors=True)
    )


def _hub_removal(name: str, removed: tuple[Download, ...], kept: tuple[Download, ...]) -> Removal:
    """The hub's client says what no other revision shares; only paths within the model's own folder count."""
    info = _hub_cache()
    if info is None:
        raise HubError(f"{name}: found nothing in the cache, expected it there")
    repo = next(one for one in info.repos if one.repo_type == "model" and one.repo_id == removed[0].repo_id)
    own = replace(info, repos=frozenset({repo}))  # a mirror has the same commits
    with quiet_warnings():
        strategy = own.delete_revisions(*(one.revision for one in removed))
    nbytes = strategy.expected_freed_size
    if strategy.repos:
        for path in (repo.repo_path / "blobs").glob("*.incomplete"):
            with suppress(OSError):
                nbytes += path.stat().st_size
    paths = (*strategy.repos, *strategy.refs, *strategy.snapshots, *strategy.blobs)
    _check_within(name, paths, repo.repo_path)

    def remove() -> None:
        with quiet_warnings():
            strategy.execute()

    return Removal(name, removed, kept, removed[0].locks, nbytes, paths, remove)


def _modelscope_removal(name: str, removed: tuple[Download, ...], kept: tuple[Download, ...]) -> Removal:
    """Folders of revisions share nothing; with the last one, the model's own goes."""
    paths = []
    for one in removed:
        root = one.locks
        path = one.folder if kept else root
        _check_within(name, [path], root)
        paths += [path] if path not in paths else []
    nbytes = sum(_disk_bytes(path) for path in paths)

    def remove() -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)

    return Removal(name, removed, kept, removed[0].locks, nbytes, tuple(paths), remove)


def _check_within(name: str, paths: Sequence[Path], folder: Path) -> None:
    """Raise `HubError` unless all paths are plain ones in the model's folder: a link there may lead anywhere."""
    for path in paths:
        is_below = path == folder or folder in path.parents
        if not is_below or path.parent.resolve() != (folder.parent.resolve() / path.relative_to(folder.parent)).parent:
            raise HubError(
                f"{name}: {path}: leads out of the model's folder in the cache, expected a file of its own",
                hint=f"Look at {folder}, and remove by hand what is no more wanted.",
            )
    if folder.is_symlink():
        raise HubError(
            f"{name}: {folder}: a link, expected a folder of the cache", hint="Remove the link, and what it leads to."
        )


def _hub_cache() -> HFCacheInfo | None:
    """What the hub's client says of its cache; None where there is none."""
    client = hub_client("the hub's cache")
    from huggingface_hub import CacheNotFound

    try:
        with quiet_warnings():
            return client.scan_cache_dir(client.constants.HF_HUB_CACHE)  # type: ignore[no-any-return]
    except CacheNotFound:
        return None
    except ValueError as error:  # a file
        raise HubError(f"the hub's cache: {error}", hint="Check HF_HOME and HF_HUB_CACHE.") from None


def _of_hub(repo: CachedRepoInfo) -> Iterator[Download]:
    if repo.repo_type != "model":
        return
    for revision in repo.revisions:
        yield Download(
            repo_id=repo.repo_id,
            is_of_modelscope=False,
            revision=revision.commit_hash,
            refs=tuple(sorted(revision.refs)),
            folder=Path(revision.snapshot_path),
            locks=locks_of(repo.repo_path.parent, repo.repo_id),
            nbytes=revision.size_on_disk,
            last_used=repo.last_accessed,
            model_type=_model_type(Path(revision.snapshot_path)),
        )


def _modelscope_repos() -> list[Any]:
    """The models in ModelScope's cache, if its client is installed."""
    if find_spec("modelscope_hub") is None:
        return []
    from modelscope_hub import HubApi

    return [one for one in HubApi().scan_cache().repos if str(one.repo_type) == "model"]


def _of_modelscope(repo: Any) -> Iterator[Download]:
    root = Path(repo.local_path)
    snapshots = root / "snapshots"
    folders = [one for one in snapshots.iterdir() if one.is_dir()] if snapshots.is_dir() else [root]
    for folder in folders:
        if (folder / "config.json").is_file():
            yield Download(
                repo_id=repo.repo_id,
                is_of_modelscope=True,
                revision="master" if folder == root else folder.name,
                refs=(),
                folder=folder,
                locks=root,
                nbytes=_disk_bytes(folder),
                last_used=folder.stat().st_mtime,
                model_type=_model_type(folder),
            )


def _model_type(folder: Path) -> str | None:
    try:
        found = read_json_object(folder / "config.json", error=ConfigError).get("model_type")
    except ConfigError:
        return None
    return found if isinstance(found, str) else None


def _disk_bytes(path: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_file() and not one.is_symlink())
