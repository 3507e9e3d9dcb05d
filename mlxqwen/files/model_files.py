"""`config.json`, and what other tools say of a quantization in files of their own beside it.

Whether weights are quantized, their files decide: where all are plain floats, what is said of a quantization is left
aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mlxqwen.errors import ConfigError, MlxqwenError, one_line
from mlxqwen.files.adapters import adapter_alone
from mlxqwen.files.checkpoint import INDEX_NAME, Checkpoint
from mlxqwen.files.json_file import read_json_object
from mlxqwen.files.tensor_names import ROOTS, is_scale_of_activations

__all__ = ["QUANTIZATION_FILES", "ConfigFile", "read_config_file", "without_quantization"]

QUANTIZATION_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
)
"""Of AutoGPTQ, AutoAWQ, NVIDIA ModelOpt and auto-round, where `config.json` may say nothing."""

_SECTIONS = ("quantization", "quantization_config", "compression_config")
_FLOATS = ("BF16", "F16", "F32")


class ConfigFile(NamedTuple):
    """What a folder's files say of its model.

    Args:
        values: the parsed `config.json`, with no more of a quantization than counts.
        notes: a line for what was left aside.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]


def read_config_file(folder: Path) -> ConfigFile:
    """The `config.json` of a folder; where it has no `quantization_config`, with the one of the files beside it.

    What they say of a quantization counts only where weights are quantized.

    Raises:
        ConfigError: a file that is not a JSON object, or that cannot be read.
        UnsupportedFormatError: there is an adapter and no `config.json`.
    """
    path = folder / "config.json"
    if not path.exists() and (adapter := adapter_alone(folder)):
        raise adapter
    config = read_json_object(path, error=ConfigError)
    said = {section: config[section] for section in _SECTIONS if config.get(section)}
    if said:
        dtypes = _dtypes_of_floats(folder, config)
        if dtypes is None:
            return ConfigFile(config, ())
        return ConfigFile(without_quantization(config), (_note("config.json", said, dtypes),))
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            section = _section(name, read_json_object(folder / name, error=ConfigError))
            if not section:
                continue
            said, dtypes = {"quantization_config": section}, _dtypes_of_floats(folder, config)
            if dtypes is None:
                return ConfigFile({**config, **said}, ())
            return ConfigFile(config, (_note(name, said, dtypes),))
    return ConfigFile(config, ())


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of all else than a quantization."""
    return {key: value for key, value in config.items() if key not in _SECTIONS}


def _section(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, in the form of `quantization_config`; empty if nothing."""
    if name == "hf_quant_config.json":
        nested = found.get("quantization")
        return {"quant_method": "modelopt", **(nested if isinstance(nested, Mapping) else found)}
    if "w_bit" in found:
        renamed = {"bits": "w_bit", "group_size": "q_group_size", "version": "version", "zero_point": "zero_point"}
        return {"quant_method": "awq", **{key: found[old] for key, old in renamed.items() if old in found}}
    return {"quant_method": "gptq", **found} if "bits" in found else {}


def _note(file: str, said: Mapping[str, Any], dtypes: tuple[str, ...]) -> str:
    """The line for a quantization that a file speaks of and the weights do not have."""
    section = said.get("quantization_config") or next(iter(said.values()))
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    form = f" ({one_line(method, 40)})" if isinstance(method, str) else " (MLX)" if "quantization" in said else ""
    return f"{file} says that the weights are quantized{form}, none is: read as stored, in {' and '.join(dtypes)}"


def _dtypes_of_floats(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The dtypes of the model's weights, the commonest first, where all are plain floats.

    None where any is stored in codes or has scales, and where the weights are not here or damaged.
    """
    try:
        files = sorted({*folder.glob("*.safetensors"), *folder.glob(INDEX_NAME)})
        states = [path.stat() for path in files]
    except OSError:
        return None
    state = tuple((str(path), found.st_size, found.st_mtime_ns) for path, found in zip(files, states, strict=True))
    roots = tuple(root for root in ROOTS if root != "lm_head." or config.get("tie_word_embeddings") is not True)
    return _dtypes_in(folder, roots, state)


@lru_cache(maxsize=16)  # a model's config is read several times while it is loaded
def _dtypes_in(folder: Path, roots: tuple[str, ...], state: tuple[tuple[str, int, int], ...]) -> tuple[str, ...] | None:
    """See `_dtypes_of_floats`, of the tensors under `roots`; `state` tells one state of the files from another."""
    try:
        tensors = Checkpoint.open(folder).tensors
    except MlxqwenError:
        return None
    sizes = dict.fromkeys(_FLOATS, 0)
    for name, info in tensors.items():
        if not name.startswith(roots):
            continue
        word = name.rpartition(".")[2]
        is_of_codes = word in ("biases", "qzeros") or ("scale" in word and not is_scale_of_activations(name))
        if info.dtype not in sizes or is_of_codes:
            return None
        sizes[info.dtype] += info.nbytes
    return tuple(sorted((dtype for dtype in sizes if sizes[dtype]), key=lambda dtype: -sizes[dtype]))
