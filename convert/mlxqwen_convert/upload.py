"""A finished conversion → the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from mlxqwen.errors import HubError, OptionError
from mlxqwen.files.hub import HUB_ID
from mlxqwen.files.hub_download import progress_on_terminal_only, quiet_warnings
from mlxqwen.files.hub_errors import hub_error

__all__ = ["check_repo_id", "require_token", "upload", "upload_command"]


def check_repo_id(repo_id: str) -> None:
    """Raise `OptionError` unless it is written organisation/model."""
    if not HUB_ID.fullmatch(repo_id):
        raise OptionError(f"upload_repo: found {repo_id!r}, expected organisation/model")


def require_token(repo_id: str) -> None:
    """Raise `HubError` before hours of work whose end could not be uploaded."""
    from huggingface_hub import get_token

    if not get_token():
        raise HubError(
            f"{repo_id}: cannot be uploaded to: found no token for the hub",
            hint="Set HF_TOKEN to a token that may write, or log in: hf auth login",
        )


def upload_command(folder: Path, repo_id: str) -> str:
    """What the user can type to do it later."""
    return f"hf upload {shlex.quote(repo_id)} {shlex.quote(str(folder))}"


def upload(folder: Path, repo_id: str) -> str:
    """Push a folder, making the model's repository if need be; the address of the commit.

    Raises:
        HubError: no token, or the hub cannot be reached or refuses. The folder is untouched either way.
    """
    from huggingface_hub import HfApi

    try:
        with quiet_warnings(), progress_on_terminal_only():
            api = HfApi()
            api.create_repo(repo_id, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Convert with mlxqwen")
    except Exception as cause:  # the hub's client lets errors of its HTTP and thread libraries through
        command = upload_command(folder, repo_id)
        reason = hub_error(repo_id, None, cause).problem.removeprefix(f"{repo_id}: ").replace("download", "upload")
        raise HubError(
            f"{repo_id}: not uploaded: {reason}",
            hint=f"The folder is whole. Set HF_TOKEN to a token that may write, then: {command}",
        ) from cause
    return str(commit.commit_url)
