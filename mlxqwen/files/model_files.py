"""`config.json`, and what other tools say of a quantization in files of their own beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxqwen.errors import ConfigError
from mlxqwen.files.adapters import adapter_alone
from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen.files.json_file import read_json_object

__all__ = ["QUANTIZATION_FILES", "read_config_file"]

QUANTIZATION_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
)
"""Of AutoGPTQ, AutoAWQ, NVIDIA ModelOpt and auto-round, where `config.json` may say nothing."""

_SECTIONS = ("quantization", "quantization_config", "compression_config")
_FLOATS = ("BF16", "F16", "F32")


def read_config_file(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder; where it has no `quantization_config`, with the one of the files beside it.

    Such a file counts only where weights are quantized: one can be left over from them.

    Raises:
        ConfigError: a file that is not a JSON object, or that cannot be read.
        UnsupportedFormatError: there is an adapter and no `config.json`.
        CheckpointError: the weights that a file beside it speaks of are damaged.
    """
    path = folder / "config.json"
    if not path.exists() and (adapter := adapter_alone(folder)):
        raise adapter
    config = read_json_object(path, error=ConfigError)
    if any(config.get(section) for section in _SECTIONS):
        return config
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            section = _section(name, read_json_object(folder / name, error=ConfigError))
            if section and _holds_codes(folder):
                return {**config, "quantization_config": section}
    return config


def _section(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, in the form of `quantization_config`; empty if nothing."""
    if name == "hf_quant_config.json":
        nested = found.get("quantization")
        return {"quant_method": "modelopt", **(nested if isinstance(nested, Mapping) else found)}
    if "w_bit" in found:
        renamed = {"bits": "w_bit", "group_size": "q_group_size", "version": "version", "zero_point": "zero_point"}
        return {"quant_method": "awq", **{key: found[old] for key, old in renamed.items() if old in found}}
    return {"quant_method": "gptq", **found} if "bits" in found else {}


def _holds_codes(folder: Path) -> bool:
    """Whether a tensor is stored as anything but plain floats."""
    return any(info.dtype not in _FLOATS for info in Checkpoint.open(folder).tensors.values())
