"""Adapters (LoRA and its kin) in a model's folder or below, by the files of PEFT and mlx-lm; none is applied here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mlxqwen.errors import CheckpointError, MlxqwenError, UnsupportedFormatError, one_line
from mlxqwen.files.json_file import read_json_object

__all__ = [
    "adapter_alone",
    "adapter_files",
    "adapters_among",
    "adapters_below",
    "is_adapter_below",
    "refuse_adapter",
]

CONFIG = "adapter_config.json"
# `adapter_model.safetensors` of PEFT, `adapters.safetensors` and `0000100_adapters.safetensors` of mlx-lm, and others
# that are named so; files that begin as weights do are weights.
FILES = re.compile(
    r"(?!model|weights)[^/]*(adapter|lora)[^/]*\.(safetensors|bin|pt|npz)|adapter_config\.json", re.IGNORECASE
)
SHOWN = 3
MERGE = "Merge it into its base first, by PEFT's merge_and_unload or by mlx_lm.fuse"


def adapter_files(folder: Path) -> list[str]:
    """The names of an adapter's files in a folder, sorted."""
    try:
        return sorted(path.name for path in folder.iterdir() if FILES.fullmatch(path.name))
    except OSError:
        return []


def adapters_below(folder: Path) -> tuple[str, ...]:
    """A note on adapters in the folders within a folder, where trainers keep theirs; none if there are none."""
    try:
        below = [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return ()
    return adapters_among(f"{path.name}/{name}" for path in below for name in adapter_files(path))


def adapters_among(paths: Iterable[str]) -> tuple[str, ...]:
    """The note of `adapters_below`, of the paths of all files, relative to the model's folder."""
    by_folder = dict(sorted(path.split("/", 1) for path in paths if is_adapter_below(path)))
    names = [one_line(f"{folder}/{name}", 120) for folder, name in by_folder.items()]
    return (f"adapters in folders beside the weights are not applied: {some(names)}",) if names else ()


def is_adapter_below(path: str) -> bool:
    """Whether a path, relative to a model's folder, is that of an adapter's file in a folder within it."""
    folder, _, name = path.partition("/")
    return folder[:1] not in ("", ".") and len(path) < 256 and path.isprintable() and bool(FILES.fullmatch(name))


def refuse_adapter(folder: Path) -> None:
    """Raise `UnsupportedFormatError` for an adapter beside weights, which would be left out without a word."""
    files = adapter_files(folder)
    if files:
        raise UnsupportedFormatError(
            f"{folder}: found an adapter beside the weights ({some(files)}), which this version does not apply",
            hint=f"{MERGE}, or leave it out: --ignore-adapter (ignore_adapter=True).",
        )


def adapter_alone(folder: Path) -> UnsupportedFormatError | None:
    """The error for a folder that holds an adapter and no weights; None if it holds none."""
    files = adapter_files(folder)
    if not files:
        return None
    base = base_of(folder)
    return UnsupportedFormatError(
        f"{folder}: an adapter ({some(files)}) for {base or 'a base that it does not name'}, expected a whole model",
        hint=f"{MERGE}, and give the merged folder.",
    )


def base_of(folder: Path) -> str | None:
    """The model that an adapter's config says it is for, as PEFT or mlx-lm write it."""
    try:
        config = read_json_object(folder / CONFIG, error=CheckpointError)
    except MlxqwenError:
        return None
    base = config.get("base_model_name_or_path") or config.get("model")
    return one_line(base, 120) if isinstance(base, str) else None


def some(files: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(files[:SHOWN])
    return shown if len(files) <= SHOWN else f"{shown} and {len(files) - SHOWN} more"
