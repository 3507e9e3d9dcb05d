"""A model of the hub before its weights are downloaded: its small files, and the headers of its weight files.

A preview is a folder that can be read as the whole model's could, up to its weights: files of weights have their
headers and their sizes, and take no room on the disk. So what can be refused is refused before gigabytes come.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlxqwen.errors import HubError, MlxqwenError
from mlxqwen.files.adapters import is_adapter_below
from mlxqwen.files.headers_only import PREVIEW
from mlxqwen.files.hub import GGUF_SUFFIXES
from mlxqwen.files.transfer import Given, waited_for
from mlxqwen.files.under_way import begun_bytes, locks_of

__all__ = ["Listing", "bytes_of", "check_room", "first_adapters", "first_gguf", "list_files", "preview"]

_FIRST_BYTES = 1 << 18  # of a file of weights; most headers are shorter
_LONGEST_HEADER = 16 * 2**20  # bytes; those of the largest releases have a few hundred thousand
_AT_ONCE = 8
_MOST_ADAPTERS = 64
_MOST_GGUF = 3


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one state of a model.

    Attributes:
        name: the model, as errors call it.
        commit: the state.
        sizes: bytes of each file that is wanted.
        missing: those that are not on this machine.
        place: the folder on whose disk they are kept.
        setting: the variable that moves it to another disk.
        begun: tells the bytes of files that have come in part.
        first_bytes: a file's first bytes, as many as are asked for, from the hub.
        adapters: files of adapters in folders of the model, which are not wanted; the first few.
        gguf: files that are not read; the first few.
    """

    name: str
    commit: str
    sizes: dict[str, int]
    missing: tuple[str, ...]
    place: Path
    setting: str
    begun: Callable[[], int]
    first_bytes: Callable[[str, int], bytes]
    adapters: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()

    @property
    def missing_weights(self) -> tuple[str, ...]:
        """Files of weights that have to be downloaded."""
        return tuple(name for name in self.missing if name.endswith(".safetensors"))


def list_files(repo_id: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str]) -> Listing:
    """Ask the hub for the files of a model. Raises what its client raises, a timeout after HF_HUB_ETAG_TIMEOUT."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.utils._paths import filter_repo_objects

    info = HfApi().model_info(
        repo_id, revision=revision, files_metadata=True, timeout=float(constants.HF_HUB_ETAG_TIMEOUT)
    )
    commit = info.sha or ""
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    adapters, gguf = first_adapters(sizes), first_gguf(sizes)
    names = filter_repo_objects(sizes, allow_patterns=list(wanted), ignore_patterns=list(unwanted))
    sizes = {name: sizes[name] for name in names}
    missing = (name for name in sizes if not isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str))
    place = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    locks = locks_of(Path(constants.HF_HUB_CACHE), repo_id)
    begun, first_bytes = partial(begun_bytes, place / "blobs", locks), partial(_first_bytes, repo_id, commit)
    return Listing(repo_id, commit, sizes, tuple(missing), place, "HF_HOME", begun, first_bytes, adapters, gguf)


def first_adapters(paths: Iterable[str]) -> tuple[str, ...]:
    """The first few of the adapters' files in folders of a model."""
    return tuple(sorted(filter(is_adapter_below, paths)))[:_MOST_ADAPTERS]


def first_gguf(paths: Iterable[str]) -> tuple[str, ...]:
    """The first few of a model's GGUF files."""
    return tuple(sorted(path for path in paths if path.lower().endswith(GGUF_SUFFIXES)))[:_MOST_GGUF]


def bytes_of(folder: Path, pattern: str) -> int:
    """Bytes of the files of a folder whose names match a pattern."""
    found = 0
    for path in folder.glob(pattern):
        with suppress(OSError):  # under another name meanwhile
            found += path.stat().st_size
    return found


def check_room(listing: Listing) -> None:
    """Raise `HubError` if the disk of the hub's cache has no room for what has to be downloaded."""
    needed = sum(listing.sizes[name] for name in listing.missing) - listing.begun()
    existing = next(parent for parent in (listing.place, *listing.place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(
            f"{listing.name}: {needed / 1e9:.1f} GB are to be downloaded, the disk of {listing.place} has "
            f"{free / 1e9:.1f} GB free",
            hint=f"Free some space, or point {listing.setting} to a larger disk.",
        )


@contextmanager
def preview(listing: Listing, small_files: Path) -> Iterator[Path]:
    """The preview of a model: removed in the end. Errors raised meanwhile name the model, not this folder.

    Args:
        listing: the files.
        small_files: a folder with all files but weights.
    """
    with tempfile.TemporaryDirectory(prefix=PREVIEW, ignore_cleanup_errors=True) as root:
        folder = Path(root) / listing.name
        folder.mkdir(parents=True)
        for path in small_files.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                copy = folder / path.relative_to(small_files)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)

        for name in listing.adapters:
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            place.touch()

        def write(name: str) -> None:
            _write_sparse(folder / name, _head(listing, name), listing.sizes[name])

        def write_all(_: Given) -> None:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(write, (name for name in listing.sizes if name.endswith(".safetensors"))))

        waited_for(write_all)
        try:
            yield folder
        except MlxqwenError as error:
            problem, hint = (text.replace(f"{root}{os.sep}", "") for text in (error.problem, error.hint))
            raise type(error)(problem, hint=hint) from None


def _head(listing: Listing, name: str) -> bytes:
    """The beginning of a file of weights, up to the end of its header."""
    head = listing.first_bytes(name, min(_FIRST_BYTES, listing.sizes[name]))
    length = 8 + int.from_bytes(head[:8], "little")
    if _LONGEST_HEADER < length <= listing.sizes[name]:
        raise HubError(
            f"{listing.name}/{name}: found a header of {length:,} bytes, expected at most {_LONGEST_HEADER:,}",
            hint="No release of Qwen3 has such files: check the name of the model.",
        )
    if len(head) < length <= listing.sizes[name]:
        head = listing.first_bytes(name, length)
    return head[:length]


def _first_bytes(repo_id: str, commit: str, name: str, count: int) -> bytes:
    """The first `count` bytes of a file of the hub, and no more, whatever it sends."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    url = hf_hub_url(repo_id, name, revision=commit)
    headers = {**build_hf_headers(), "range": f"bytes=0-{count - 1}"}
    timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    pieces = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            pieces += piece
            if len(pieces) >= count:
                break
    return bytes(pieces[:count])


def _write_sparse(path: Path, head: bytes, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max(size, len(head)))
