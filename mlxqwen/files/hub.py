"""A model's name → a folder on disk: nothing (the demo), a folder, or a model of the Hugging Face hub or ModelScope."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlxqwen.errors import HubError, OptionError, one_line
from mlxqwen.files.aliases import DEFAULT_SIZE, alias_of_tag, hub_id_of_address, hub_id_of_alias, naming_alias

if TYPE_CHECKING:
    from mlxqwen.files.hub_source import HubModel, Source

__all__ = [
    "DEMO_FOLDER",
    "GGUF_SUFFIXES",
    "MODELSCOPE_PREFIX",
    "cached_folder",
    "gguf_error",
    "looked_at",
    "resolve_model",
]

MODELSCOPE_PREFIX = "modelscope:"
"""Before an id, names a model of ModelScope."""
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
GGUF_SUFFIXES = (".gguf", ".ggml")
NO_GGUF_HINT = "Take the model's release in safetensors, such as Qwen/Qwen3-0.6B, or qwen3:0.6b for short."
_FOLDER_HINT = (
    "Give the folder that holds config.json and the weights, or a hub id, such as Qwen/Qwen3-0.6B, or "
    "qwen3:0.6b for short."
)
_NAME_HINT = "Give a folder, such as ./my-model, or a hub id, such as Qwen/Qwen3-0.6B, or qwen3:0.6b for short."
_HUB_HINT = (
    "Give an alias, such as qwen3:0.6b, or a hub id, such as Qwen/Qwen3-0.6B. mlxqwen list --aliases tells all "
    "aliases, mlxqwen list what is downloaded."
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/(?!\.{1,2}\Z)[\w.-]+", re.ASCII)  # "." and ".." are folders
USE_MODELSCOPE = "MLXQWEN_USE_MODELSCOPE"  # makes ModelScope the hub of ids without a prefix
_ADDRESSES = ("http://", "https://", "hf.co/", "huggingface.co/")  # of pages, also without their scheme
REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)


def resolve_model(
    path_or_id: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """The folder of a model, downloaded if need be.

    Args:
        path_or_id: None for the demo model that comes with the package; an existing folder; a hub id such as
            `Qwen/Qwen3-0.6B`; an alias such as `qwen3:0.6b`; or the web address of a model's page on the hub. Only
            weights, configuration, tokenizer, chat templates, card and licence are downloaded, never code. The
            environment variables HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured; without the hub a
            complete earlier download is used. `modelscope:Qwen/Qwen3-0.6B` is a model of ModelScope, as are ids and
            aliases without that prefix where MLXQWEN_USE_MODELSCOPE is true.
        revision: a branch, tag or commit of the hub's model.
        check: called before weights are downloaded, with a folder that can be read as the model's up to its weights:
            see `mlxqwen.files.preview`. What it raises is raised.

    Raises:
        HubError: no such folder, or the model cannot be found or downloaded.
        OptionError: a revision that is malformed, or given for something that is not on the hub; what is no name.
    """
    place = located(path_or_id, revision)
    if isinstance(place, Path):
        return place
    from mlxqwen.files.hub_source import downloaded  # of no use to folders

    with naming_alias(path_or_id):
        return downloaded(source_of(place), check)


@contextmanager
def looked_at(path_or_id: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Iterator[Path]:
    """The folder of a model, for those who read no weights: these are not downloaded.

    The arguments and errors are those of `resolve_model`. A folder that is made for this is gone in the end.
    """
    place = located(path_or_id, revision)
    if isinstance(place, Path):
        yield place
        return
    from mlxqwen.files.hub_source import seen

    with naming_alias(path_or_id), seen(source_of(place)) as folder:
        yield folder


def located(
    path_or_id: str | os.PathLike[str] | None, revision: str | None, *, hub_alone: bool = False
) -> Path | HubModel:
    """The folder that a name means, or the model of a hub.

    Args:
        path_or_id, revision: see `resolve_model`.
        hub_alone: whether models of hubs alone are of use, which errors then ask for.

    Raises:
        HubError, OptionError: see `resolve_model`.
    """
    if path_or_id is None:
        refuse_revision(revision, "the demo model")
        if not DEMO_FOLDER.is_dir():
            raise HubError(f"{DEMO_FOLDER}: no such folder", hint="The package is incomplete: install it again.")
        return DEMO_FOLDER
    if not isinstance(path_or_id, str | os.PathLike):
        raise OptionError(
            f"model: found {type(path_or_id).__name__}, expected a folder, a hub id or an alias",
            hint="For example ./my-model, Qwen/Qwen3-0.6B, or qwen3:0.6b.",
        )
    name = os.fspath(path_or_id)
    folder = expanded(name)
    if name and os.path.isdir(folder):
        refuse_revision(revision, f"the folder {name}")
        refuse_unfinished(folder)
        refuse_gguf(folder)
        return folder
    is_prefixed = name.startswith(MODELSCOPE_PREFIX)
    repo_id, is_page = name.removeprefix(MODELSCOPE_PREFIX), False
    try:
        alias = hub_id_of_alias(repo_id)
    except HubError as error:
        raise HubError(error.problem, hint=_HUB_HINT if hub_alone else error.hint) from None
    if alias is not None and not isinstance(path_or_id, Path):
        repo_id = alias
    elif name.startswith(_ADDRESSES):
        address = name if "://" in name else f"https://{name}"
        (repo_id, revision), is_page = hub_id_in_address(address, revision), True
    if looks_like_path(repo_id) or isinstance(path_or_id, Path) or os.path.isfile(folder):
        return existing_folder(folder, name, hub_alone=hub_alone)
    if not HUB_ID.fullmatch(repo_id):
        refuse_tag(name, repo_id)
        way_out = _HUB_HINT if hub_alone else _NAME_HINT
        if alias := alias_of_tag(*repo_id.partition(":")[::2]):
            way_out = f"Did you mean {alias}? {way_out}"
        if repo_id.lower() == "qwen3":
            way_out = (
                f"Say which size: qwen3:{DEFAULT_SIZE} is Ollama's; mlxqwen list --aliases tells all, and which fit."
            )
        if repo_id.lower() == "demo":
            is_where = f"The demo model runs where no model is named; its folder is {DEMO_FOLDER}."
            way_out = "The demo model comes with the package, and stays with it." if hub_alone else is_where
        problem = "neither an alias nor a hub id" if hub_alone else "neither an existing folder nor a hub id"
        raise HubError(f"{name!r}: {problem}, which is written organisation/model", hint=way_out)
    if revision is not None and not REVISION.fullmatch(revision):
        raise OptionError(f"revision: found {revision!r}", hint="Expected a branch, a tag or a commit's hash.")
    from mlxqwen.files.hub_settings import is_true
    from mlxqwen.files.hub_source import HubModel

    is_on_modelscope = not is_page and (is_prefixed or is_true(USE_MODELSCOPE))
    return HubModel(repo_id, revision, f"{MODELSCOPE_PREFIX * is_prefixed}{repo_id}", is_on_modelscope)


def refuse_tag(name: str, repo_id: str) -> None:
    """Raise `HubError` for a hub id with a tag behind it, as Ollama and llama.cpp write them.

    Args:
        name: what the user gave.
        repo_id: that without a hub's prefix.
    """
    untagged, colon, tag = repo_id.partition(":")
    if not colon or not HUB_ID.fullmatch(untagged):
        return
    plain = f"{name.removesuffix(repo_id)}{untagged}"
    bits = re.search(r"\d", tag)
    converted = f"mlxqwen convert {plain} --bits {bits[0]}" if bits and bits[0] in "234568" else "mlxqwen convert"
    alias = alias_of_tag(untagged, tag)
    meant = "" if alias is None else f"Did you mean {name.removesuffix(repo_id)}{alias}? "
    raise HubError(
        f"{name!r}: found the tag {tag!r} behind a hub id, expected {plain}",
        hint=f"{meant}The hub's models have no tags; another quantization is a model of its own, or made by: "
        f"{converted}",
    )


def cached_folder(place: HubModel) -> tuple[Path | None, bool]:
    """The folder of an earlier download, whether all files are there, as far as can be told without asking the hub.

    Returns:
        the folder, None if there is no config in it; whether it is whole.

    Raises:
        HubError: the hub's client cannot be used.
    """
    from mlxqwen.files.modelscope import is_complete  # of no use to most loads

    folder = source_of(place).cached()
    if folder is None or not (folder / "config.json").is_file():
        return None, False
    return folder, is_complete(folder) and (folder / "tokenizer.json").is_file()


def source_of(place: HubModel) -> Source:
    """The hub's client for a model."""
    if place.is_on_modelscope:
        from mlxqwen.files.modelscope import ModelScope  # of no use to most loads

        return ModelScope(place)
    from mlxqwen.files.hub_download import HuggingFace

    return HuggingFace(place)


def hub_id_in_address(address: str, revision: str | None) -> tuple[str, str | None]:
    """The id and revision that the address of a model's page means. Raises `HubError`, `OptionError`."""
    found = hub_id_of_address(address)
    if found is None:
        from mlxqwen.files.hub_errors import URL_CREDENTIALS

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
        raise gguf_error(str(folder), found)


def gguf_error(name: str, files: Sequence[str]) -> HubError:
    """The error for a model that is GGUF files."""
    shown = ", ".join(one_line(file, 80) for file in files[:3])
    return HubError(
        f"{name}: found GGUF files ({shown}), which are not read, expected config.json and safetensors weights",
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


def existing_folder(folder: Path, typed: str, *, hub_alone: bool = False) -> Path:
    """The folder that was typed as a path. Raises `HubError` if it is a file or does not exist."""
    way_out = _HUB_HINT if hub_alone else _FOLDER_HINT
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder) and folder.suffix.lower() in GGUF_SUFFIXES:
        raise HubError(f"{folder}: a GGUF file, which is not read, expected a model's folder", hint=NO_GGUF_HINT)
    if os.path.isfile(folder):
        is_of_a_model = os.path.isfile(folder.parent / "config.json")
        hint = f"Give {folder.parent} instead." if is_of_a_model and not hub_alone else way_out
        raise HubError(f"{folder}: a file, expected a model's folder", hint=hint)
    raise HubError(
        f"{typed}: no such folder; it is a path, and no hub id, which is written organisation/model", hint=way_out
    )
