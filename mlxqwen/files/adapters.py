"""Adapters (LoRA and its kin) in a model's folder, by the files of PEFT and mlx-lm; this version applies none."""

from __future__ import annotations

import re
from pathlib import Path

from mlxqwen.errors import CheckpointError, MlxqwenError, UnsupportedFormatError, one_line
from mlxqwen.files.json_file import read_json_object

__all__ = ["adapter_alone", "adapter_files", "refuse_adapter"]

CONFIG = "adapter_config.json"
# `adapter_model.safetensors` of PEFT, `adapters.safetensors` and `0000100_adapters.safetensors` of mlx-lm, and others
# that are named so; files that begin as weights do are weights.
FILES = re.compile(r"(?!model|weights).*(adapter|lora).*\.(safetensors|bin|pt|npz)|adapter_config\.json", re.IGNORECASE)
SHOWN = 3
MERGE = "Merge it into its base first, by PEFT's merge_and_unload or by mlx_lm.fuse"


def adapter_files(folder: Path) -> list[str]:
    """The names of an adapter's files in a folder, sorted."""
    try:
        return sorted(path.name for path in folder.iterdir() if FILES.fullmatch(path.name))
    except OSError:
        return []


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
