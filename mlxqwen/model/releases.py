"""The eight releases of Qwen3 and the forms that they are published in: what each takes, without asking the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlxqwen.files.config import ModelConfig
from mlxqwen.model.footprint import Footprint, parameter_counts

__all__ = ["RELEASES", "footprints_of_form", "footprints_of_release"]

_COMMON = {
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "torch_dtype": "bfloat16",
}
_EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _shape(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, *, tied: bool, expert: int = 0
) -> Mapping[str, Any]:
    return {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM" if expert else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if expert else "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        **({**_EXPERTS, "moe_intermediate_size": expert} if expert else {}),
    }


RELEASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "0.6B": _shape(1024, 28, 16, 8, 3072, tied=True),
        "1.7B": _shape(2048, 28, 16, 8, 6144, tied=True),
        "4B": _shape(2560, 36, 32, 8, 9728, tied=True),
        "8B": _shape(4096, 36, 32, 8, 12288, tied=False),
        "14B": _shape(5120, 40, 40, 8, 17408, tied=False),
        "32B": _shape(5120, 64, 64, 8, 25600, tied=False),
        "30B-A3B": _shape(2048, 48, 32, 4, 6144, tied=False, expert=768),
        "235B-A22B": _shape(4096, 94, 64, 4, 12288, tied=False, expert=1536),
    }
)
"""What `config.json` says in each release, by its size."""

_REPO_ID = re.compile(r"Qwen/Qwen3-(?P<size>[0-9.]+B(?:-A[0-9]+B)?)(?:-(?P<form>.+))?")
_MLX_GROUP, _GROUP, _BLOCK = 64, 128, 128 * 128


def footprints_of_release(repo_id: str) -> tuple[Footprint, Footprint] | None:
    """What a release takes as it is published, and as it is loaded; None for an id that is none of Qwen's."""
    found = _REPO_ID.fullmatch(repo_id)
    if found is None or found["size"] not in RELEASES:
        return None
    return footprints_of_form(ModelConfig.from_dict(RELEASES[found["size"]]), found["form"] or "BF16")


def footprints_of_form(config: ModelConfig, form: str) -> tuple[Footprint, Footprint] | None:
    """What a model takes as it is published, and as it is loaded, in bytes of its tensors.

    Args:
        config: its shape; sides of matrices are multiples of 128.
        form: "BF16", "MLX-4bit" (or 6, 8), "FP8", "AWQ", "GPTQ-Int4" or "GPTQ-Int8"; None comes back for others.
    """
    total, active = parameter_counts(config)
    norms = config.num_hidden_layers * 2 * (config.hidden_size + config.head_dim) + config.hidden_size
    matrices = total - norms
    kept = _unquantized(config)
    packed = matrices - kept

    def footprint(name: str, numbers: int, packed_bytes: int, dtype: mx.Dtype, *, runs: bool = True) -> Footprint:
        return Footprint(
            config=config,
            format=name,
            runs=runs,
            refusal=None,
            notes=(),
            parameters=total,
            active_parameters=active,
            numbers=numbers,
            float_bytes=2 * numbers,
            packed_bytes=packed_bytes,
            disk_bytes=2 * numbers + packed_bytes,
            dtype=dtype,
        )

    def mlx_form(bits: int) -> Footprint:
        numbers = norms + 2 * matrices // _MLX_GROUP
        return footprint(f"MLX {bits}-bit, groups of {_MLX_GROUP}", numbers, matrices * bits // 8, mx.bfloat16)

    if form == "BF16":
        whole = footprint(form, total, 0, mx.bfloat16)
        return whole, whole
    if (mlx_bits := re.fullmatch(r"MLX-([468])bit", form)) is not None:
        stored = mlx_form(int(mlx_bits[1]))
        return stored, stored
    if form == "FP8":
        return footprint(form, norms + kept + packed // _BLOCK, packed, mx.bfloat16, runs=False), mlx_form(8)
    if (grouped := re.fullmatch(r"(AWQ|GPTQ-Int([48]))", form)) is None:
        return None
    bits, scales = int(grouped[2] or 4), packed // _GROUP
    order = 0 if form == "AWQ" else 4 * _input_columns(config)  # which group each column is of
    codes, zeros = packed * bits // 8, scales * bits // 8
    name = form.partition("-")[0]
    stored = footprint(name, norms + kept + scales, codes + zeros + order, mx.float16, runs=False)
    name = f"MLX {bits}-bit, groups of {_GROUP}"
    return stored, footprint(name, norms + kept + 2 * scales, codes, mx.float16)


def _routers(config: ModelConfig) -> int:
    """How many layers are mixtures of experts."""
    moe = config.moe
    return 0 if moe is None else sum(moe.routes(layer) for layer in range(config.num_hidden_layers))


def _unquantized(config: ModelConfig) -> int:
    """Weights of the matrices that FP8, AWQ and GPTQ leave alone: embeddings, head and routers."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    experts = 0 if config.moe is None else config.moe.num_experts
    return embeddings + _routers(config) * config.hidden_size * experts


def _input_columns(config: ModelConfig) -> int:
    """The input columns of all matrices that are quantized."""
    layers, hidden, routed = config.num_hidden_layers, config.hidden_size, _routers(config)
    columns = layers * (3 * hidden + config.num_attention_heads * config.head_dim)
    columns += (layers - routed) * (2 * hidden + config.intermediate_size)
    if config.moe is not None:
        columns += routed * config.moe.num_experts * (2 * hidden + config.moe.moe_intermediate_size)
    return columns
