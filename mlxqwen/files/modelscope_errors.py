"""What ModelScope's client raises → one clear error: what happened, and the way out."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from mlxqwen.errors import HubError
from mlxqwen.files.hub_errors import first_line, found_here, is_interruption
from mlxqwen.files.hub_source import HubModel
from mlxqwen.files.transfer import SilenceError

if TYPE_CHECKING:
    from modelscope_hub import HubApi

__all__ = ["model_not_found", "modelscope_error", "modelscope_malformed", "modelscope_unreachable"]

TOKEN = "MODELSCOPE_API_TOKEN"


def modelscope_unreachable(name: str, cause: Exception | None) -> HubError:
    """The error for a hub that does not answer, or is not to be asked."""
    why, way_out = "HF_HUB_OFFLINE forbids to download it", "Unset HF_HUB_OFFLINE, or give a folder."
    if cause is not None:
        why = f"ModelScope cannot be reached: {_reason(cause)}"
        way_out = "Check the network and MODELSCOPE_ENDPOINT, or give a folder; files already complete are kept."
    return HubError(f"{name}: {found_here(name)}, it is not completely in ModelScope's cache, and {why}", hint=way_out)


def _reason(cause: Exception) -> str:
    """What the system said of a connection, which the client wraps in its own words and addresses."""
    is_told = isinstance(cause, SilenceError) or not isinstance(cause, TimeoutError)
    said, one = first_line(cause) if is_told else "no answer in time", cause.__cause__
    while one is not None:
        said = one.strerror if isinstance(one, OSError) and one.strerror else said
        one = one.__cause__ or one.__context__
    return said


def model_not_found(place: HubModel, api: HubApi) -> HubError:
    """Whether the model is missing, or its revision."""
    name, revision = place.name, place.revision
    with contextlib.suppress(Exception):
        known = [str(one.get("Revision")) for one in api.list_repo_revisions(place.repo_id, "model")]
        if known and (revision or "master") not in known:
            return HubError(
                f"{name}: the model has no revision {revision or 'master'!r}",
                hint="Give a branch, tag or commit of the model, or leave the revision out.",
            )
    return HubError(
        f"{name}: {found_here(name)}, and not found on ModelScope: it is misspelt, or the model is private",
        hint=f"Check the name; for a private model set {TOKEN} to a token that may read it.",
    )


def modelscope_error(name: str, cause: Exception) -> HubError:
    """One clear error for whatever the client raised."""
    from modelscope_hub import APIError, FileDownloadError, FileIntegrityError

    if isinstance(cause, SilenceError):
        return modelscope_unreachable(name, cause)
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
            f"{name}: ModelScope refused the token", hint=f"Set {TOKEN} to a valid token, or unset it and log out."
        )
    if status == 403:
        return HubError(
            f"{name}: ModelScope answered 403: the model is private or gated, or the token may not read it",
            hint=f"Accept its terms on its page, then set {TOKEN} to a token of an account that may read it.",
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


def modelscope_malformed(name: str, cause: Exception) -> HubError:
    """The error for a setting that keeps the client from being imported."""
    return HubError(
        f"{name}: a setting of ModelScope's client is malformed: {first_line(cause)}",
        hint="Check MODELSCOPE_ENDPOINT and the other MODELSCOPE_… variables of the environment.",
    )
