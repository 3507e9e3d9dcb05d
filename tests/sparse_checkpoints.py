"""Checkpoints of any size that take no room: true headers, and a file of holes behind them."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from make_checkpoint import SHAPES

RELEASES = SHAPES  # the `config.json` of Qwen's eight releases

Shapes = dict[str, tuple[int, ...]]


def matrices(config: dict[str, Any]) -> Shapes:
    """The weights that quantization may touch, experts stacked."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: Shapes = {"model.embed_tokens": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        shapes[f"{layer}.self_attn.q_proj"] = (heads, hidden)
        shapes[f"{layer}.self_attn.k_proj"] = shapes[f"{layer}.self_attn.v_proj"] = (kv_heads, hidden)
        shapes[f"{layer}.self_attn.o_proj"] = (hidden, heads)
        if "num_experts" in config:
            shapes[f"{layer}.mlp.gate"] = (config["num_experts"], hidden)
            stack, width, mlp = [config["num_experts"]], config["moe_intermediate_size"], f"{layer}.mlp.switch_mlp"
        else:
            stack, width, mlp = [], config["intermediate_size"], f"{layer}.mlp"
        shapes[f"{mlp}.gate_proj"] = shapes[f"{mlp}.up_proj"] = (*stack, width, hidden)
        shapes[f"{mlp}.down_proj"] = (*stack, hidden, width)
    return shapes


def norms(config: dict[str, Any]) -> Shapes:
    """The vectors, which are never quantized."""
    hidden, head_dim = (config["hidden_size"],), (config["head_dim"],)
    shapes: Shapes = {"model.norm": hidden}
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = hidden
        shapes[f"{layer}.self_attn.q_norm"] = shapes[f"{layer}.self_attn.k_norm"] = head_dim
    return shapes


def write_sparse(folder: Path, config: dict[str, Any], *, bits: int = 16, form: str = "mlx") -> Path:
    """A model's folder without its data.

    Args:
        bits: 16 for BF16; fewer for packed codes.
        form: "mlx" (groups of 64), "fp8" (blocks of 128 by 128) or "awq" (groups of 128); counts below 16 bits.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in norms(config).items():
        tensors[f"{name}.weight"] = ("BF16", shape)
    kept = ("embed_tokens", "lm_head", "mlp.gate")
    for name, (*stack, rows, width) in matrices(config).items():
        if bits == 16 or (form != "mlx" and name.endswith(kept)):
            tensors[f"{name}.weight"] = ("BF16", (*stack, rows, width))
        elif form == "mlx":
            tensors[f"{name}.weight"] = ("U32", (*stack, rows, width * bits // 32))
            tensors[f"{name}.scales"] = tensors[f"{name}.biases"] = ("BF16", (*stack, rows, width // 64))
        elif form == "fp8":
            tensors[f"{name}.weight"] = ("F8_E4M3", (*stack, rows, width))
            tensors[f"{name}.weight_scale_inv"] = ("BF16", (*stack, -(-rows // 128), -(-width // 128)))
        else:
            tensors[f"{name}.qweight"] = ("I32", (*stack, width, rows // 8))
            tensors[f"{name}.qzeros"] = ("I32", (*stack, width // 128, rows // 8))
            tensors[f"{name}.scales"] = ("F16", (*stack, width // 128, rows))
    folder.mkdir(parents=True)
    declared: dict[str, dict[str, Any]] = {
        "mlx": {"quantization": {"bits": bits, "group_size": 64}},
        "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
    }
    (folder / "config.json").write_text(json.dumps(config if bits == 16 else {**config, **declared[form]}))
    _write_holes(folder / "model.safetensors", tensors)
    return folder


def _write_holes(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    item_bytes = {"BF16": 2, "F16": 2, "U32": 4, "I32": 4, "F8_E4M3": 1}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * item_bytes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
