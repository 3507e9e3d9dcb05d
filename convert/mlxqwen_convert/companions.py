"""The files beside the weights: config, tokenizer, template, licence. Data only, never code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxqwen.files.atomic import write_file
from mlxqwen.files.config import ModelConfig, YarnScaling
from mlxqwen_convert.companion_files import check_companion, companion_files, filtered_text, is_filtered, without_code
from mlxqwen_convert.errors import SourceUnreadableError
from mlxqwen_convert.plan import DTYPES, Plan
from mlxqwen_convert.target_files import unwritable

__all__ = ["companion_files", "config_text", "copy_companions"]

_CHUNK_BYTES = 1 << 20
# Keys of a config that describe the source's weights.
_DROPPED = ("quantization", "quantization_config", "compression_config", "_name_or_path")
# What `config.py` lets `mscale_all_dim` be at most.
_MOST_MSCALE = 100.0


def copy_companions(source: Path, target: Path) -> None:
    """Copy them, whole and onto the disk; links are followed as far as `check_companion` lets them.

    Raises:
        SourceError: one is not what it may be; `SourceUnreadableError`: it cannot be read.
        OutputError: one cannot be written.
    """
    for relative in companion_files(source):
        check_companion(source, relative)
        path = source / relative
        chunks = iter([filtered_text(path).encode()]) if is_filtered(relative) else _chunks(path)
        place = target / relative
        try:
            place.parent.mkdir(exist_ok=True)
            write_file(place, chunks)
        except OSError as cause:
            raise unwritable(place, cause) from None


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                yield data
    except OSError as cause:
        raise SourceUnreadableError(f"{path}: cannot be read: {cause.strerror}", hint="Check the file.") from None


def config_text(plan: Plan) -> str:
    """`config.json` of the output: the source's, with its own quantization and dtype.

    The source may be in the spelling of transformers 5, or leave out what has a default there. Other loaders know
    neither, so that everything they read is added in the spelling that Qwen publishes.
    """
    config: dict[str, Any] = {key: value for key, value in plan.raw_config.items() if key not in _DROPPED}
    config = without_code(config)
    for key, value in _published_keys(plan.config).items():
        if key not in config or config[key] != value:
            config[key] = value
    dtype = next(name for name, short in DTYPES.items() if short == plan.dtype)
    config |= dict.fromkeys({"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}, dtype)
    section = plan.quantization()
    if section is not None:
        config["quantization"] = section
        config["quantization_config"] = section
    return json.dumps(dict(sorted(config.items())), indent=4, ensure_ascii=False) + "\n"


def _published_keys(config: ModelConfig) -> dict[str, Any]:
    """All that mlx-lm, LM Studio and mlx-swift read of a Qwen3 model's shape, as Qwen spells it."""
    keys: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.moe is not None:
        keys |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "moe_intermediate_size": config.moe.moe_intermediate_size,
            "norm_topk_prob": config.moe.norm_topk_prob,
            "decoder_sparse_step": config.moe.decoder_sparse_step,
            "mlp_only_layers": list(config.moe.mlp_only_layers),
        }
    return keys


def _rope_scaling(yarn: YarnScaling) -> dict[str, Any]:
    """YaRN with everything said: defaults differ from loader to loader."""
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if not yarn.truncate:
        scaling["truncate"] = False
    growth = 0.1 * math.log(yarn.factor)
    if growth and not math.isclose(yarn.attention_factor, growth + 1.0):
        # mlx-lm knows the attention factor only as (growth · mscale + 1) / (growth · mscale_all_dim + 1).
        above = yarn.attention_factor >= 1.0
        mscale = (yarn.attention_factor if above else 1 / yarn.attention_factor) / growth - 1 / growth
        if mscale <= _MOST_MSCALE:
            scaling |= {"mscale": mscale if above else 0.0, "mscale_all_dim": 0.0 if above else mscale}
    return scaling
