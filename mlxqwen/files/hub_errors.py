"""What the hub's client raises → one clear error: what happened, and the way out."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from mlxqwen.errors import HubError
from mlxqwen.files.hub_settings import faulty_setting, token_source

__all__ = [
    "URL_CREDENTIALS",
    "first_line",
    "found_here",
    "hub_error",
    "hub_variables",
    "is_interruption",
    "is_timeout",
    "unreachable",
    "wrong_setting",
]

URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")
INTERRUPTIONS = {
    *("NetworkError", "TimeoutException", "RemoteProtocolError"),  # httpx
    *("ConnectionError", "Timeout", "ChunkedEncodingError", "IncompleteRead", "ProtocolError"),  # requests, urllib3
    "FileDownloadError",  # modelscope_hub, of files that broke off
}


def hub_error(repo_id: str, revision: str | None, cause: Exception) -> HubError:
    """One clear error for whatever the hub's client raised."""
    from huggingface_hub import constants, errors

    from mlxqwen.files.transfer import SilenceError

    if isinstance(cause, errors.LocalEntryNotFoundError):
        if fault := wrong_setting(repo_id):
            return fault
        if not isinstance(cause.__cause__, errors.HfHubHTTPError):
            return unreachable(repo_id, cause)
        cause = cause.__cause__
    if isinstance(cause, SilenceError):
        return unreachable(repo_id, cause)
    if is_timeout(cause):
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        silence = TimeoutError(f"no answer in {seconds} seconds (HF_HUB_DOWNLOAD_TIMEOUT sets them)")
        return unreachable(repo_id, silence)
    if isinstance(cause, errors.HFValidationError):
        return HubError(f"{repo_id}: not a hub id: {first_line(cause)}", hint="Expected organisation/model.")
    if isinstance(cause, errors.GatedRepoError):
        return HubError(
            f"{repo_id}: the model is gated",
            hint="Accept its terms on its page, then set HF_TOKEN to a token of your account.",
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return HubError(
            f"{repo_id}: {found_here(repo_id)}, and not found on the hub: it is misspelt, or the model is private",
            hint="Check the name; for a private model set HF_TOKEN to a token that may read it.",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return HubError(
            f"{repo_id}: the model has no revision {revision or 'main'!r}",
            hint="Give a branch, tag or commit of the model, or leave the revision out.",
        )
    if isinstance(cause, errors.HfHubHTTPError) and (answer := answered(repo_id, cause.response.status_code)):
        return answer
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return HubError(
            f"{repo_id}: the disk is full",
            hint="Free some space or point HF_HOME to a larger disk; files already complete are kept.",
        )
    return wrong_setting(repo_id) or failed(repo_id, cause)


def wrong_setting(repo_id: str) -> HubError | None:
    """The error for a setting of the hub's client that cannot work; None if all may."""
    fault = faulty_setting()
    return None if fault is None else HubError(f"{repo_id}: {fault[0]}", hint=fault[1])


def failed(repo_id: str, cause: Exception) -> HubError:
    """The error for a download that broke off, or cannot be done."""
    from huggingface_hub import errors

    problem = f"{repo_id}: the download failed: {type(cause).__name__}: {first_line(cause)}"
    if is_interruption(cause):
        return HubError(problem, hint="Run it again: files already complete are kept.")
    if isinstance(cause, errors.HfHubHTTPError):
        endpoint = "HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else "the network's proxy"
        return HubError(problem, hint=f"This is no answer of a hub that has the model: check {endpoint}.")
    if isinstance(cause, OSError) and cause.filename is not None:
        return HubError(
            f"{repo_id}: the download failed: {cause.filename}: {cause.strerror}",
            hint="Point HF_HOME to a folder that can be written to.",
        )
    variables = ", ".join(hub_variables(str(cause)))
    return HubError(problem, hint=f"Check {variables} in the environment." if variables else "")


def is_interruption(cause: BaseException) -> bool:
    """Whether a connection broke, or what came disagrees with the size that the hub told."""
    if isinstance(cause, ConnectionError | TimeoutError):
        return True
    kinds = {kind.__name__ for kind in type(cause).__mro__}  # of whichever HTTP library the client uses
    return not kinds.isdisjoint(INTERRUPTIONS) or "consistency check failed" in str(cause).lower()


def is_timeout(cause: BaseException) -> bool:
    """Whether the HTTP library of the hub's client gave up waiting."""
    return "TimeoutException" in (kind.__name__ for kind in type(cause).__mro__)


def hub_variables(said: str) -> list[str]:
    """The variables of the hub's client whose value an error quotes; all that are set if it quotes none."""
    known = sorted(name for name in os.environ if name.startswith(("HF_", "HUGGING")))
    return [name for name in known if repr(os.environ[name]) in said] or known


def answered(repo_id: str, status: int) -> HubError | None:
    """What the hub means by an HTTP status; None for one that says nothing on its own."""
    if status == 401:
        source = token_source()
        if Path(source).is_absolute():
            way_out = f"Set HF_TOKEN to a valid token, or remove {source}."
        else:
            way_out = f"Set {source} to a valid token, or unset it."
        return HubError(f"{repo_id}: the hub refused the token", hint=way_out)
    if status == 403:
        return HubError(
            f"{repo_id}: the hub answered 403: the token may not read this model",
            hint="Set HF_TOKEN to a token of an account that may read it.",
        )
    if status == 429:
        return HubError(
            f"{repo_id}: the hub answered 429: too many requests",
            hint="Wait a few minutes and run it again, or set HF_TOKEN, which raises the limit.",
        )
    if status >= 500:
        return HubError(
            f"{repo_id}: the hub answered {status}",
            hint="Try again later: files already complete are kept.",
        )
    return None


def unreachable(repo_id: str, cause: Exception) -> HubError:
    """The error for a hub that does not answer: names the reason and the way out."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    from mlxqwen.files.unfinished import command_to_finish, is_unfinished

    reason = cause.__cause__ or cause
    if isinstance(reason, OfflineModeIsEnabled):
        why, way_out = "HF_HUB_OFFLINE forbids to download it", "Unset HF_HUB_OFFLINE, or give a folder."
    else:
        why = f"the hub cannot be reached: {first_line(reason)}"
        way_out = "Check the network and HF_ENDPOINT, or give a folder; files already complete are kept."
    partial = Path(f"{repo_id}.partial")
    return HubError(
        f"{repo_id}: {found_here(repo_id)}, it is not completely in the hub's cache, and {why}",
        hint=f"Finish it: {command_to_finish(partial)}" if is_unfinished(partial) else way_out,
    )


def found_here(name: str) -> str:
    """What the current folder has in place of a folder `name`, which may have been meant instead of a hub id."""
    from mlxqwen.files.unfinished import is_unfinished

    partial = Path(f"{name}.partial")
    return f"here is only {partial}, an unfinished conversion" if is_unfinished(partial) else "no such folder here"


def first_line(cause: BaseException) -> str:
    """Without the user's name and password for a hub, which HTTP libraries quote in its URL."""
    return URL_CREDENTIALS.sub("", str(cause).strip().split("\n", 1)[0])
