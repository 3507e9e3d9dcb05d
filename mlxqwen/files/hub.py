"""A model's name → a folder on disk: nothing (the demo), a folder, or a model of the Hugging Face hub or ModelScope."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from mlxqwen.errors import HubError, OptionError
from mlxqwen.files.adapters import adapter_alone
from mlxqwen.files.aliases import hub_id_of_address, hub_id_of_alias
from mlxqwen.files.hub_settings import can_be_imported, faulty_setting, token_source

__all__ = ["DEMO_FOLDER", "MODELSCOPE_PREFIX", "resolve_model"]

MODELSCOPE_PREFIX = "modelscope:"
"""Before an id, names a model of ModelScope."""
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
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
GGUF_SUFFIXES = (".gguf", ".ggml")
NO_GGUF_HINT = "Take the model's release in safetensors, such as Qwen/Qwen3-0.6B, or qwen3:0.6b for short."
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")
USE_MODELSCOPE = "MLXQWEN_USE_MODELSCOPE"  # makes ModelScope the hub of ids without a prefix
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
INTERRUPTIONS = {
    *("NetworkError", "TimeoutException", "RemoteProtocolError"),  # httpx
    *("ConnectionError", "Timeout", "ChunkedEncodingError", "IncompleteRead", "ProtocolError"),  # requests, urllib3
    "FileDownloadError",  # modelscope_hub, of files that broke off
}
REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)


def resolve_model(path_or_id: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """The folder of a model, downloaded if need be.

    Args:
        path_or_id: None for the demo model that comes with the package; an existing folder; a hub id such as
            `Qwen/Qwen3-0.6B`; an alias such as `qwen3:0.6b`; or the web address of a model's page on the hub. Only
            weights, configuration, tokenizer, chat templates, card and licence are downloaded, never code. The
            environment variables HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured; without the hub a
            complete earlier download is used. `modelscope:Qwen/Qwen3-0.6B` is a model of ModelScope, as are ids and
            aliases without that prefix where MLXQWEN_USE_MODELSCOPE is true.
        revision: a branch, tag or commit of the hub's model.

    Raises:
        HubError: no such folder, or the model cannot be found or downloaded.
        OptionError: a revision that is malformed, or given for something that is not on the hub.
    """
    if path_or_id is None:
        refuse_revision(revision, "the demo model")
        return existing_folder(DEMO_FOLDER, hint="The package is incomplete: install it again.")
    name = os.fspath(path_or_id)
    folder = expanded(name)
    if name and os.path.isdir(folder):
        refuse_revision(revision, f"the folder {name}")
        refuse_unfinished(folder)
        refuse_gguf(folder)
        return folder
    is_prefixed = name.startswith(MODELSCOPE_PREFIX)
    repo_id, is_page = name.removeprefix(MODELSCOPE_PREFIX), False
    if (alias := hub_id_of_alias(repo_id)) is not None and not isinstance(path_or_id, Path):
        repo_id = alias
    elif name.startswith(("http://", "https://")):
        (repo_id, revision), is_page = hub_id_in_address(name, revision), True
    if looks_like_path(repo_id) or isinstance(path_or_id, Path) or os.path.isfile(folder):
        return existing_folder(folder, hint="Give the folder that holds config.json and the weights.")
    if not HUB_ID.fullmatch(repo_id):
        raise HubError(
            f"{name!r}: neither an existing folder nor a hub id, which is written organisation/model",
            hint="Give a folder, such as ./my-model, or a hub id, such as Qwen/Qwen3-0.6B, or qwen3:0.6b for short.",
        )
    if revision is not None and not REVISION.fullmatch(revision):
        raise OptionError(f"revision: found {revision!r}", hint="Expected a branch, a tag or a commit's hash.")
    if is_page or not (is_prefixed or is_true(USE_MODELSCOPE)):
        return downloaded(repo_id, revision)
    from mlxqwen.files.modelscope import downloaded_from_modelscope  # of no use to most loads

    return downloaded_from_modelscope(f"{MODELSCOPE_PREFIX * is_prefixed}{repo_id}", repo_id, revision)


def is_true(variable: str) -> bool:
    """Whether an environment variable is set to true. Raises `OptionError` for what is neither true nor false."""
    value = os.environ.get(variable, "").strip().lower()
    if value not in (*TRUE, *FALSE):
        raise OptionError(f"{variable}: found {value[:40]!r}, expected true or false")
    return value in TRUE


def hub_id_in_address(address: str, revision: str | None) -> tuple[str, str | None]:
    """The id and revision that the address of a model's page means. Raises `HubError`, `OptionError`."""
    found = hub_id_of_address(address)
    if found is None:
        raise HubError(
            f"{URL_CREDENTIALS.sub('', address)}: a web address that is no model's page on the hub, expected a folder "
            "or a hub id",
            hint="A hub id is written organisation/model, such as Qwen/Qwen3-0.6B.",
        )
    name, of_page = found
    if None not in (revision, of_page) and revision != of_page:
        raise OptionError(
            f"revision: found {revision!r}, but {of_page!r} in the address {address}", hint="Leave one of them out."
        )
    return name, of_page if revision is None else revision


def refuse_unfinished(folder: Path) -> None:
    """Raise `HubError`, with the command that goes on with it, if the folder is an unfinished conversion."""
    if not folder.name.endswith(".partial"):
        return
    from mlxqwen.files.unfinished import command_to_finish, is_unfinished  # of no use to most loads

    if is_unfinished(folder):
        raise HubError(
            f"{folder}: an unfinished conversion, expected a model's folder",
            hint=f"Finish it: {command_to_finish(folder)}",
        )


def refuse_gguf(folder: Path) -> None:
    """Raise `HubError` for a folder of GGUF files, which has no config."""
    if (folder / "config.json").exists():
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in GGUF_SUFFIXES)
    if found:
        raise HubError(
            f"{folder}: found GGUF files ({', '.join(found[:3])}), which are not read, expected config.json and "
            "safetensors weights",
            hint=NO_GGUF_HINT,
        )


def refuse_revision(revision: str | None, what: str) -> None:
    """Raise `OptionError` if a revision is given for `what`, which has none."""
    if revision is not None:
        raise OptionError(
            f"revision: found {revision!r} for {what}",
            hint="Only a model of the hub has revisions: leave it out.",
        )


def expanded(name: str) -> Path:
    """The path with `~` replaced by the user's home, if there is one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # a user that does not exist
        return Path(name)


def looks_like_path(name: str) -> bool:
    """Whether a name is a path rather than an id of the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def existing_folder(folder: Path, *, hint: str) -> Path:
    """The folder. Raises `HubError` if it is a file or does not exist."""
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder) and folder.suffix.lower() in GGUF_SUFFIXES:
        raise HubError(f"{folder}: a GGUF file, which is not read, expected a model's folder", hint=NO_GGUF_HINT)
    if os.path.isfile(folder):
        raise HubError(f"{folder}: a file, expected a model's folder", hint=f"Give {folder.parent} instead.")
    raise HubError(f"{folder}: no such folder", hint=hint)


def downloaded(repo_id: str, revision: str | None) -> Path:
    """The folder of a model of the hub, downloaded if it is not there. Raises `HubError`."""
    if not can_be_imported() and (fault := wrong_setting(repo_id)):
        raise fault
    try:
        import_module("huggingface_hub.constants")  # reads the environment
        from huggingface_hub import snapshot_download
    except ValueError as cause:
        raise wrong_setting(repo_id) or HubError(
            f"{repo_id}: a setting of the hub's client is malformed: {first_line(cause)}",
            hint=f"Correct {', '.join(hub_variables(str(cause)))}, or unset it.",
        ) from cause

    try:
        with quiet_warnings(), progress_on_terminal_only():
            folder = snapshot_download(
                repo_id, revision=revision, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES
            )
    except Exception as cause:  # the hub's client lets errors of its HTTP and thread libraries through
        raise hub_error(repo_id, revision, cause) from cause
    check_model(repo_id, Path(folder))
    return Path(folder)


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


def hub_error(repo_id: str, revision: str | None, cause: Exception) -> HubError:
    """One clear error for whatever the hub's client raised."""
    from huggingface_hub import errors

    if isinstance(cause, errors.LocalEntryNotFoundError):
        if fault := wrong_setting(repo_id):
            return fault
        if not isinstance(cause.__cause__, errors.HfHubHTTPError):
            return unreachable(repo_id, cause)
        cause = cause.__cause__
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
