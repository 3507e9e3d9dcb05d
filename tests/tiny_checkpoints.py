"""Tiny Qwen3 checkpoints with numpy alone: every tensor follows from a seed and its name, so that all who need the
weights rebuild the same ones."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Config = dict[str, Any]
Floats = NDArray[np.float32]
Experts = Literal["separate", "fused", "stacked"]

DENSE: Config = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: Config = {
    **DENSE,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


def routes(config: Config, layer: int) -> bool:
    """Whether `layer` has experts, by the words of the format."""
    sparse = config["model_type"] == "qwen3_moe" and layer not in config.get("mlp_only_layers", [])
    return sparse and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def published_shapes(config: Config, experts: Experts = "separate") -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors as Qwen publishes them ("separate"), as transformers 5 holds them ("fused") or as
    MLX folders have them ("stacked")."""
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (query, hidden),
            f"{at}.self_attn.k_proj.weight": (key, hidden),
            f"{at}.self_attn.v_proj.weight": (key, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, query),
            f"{at}.self_attn.q_norm.weight": (head_dim,),
            f"{at}.self_attn.k_norm.weight": (head_dim,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
        if not routes(config, layer):
            shapes |= {f"{at}.mlp.{name}.weight": shape for name, shape in _glu(hidden, width).items()}
            continue
        count, inner = config["num_experts"], config["moe_intermediate_size"]
        shapes[f"{at}.mlp.gate.weight"] = (count, hidden)
        if experts == "fused":
            shapes[f"{at}.mlp.experts.gate_up_proj"] = (count, 2 * inner, hidden)
            shapes[f"{at}.mlp.experts.down_proj"] = (count, hidden, inner)
            continue
        for name, shape in _glu(hidden, inner).items():
            if experts == "stacked":
                shapes[f"{at}.mlp.switch_mlp.{name}.weight"] = (count, *shape)
            else:
                shapes |= {f"{at}.mlp.experts.{expert}.{name}.weight": shape for expert in range(count)}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _glu(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def make_weights(config: Config, *, seed: int = 0, experts: Experts = "separate") -> dict[str, Floats]:
    """All tensors in float32; the same numbers in every layout of the experts."""
    separate = {name: _numbers(name, shape, seed) for name, shape in published_shapes(config).items()}
    if experts == "separate":
        return separate
    weights = {}
    for name in published_shapes(config, experts):
        if name in separate:
            weights[name] = separate[name]
            continue
        at = name.partition(".experts.")[0].partition(".switch_mlp.")[0]
        projection = name.removesuffix(".weight").rpartition(".")[2]
        parts = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
        weights[name] = np.stack(
            [
                np.concatenate([separate[f"{at}.experts.{expert}.{part}.weight"] for part in parts])
                for expert in range(config["num_experts"])
            ]
        )
    return weights


def _numbers(name: str, shape: tuple[int, ...], seed: int) -> Floats:
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    drawn = random.standard_normal(shape)
    if len(shape) == 1:
        return (1 + 0.2 * drawn).astype(np.float32)
    scale = 0.5 if "embed" in name or "lm_head" in name else 2.0 / np.sqrt(shape[-1])
    return (scale * drawn).astype(np.float32)


def rounded(weights: Mapping[str, Floats], dtype: str) -> dict[str, Floats]:
    """What is left of float32 numbers that were stored as `dtype`."""
    if dtype == "F16":
        return {name: array.astype(np.float16).astype(np.float32) for name, array in weights.items()}
    if dtype == "BF16":
        widened = {name: _bfloat16_bits(array).astype(np.uint32) << 16 for name, array in weights.items()}
        return {name: bits.view(np.float32) for name, bits in widened.items()}
    return dict(weights)


def _bfloat16_bits(array: Floats) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, weights: Mapping[str, NDArray[Any]], dtype: str = "F32") -> None:
    """One file; float32 arrays are stored as `dtype`, integers as they are, uint8 as the bits of F8_E4M3."""
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    position = 0
    names = {np.dtype(np.uint32): "U32", np.dtype(np.uint8): "F8_E4M3", np.dtype(np.int32): "I32"}
    for name, array in weights.items():
        if array.dtype != np.float32:
            stored, data = names[array.dtype], array
        elif dtype == "BF16":
            stored, data = dtype, _bfloat16_bits(np.ascontiguousarray(array))
        else:
            stored, data = dtype, array.astype(np.float16 if dtype == "F16" else np.float32)
        blobs.append(data.tobytes())
        header[name] = {"dtype": stored, "shape": list(array.shape), "data_offsets": [position, position + data.nbytes]}
        position += data.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_folder(
    folder: Path, config: Config, weights: Mapping[str, NDArray[Any]], *, dtype: str = "F32", shards: int = 0
) -> Path:
    """A folder as `from_pretrained` reads it: one weight file, or `shards` of them and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard::shards]}
        write_safetensors(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids as good as random."""
    ids: list[int] = np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()
    return ids


_YARN = {"rope_type": "yarn", "factor": 4.0}
_SHORT = {"max_position_embeddings": 80}

# Name → the model's config and the length of its prompt. What transformers makes of them is in golden/models.json.
GOLDEN_MODELS: dict[str, tuple[Config, int]] = {
    "dense": (DENSE, 120),
    "untied, multi-query, odd heads": (
        {**DENSE, "hidden_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20}
        | {"tie_word_embeddings": False, "num_hidden_layers": 3},
        60,
    ),
    "one to one heads": ({**DENSE, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 12}, 60),
    "three to one heads": (
        {**DENSE, "num_attention_heads": 6, "head_dim": 24, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        60,
    ),
    "moe": (MOE, 90),
    "moe, weights not normalised": ({**MOE, "norm_topk_prob": False}, 90),
    "moe every second layer": ({**MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2}, 40),
    "moe with dense layers": ({**MOE, "num_hidden_layers": 3, "mlp_only_layers": [0, 2]}, 40),
    "moe, one expert a token": ({**MOE, "num_experts_per_tok": 1, "norm_topk_prob": False}, 60),
    "moe, all experts": ({**MOE, "num_experts_per_tok": 8, "tie_word_embeddings": True}, 40),
    "yarn, original missing": ({**DENSE, **_SHORT, "rope_scaling": _YARN}, 300),
    "yarn": (
        {**DENSE, "max_position_embeddings": 320} | {"rope_scaling": {**_YARN, "original_max_position_embeddings": 80}},
        300,
    ),
    "yarn, old spelling of its type": (
        {**DENSE, "max_position_embeddings": 80}
        | {"rope_scaling": {"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 80}},
        180,
    ),
    "yarn, attention factor": ({**DENSE, **_SHORT, "rope_scaling": {**_YARN, "attention_factor": 0.8}}, 200),
    "yarn, betas": ({**DENSE, **_SHORT, "rope_scaling": {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0}}, 200),
    "yarn, not truncated": ({**DENSE, **_SHORT, "rope_scaling": {**_YARN, "truncate": False}}, 190),
    "yarn, scales of attention": (
        {**DENSE, **_SHORT, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
        120,
    ),
    "yarn, transformers 5": (
        {key: value for key, value in DENSE.items() if key != "rope_theta"}
        | {"max_position_embeddings": 320, "dtype": "float32"}
        | {"rope_parameters": {**_YARN, "rope_theta": 5_000.0, "original_max_position_embeddings": 80}},
        300,
    ),
    "yarn, moe": ({**MOE, **_SHORT, "rope_scaling": _YARN}, 300),
}
GREEDY_TOKENS = 20


def golden_positions(length: int) -> list[int]:
    """The positions of a prompt whose logits are compared: some at the start, some in between, the last ones."""
    return sorted({0, 1, 2, *range(0, length, max(length // 8, 1)), length - 2, length - 1})
