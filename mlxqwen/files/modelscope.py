"""A model of ModelScope → a folder on disk, by the downloads of ModelScope's own client, which is an extra."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlxqwen.errors import CheckpointError, HubError, install_command
from mlxqwen.files.adapters import adapters_among
from mlxqwen.files.atomic import write_file
from mlxqwen.files.hub_download import UNWANTED_FILES, WANTED_FILES, check_model
from mlxqwen.files.hub_errors import first_line, found_here, is_interruption
from mlxqwen.files.hub_settings import TRUE
from mlxqwen.files.json_file import read_json_object

if TYPE_CHECKING:
    from modelscope_hub import HubApi

__all__ = ["downloaded_from_modelscope"]

_TOKEN = "MODELSCOPE_API_TOKEN"
_CHECKED = ".mlxqwen-checked.json"
_INDEX = "model.safetensors.index.json"


def downloaded_from_modelscope(name: str, repo_id: str, revision: str | None) -> Path:
    """The folder of a model of ModelScope, downloaded if it is not there.

    The client resumes a file that was broken off, and checks the SHA-256 that the hub lists of each file, once: a file
    with the size and time that it had then is not read again.

    Args:
        name: what the user called it.
        repo_id: organisation/model.
        revision: a branch, tag or commit; None for "master".

    Raises:
        HubError: it cannot be found or downloaded, or its client is not installed.
    """
    try:
        import modelscope_hub as client  # brings its logger, which then writes to the real standard error
    except ImportError as cause:
        raise HubError(
            f"{name}: found no client of ModelScope, which downloads its models",
            hint=f"Install it: {install_command('modelscope')}",
        ) from cause
    except ValueError as cause:  # reads the environment
        raise _malformed(name, cause) from cause
    try:
        with _quiet():
            folder, notes = _folder(name, repo_id, revision, client)
    except HubError:
        raise
    except Exception as cause:  # the client lets errors of its HTTP and thread libraries through
        raise _hub_error(name, repo_id, revision, cause) from cause
    check_model(name, folder)
    for note in notes:
        logging.getLogger("mlxqwen").warning(note)
    return folder


def _folder(name: str, repo_id: str, revision: str | None, client: Any) -> tuple[Path, tuple[str, ...]]:
    """The folder of a model, and a note on what is not downloaded."""
    api: HubApi = client.HubApi()
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in TRUE:
        return _known(name, api, repo_id, revision, None), ()
    try:
        api = client.HubApi(endpoint=api.resolve_endpoint_for_read(repo_id))
        listed = api.list_repo_files(repo_id, "model", revision=revision)
    except client.NotExistError as cause:
        raise _not_found(name, repo_id, revision, api, client) from cause
    except client.NetworkError as cause:  # times out, or is refused
        return _known(name, api, repo_id, revision, cause), ()
    wanted = [file for file in listed if file.type != "tree" and _is_wanted(name, file.path)]
    entries = [{"Path": file.path, "Size": file.size or None, "Sha256": file.sha256} for file in wanted]
    folder = Path(api.download_repo(repo_id, "model", revision=revision, file_list=[]))  # its place alone
    checked = _checked(folder)
    new = [one for one in entries if (state := _state(folder, one)) is None or state != checked.get(str(one["Path"]))]
    if new:
        api.download_repo(repo_id, "model", revision=revision, file_list=new)
        states = {str(one["Path"]): _state(folder, one) for one in entries}
        with contextlib.suppress(OSError):  # then all are checked again
            write_file(folder / _CHECKED, json.dumps(states).encode(), private=True)
    return folder, adapters_among(str(file.path) for file in listed)


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


def _known(name: str, api: HubApi, repo_id: str, revision: str | None, cause: Exception | None) -> Path:
    """The folder of a complete earlier download. Raises `HubError` if there is none, and why it is not downloaded."""
    from modelscope_hub import CacheNotFound

    with contextlib.suppress(CacheNotFound):
        folder = Path(api.download_repo(repo_id, "model", revision=revision, local_files_only=True))
        if _is_complete(folder):
            return folder
    why, way_out = "HF_HUB_OFFLINE forbids to download it", "Unset HF_HUB_OFFLINE, or give a folder."
    if cause is not None:
        why = f"ModelScope cannot be reached: {_reason(cause)}"
        way_out = "Check the network and MODELSCOPE_ENDPOINT, or give a folder; files already complete are kept."
    raise HubError(
        f"{name}: {found_here(name)}, it is not completely in ModelScope's cache, and {why}", hint=way_out
    ) from cause


def _reason(cause: Exception) -> str:
    """What the system said of a connection, which the client wraps in its own words and addresses."""
    said, one = "no answer in time" if isinstance(cause, TimeoutError) else first_line(cause), cause.__cause__
    while one is not None:
        said = one.strerror if isinstance(one, OSError) and one.strerror else said
        one = one.__cause__ or one.__context__
    return said


def _is_complete(folder: Path) -> bool:
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


def _not_found(name: str, repo_id: str, revision: str | None, api: HubApi, client: Any) -> HubError:
    """Whether the model is missing, or its revision."""
    with contextlib.suppress(Exception):
        known = [str(one.get("Revision")) for one in api.list_repo_revisions(repo_id, "model")]
        if known and (revision or "master") not in known:
            return HubError(
                f"{name}: the model has no revision {revision or 'master'!r}",
                hint="Give a branch, tag or commit of the model, or leave the revision out.",
            )
    return HubError(
        f"{name}: {found_here(name)}, and not found on ModelScope: it is misspelt, or the model is private",
        hint=f"Check the name; for a private model set {_TOKEN} to a token that may read it.",
    )


def _hub_error(name: str, repo_id: str, revision: str | None, cause: Exception) -> HubError:
    """One clear error for whatever the client raised."""
    from modelscope_hub import APIError, FileDownloadError, FileIntegrityError

    file = ""
    if isinstance(cause, FileDownloadError) and cause.failed_files:
        file, first = min(cause.failed_files.items())
        cause = first if isinstance(first, Exception) else cause
    if isinstance(cause, FileIntegrityError):
        return HubError(
            f"{name}: {file or 'a file'} is not what ModelScope lists (size or SHA-256): {first_line(cause)}",
            hint="Run it again; if it stays so, the model is damaged on the hub.",
        )
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return HubError(
            f"{name}: the disk is full",
            hint="Free some space or point MODELSCOPE_CACHE to a larger disk; files already complete are kept.",
        )
    status = cause.status_code if isinstance(cause, APIError) else None
    if status == 401:
        return HubError(
            f"{name}: ModelScope refused the token", hint=f"Set {_TOKEN} to a valid token, or unset it and log out."
        )
    if status == 403:
        return HubError(
            f"{name}: ModelScope answered 403: the model is private or gated, or the token may not read it",
            hint=f"Accept its terms on its page, then set {_TOKEN} to a token of an account that may read it.",
        )
    if status == 429:
        return HubError(f"{name}: ModelScope answered 429: too many requests", hint="Wait a few minutes, then retry.")
    if status is not None and status >= 500:
        return HubError(
            f"{name}: ModelScope answered {status}", hint="Try again later: files already complete are kept."
        )
    problem = f"{name}: the download failed: {type(cause).__name__}: {first_line(cause)}"
    if is_interruption(cause):
        return HubError(problem, hint="Run it again: files already complete are kept.")
    if isinstance(cause, OSError) and cause.filename is not None:
        return HubError(problem, hint="Point MODELSCOPE_CACHE to a folder that can be written to.")
    variables = ", ".join(sorted(variable for variable in os.environ if variable.startswith("MODELSCOPE_")))
    return HubError(problem, hint=f"Check {variables} in the environment." if variables else "")


def _malformed(name: str, cause: Exception) -> HubError:
    return HubError(
        f"{name}: a setting of ModelScope's client is malformed: {first_line(cause)}",
        hint="Check MODELSCOPE_ENDPOINT and the other MODELSCOPE_… variables of the environment.",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the client's log off the terminal, and its progress bars out of files and pipes."""
    logger = logging.getLogger("modelscope_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        if sys.stderr is not None and sys.stderr.isatty():
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)
