"""Short names of models, as Ollama writes them, and the web addresses of their pages → ids of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

from mlxqwen.errors import HubError, MlxqwenError

__all__ = [
    "ALIASES",
    "DEFAULT_SIZE",
    "alias_of_tag",
    "hub_id_of_address",
    "hub_id_of_alias",
    "known_alias",
    "naming_alias",
]

_FAMILY = "qwen3"
DEFAULT_SIZE = "8b"
"""The size that `latest` means, as in Ollama."""

# What Qwen publishes of each of the eight releases beside BF16, FP8 and MLX's 4, 6 and 8 bits.
_FURTHER_FORMS = {
    "0.6B": ("GPTQ-Int8",),
    "1.7B": ("GPTQ-Int8",),
    "4B": ("AWQ",),
    "8B": ("AWQ",),
    "14B": ("AWQ",),
    "32B": ("AWQ",),
    "30B-A3B": ("GPTQ-Int4",),
    "235B-A22B": ("GPTQ-Int4",),
}
_MLX_BITS = ("4bit", "6bit", "8bit")
# How others spell forms: Ollama's tags, and the full names of Qwen's.
_SPELLINGS = {
    "q4_k_m": "4bit",
    "q8_0": "8bit",
    "fp16": "bf16",
    **{f"mlx-{bits}": bits for bits in _MLX_BITS},
}
_PAGES = ("huggingface.co", "www.huggingface.co", "hf.co")
_NO_MODELS = ("datasets", "spaces", "docs", "collections", "papers", "blog", "models", "posts")


def _table() -> dict[str, str]:
    table: dict[str, str] = {}
    for release, further in _FURTHER_FORMS.items():
        size, whole = release.lower(), f"Qwen/Qwen3-{release}"
        table[f"{_FAMILY}:{size}"] = f"{whole}-MLX-4bit"
        table |= {f"{_FAMILY}:{size}-{bits}": f"{whole}-MLX-{bits}" for bits in _MLX_BITS}
        table |= {f"{_FAMILY}:{size}-{form.lower()}": f"{whole}-{form}" for form in ("FP8", *further)}
        table[f"{_FAMILY}:{size}-bf16"] = whole
    return table


ALIASES: Mapping[str, str] = MappingProxyType(_table())
"""Aliases → ids of the hub. A size alone is MLX's 4 bits, the form that fits most machines and runs as it is."""


def hub_id_of_alias(name: str) -> str | None:
    """The id that an alias such as `qwen3:4b` or `qwen3:30b-a3b-fp8` stands for; None for what looks like no alias.

    Capitals do not matter, `30b` and `235b` do without the active parameters, and Ollama's `-q4_K_M`, `-q8_0` and
    `-fp16` are its 4 bits, its 8 bits and BF16.

    Raises:
        HubError: an alias of the family that does not exist.
    """
    family, colon, tag = name.strip().lower().partition(":")
    if family != _FAMILY or not colon:
        return None
    tag = DEFAULT_SIZE if tag == "latest" else tag
    size, form = _split(tag)
    found = ALIASES.get(f"{_FAMILY}:{size}{form}")
    if found is None:
        raise HubError(f"{name}: found no such alias, expected one of {_nearest(size)}", hint=_HINT)
    return found


def known_alias(name: str) -> str | None:
    """The id that an alias stands for; None for anything else, an alias that does not exist among it."""
    try:
        return hub_id_of_alias(name)
    except HubError:
        return None


def alias_of_tag(repo_id: str, tag: str) -> str | None:
    """The alias of a release of Qwen's in the form that a tag asks for, or of the release; None for another model.

    For example `qwen3:4b-4bit` for `Qwen/Qwen3-4B` and `4bit` or `q4_K_M`.
    """
    name = repo_id.rpartition("/")[2].lower()
    release = f"{_FAMILY}:{name.removeprefix(f'{_FAMILY}-')}"
    if release not in ALIASES:
        return None
    form = _SPELLINGS.get(tag.lower(), tag.lower())
    return alias if (alias := f"{release}-{form}") in ALIASES else release


@contextmanager
def naming_alias(typed: str | os.PathLike[str] | None) -> Iterator[None]:
    """Let errors about a model repeat the alias that it was named by: they know its id, or its folder in a cache.

    Args:
        typed: what the user named the model by; whatever is no alias changes no error.
    """
    try:
        yield
    except MlxqwenError as error:
        name = typed if isinstance(typed, str) and not os.path.isdir(typed) else ""
        repo_id = known_alias(name.rpartition("modelscope:")[2])
        said = error.problem
        if repo_id is None or name in said or not (repo_id in said or repo_id.replace("/", "--") in said):
            raise
        subject, colon, rest = said.partition(": ")
        is_itself = subject.removeprefix("modelscope:") == repo_id
        problem = f"{name} ({subject}){colon}{rest}" if is_itself else f"{name}: {said}"
        raise type(error)(problem, hint=error.hint) from error.__cause__


_HINT = "A hub id, such as Qwen/Qwen3-4B, or a folder is taken too."


def _split(tag: str) -> tuple[str, str]:
    """The size of a release and the rest, in the table's spelling."""
    sizes = sorted((release.lower() for release in _FURTHER_FORMS), key=len, reverse=True)
    short = {size.partition("-")[0]: size for size in sizes if "-a" in size}
    for begun, size in {**{size: size for size in sizes}, **short}.items():
        if tag == begun or tag.startswith(f"{begun}-"):
            form = tag.removeprefix(begun).removeprefix("-")
            form = _SPELLINGS.get(form, form)
            return size, f"-{form}" if form else ""
    return tag, ""


def _nearest(size: str) -> str:
    """The forms of a size that exists, else all sizes."""
    forms = [alias for alias in ALIASES if alias == f"{_FAMILY}:{size}" or alias.startswith(f"{_FAMILY}:{size}-")]
    return ", ".join(forms or [f"{_FAMILY}:{release.lower()}" for release in _FURTHER_FORMS])


def hub_id_of_address(address: str) -> tuple[str, str | None] | None:
    """The id and the revision, if it names one, in the web address of a model's page; None for other addresses.

    Pages are those of huggingface.co, hf.co and of the hub in HF_ENDPOINT.
    """
    try:
        parts = urlsplit(address.strip())
        own = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or parts.netloc.lower() not in (*_PAGES, own.lower() or _PAGES[0]):
        return None
    names = [unquote(name) for name in parts.path.split("/") if name]
    if len(names) < 2 or names[0] in _NO_MODELS or not all(re.fullmatch(r"[\w.-]+", name) for name in names[:2]):
        return None
    revision = None
    if len(names) > 3 and names[2] in ("tree", "blob", "resolve", "commit"):
        revision = "/".join(names[3:6]) if names[3] == "refs" else names[3]  # such as refs/pr/1
    return f"{names[0]}/{names[1]}", revision
